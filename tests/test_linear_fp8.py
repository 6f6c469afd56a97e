import pytest
import torch
from float8 import assert_close_fp8, gemm_inputs, rms
from torch.library import opcheck

from moe_compile.ops.linear_fp8 import linear_fp8, linear_fp8_reference, linear_fp8_triton
from moe_compile.ops.quant_fp8 import quant_fp8

FUNCTIONS = [linear_fp8, linear_fp8_triton]
NAMES = ["op", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("shape", [(1, 128, 64), (5, 320, 272), (40, 200, 130), (0, 64, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_matches_reference(fn, dtype, shape, device):
    N, H, G = shape
    x, x_scale, w, w_scale, _ = gemm_inputs([N], 0, H, G, device)
    w, w_scale = w[0].t(), w_scale[0].t()
    for bias in None, torch.randn(G, device=device).to(dtype):
        given = x, x_scale, w, w_scale, bias
        assert_close_fp8(fn(*given, dtype=dtype), linear_fp8_reference, *given)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_what_quant_fp8_gives_is_multiplied_right(fn, device):
    """Against the product before quantisation: 1 in 16 of each factor, by the square root of H."""
    x, w = torch.randn(9, 512, device=device), torch.randn(256, 512, device=device)
    q, scale = quant_fp8(x, column_major=True)
    blocks = w.view(2, 128, 4, 128)
    w_scale = blocks.abs().amax((1, 3)) / 448
    w_q = (blocks / w_scale[:, None, :, None]).view(256, 512).to(torch.float8_e4m3fn)
    y, want = fn(q, scale, w_q, w_scale, dtype=torch.float32), x @ w.t()
    assert rms(y - want) < 0.05 * rms(want)


def test_opcheck(device):
    x, x_scale, w, w_scale, _ = gemm_inputs([3], 0, 256, 160, device)
    given = x, x_scale, w[0].t(), w_scale[0].t()
    opcheck(linear_fp8, given, {"dtype": torch.float16}, test_utils=("test_faketensor",))


@pytest.mark.parametrize(
    ("at", "to", "message"),
    [
        (0, torch.bfloat16, r"expected x in torch.float8_e4m3fn, got torch.bfloat16"),
        (2, torch.bfloat16, r"expected w in torch.float8_e4m3fn, got torch.bfloat16"),
        (1, (3, 3), r"expected x_scale of groups of 128 or 64 along 256, got \[3, 3\]"),
        (3, (1, 2), r"expected w_scale \[2, 2\], got \[1, 2\]"),
        (4, (3,), r"expected bias \[160\], got \[3\]"),
    ],
)
def test_refused(at, to, message, device):
    x, x_scale, w, w_scale, _ = gemm_inputs([3], 0, 256, 160, device)
    given = [x, x_scale, w[0].t(), w_scale[0].t(), torch.ones(160, device=device).bfloat16()]
    is_dtype = isinstance(to, torch.dtype)
    given[at] = given[at].to(to) if is_dtype else torch.ones(to, device=device)
    with pytest.raises(ValueError, match=f"linear_fp8: {message}"):
        linear_fp8(*given)
