import pytest
import torch
from float8 import GEMM_CASES, assert_close_fp8, gemm_inputs
from torch.library import opcheck

from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops.grouped_mm_fp8 import (
    grouped_mm_fp8,
    grouped_mm_fp8_reference,
    grouped_mm_fp8_triton,
)
from moe_compile.ops.sort_tokens import sort_tokens_reference
from moe_compile.testing import capture, render

FUNCTIONS = [grouped_mm_fp8, grouped_mm_fp8_triton]
NAMES = ["op", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GEMM_CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_matches_reference(fn, case, dtype, device):
    given = gemm_inputs(*GEMM_CASES[case], device)
    assert_close_fp8(fn(*given, dtype=dtype), grouped_mm_fp8_reference, *given)


BLOCKS = [Blocks(1, 16, 0, 1, 2, 3), Blocks(16, 32, 0, 1, 2, 2), Blocks(32, 64, 0, 8, 4, 2)]


@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
@pytest.mark.parametrize("case", ["some", "several blocks", "rows of none", "one column"])
def test_any_blocks_give_the_same(case, blocks, group, device):
    given = gemm_inputs(*GEMM_CASES[case], device, group)
    x_scale, offsets = given[1], given[4]
    rows = torch.randperm(x_scale.shape[0], device=device).int()
    bias = torch.randn(len(offsets), given[2].shape[2], device=device).bfloat16()
    by_columns = x_scale.t().contiguous().t()
    y = grouped_mm_fp8_triton(given[0], by_columns, *given[2:], rows, 1, bias, blocks=blocks)
    assert_close_fp8(y, grouped_mm_fp8_reference, *given, rows, 1, bias)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_rows_of_tokens(fn, device):
    T, K, E, H, G = 11, 3, 5, 192, 136
    rows, offsets, _ = sort_tokens_reference(torch.randint(-1, E + 1, (T, K), device=device), E)
    x, x_scale, w, w_scale, _ = gemm_inputs([0] * E, T, H, G, device)
    given = x, x_scale, w, w_scale, offsets, rows, K
    y = fn(*given)
    assert_close_fp8(y, grouped_mm_fp8_reference, *given)
    assert not y[offsets[-1] :].any()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_nan_of_no_expert_reaches_nothing(fn, device):
    x, x_scale, w, w_scale, offsets = gemm_inputs([2, 3], 4, 128, 64, device)
    x[5:] = torch.full((4, 128), float("nan"), device=device).to(x.dtype)
    x_scale[5:] = float("nan")
    y = fn(x, x_scale, w, w_scale, offsets)
    assert y.isfinite().all()
    assert not y[5:].any()


def test_opcheck(device):
    given = gemm_inputs([3, 2], 1, 256, 160, device)
    # The schema's check multiplies float8, which torch does not.
    opcheck(grouped_mm_fp8, given, test_utils=("test_faketensor",))


REFUSED = [
    ({"x": torch.bfloat16}, r"expected x in torch.float8_e4m3fn, got torch.bfloat16"),
    ({"w": torch.bfloat16}, r"expected w in torch.float8_e4m3fn, got torch.bfloat16"),
    ({"x_scale": torch.bfloat16}, r"expected x_scale in float32, got"),
    ({"w_scale": torch.bfloat16}, r"expected w_scale in float32, got"),
    ({"x_scale": (6, 3)}, r"expected x_scale of groups of 128 or 64 along 256, got \[6, 3\]"),
    ({"x_scale": (5, 2)}, r"expected x_scale \[6, K\], got \[5, 2\]"),
    ({"w_scale": (2, 2, 1)}, r"expected w_scale \[2, 2, 2\], got \[2, 2, 1\]"),
    ({"offsets": torch.int64}, r"expected int32 offsets, got"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused(change, message, device):
    names = ("x", "x_scale", "w", "w_scale", "offsets")
    given = dict(zip(names, gemm_inputs([3, 2], 1, 256, 160, device), strict=True))
    for name, to in change.items():
        is_dtype = isinstance(to, torch.dtype)
        given[name] = given[name].to(to) if is_dtype else torch.ones(to, device=device)
    with pytest.raises(ValueError, match=f"grouped_mm_fp8: {message}"):
        grouped_mm_fp8(*given.values())


def test_weights_stored_along_the_wrong_dim(device):
    x, x_scale, w, w_scale, offsets = gemm_inputs([3, 2], 1, 256, 160, device)
    with pytest.raises(ValueError, match="grouped_mm_fp8: expected w stored along H, got"):
        grouped_mm_fp8(x, x_scale, w.contiguous(), w_scale, offsets)


def test_bfloat16_weights_never_meet_float8_activations(device):
    """The published runner quantised activations whatever the weights were; captured, too late."""
    x, x_scale, w, w_scale, offsets = gemm_inputs([3, 2], 0, 128, 64, device)

    def layer(w):
        return grouped_mm_fp8(x, x_scale, w, w_scale, offsets)

    assert "grouped_mm_fp8" in render(capture(layer, w).graph)
    with pytest.raises(Exception, match=r"grouped_mm_fp8: expected w in torch.float8_e4m3fn"):
        capture(layer, w.to(torch.bfloat16))
