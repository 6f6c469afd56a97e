import pytest
import torch
from float8 import gemm_inputs

from moe_compile.ops import moe
from moe_compile.ops._experts_kernel import FewBlocks, are_few, launch_few_fp8
from moe_compile.ops._grouped_mm_kernel import Blocks, Gate
from moe_compile.ops.experts_fp8 import experts_fp8, experts_fp8_reference, experts_fp8_triton

FUNCTIONS = [experts_fp8, experts_fp8_triton]
SHAPES = {  # T, K, E, H, F, O
    "few": (2, 3, 24, 256, 128, 136),
    "one token": (1, 2, 8, 200, 256, 64),
    "tokens that share experts": (5, 2, 4, 128, 128, 48),
    "no token": (0, 2, 8, 128, 128, 16),
}
ATTRIBUTES = {
    "silu": {},
    "rounded": {"round_silu": True, "power_of_two": True},
    "clamped": {"alpha": 1.702, "limit": 2.0, "up_shift": 1.0, "amax_floor": 1e-4},
}


def inputs(shape, device):
    T, K, E, H, F, out = shape
    x, x_scale, w_up, up_scale, _ = gemm_inputs([T] + [0] * (E - 1), 0, H, 2 * F, device)
    *_, w_down, down_scale, _ = gemm_inputs([0] * E, 0, F, out, device)
    ids = torch.rand(T, E, device=device).topk(K).indices
    x_scale, up_scale, down_scale = (s.sigmoid() / 20 for s in (x_scale, up_scale, down_scale))
    weights = torch.rand(T, K, device=device)
    return x, x_scale, ids, weights, w_up, up_scale, w_down, down_scale


def assert_close_layer(got, *args, **how):
    """To what quantising leaves: a value between two float8 may fall to either side.

    On a CPU the interpreter's bfloat16, which truncates, leaves more.
    """
    most = 0.01 if got.is_cuda else 0.06
    want = experts_fp8_reference(*args, **how)
    assert got.shape == want.shape
    if got.numel():
        err = (got.float() - want.float()).square().mean().sqrt()
        assert err <= most * want.float().square().mean().sqrt()


@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, attributes, device):
    args = inputs(SHAPES[shape], device)
    assert_close_layer(fn(*args, **ATTRIBUTES[attributes]), *args, **ATTRIBUTES[attributes])


@pytest.mark.parametrize("shape", ["one token", "tokens that share experts"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_a_residual_is_added_to_what_was_rounded(shape, fn, device):
    args = inputs(SHAPES[shape], device)
    out = fn(*args)
    residual = torch.randn_like(out)
    name = "residual" if fn is experts_fp8 else "residual_TO"
    assert torch.equal(fn(*args, **{name: residual}), out + residual)
    with pytest.raises(ValueError, match="experts_fp8: expected residual in the result's"):
        fn(*args, **{name: residual.float()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_experts_and_any_blocks(dtype, device):
    args = inputs(SHAPES["few"], device)
    args[2][0, 1], args[2][1, :] = -1, torch.tensor([24, 3, 3], device=device)
    assert are_few(args[2].numel(), args[4], args[6])
    out = torch.empty(2, 136, device=device, dtype=dtype)
    up, down = Blocks(1, 16, 0, 1, 2, 1), FewBlocks(128, 4, 2, 2)
    launch_few_fp8(
        *args[:4], args[4:6], args[6:], out, dtype, Gate(), (1e-10, False), up, down
    )  # fmt: skip
    assert_close_layer(out, *args, dtype=dtype)
    assert_close_layer(experts_fp8_triton(*args, dtype=dtype), *args, dtype=dtype)


def test_is_its_stages(device):
    args = inputs(SHAPES["one token"], device)
    x, x_scale, ids, weights, w_up, up_scale, w_down, down_scale = args
    rows, offsets, position = moe.sort_tokens(ids, 8)
    h = moe.grouped_mm_fp8(x, x_scale, w_up, up_scale, offsets, rows, 2)
    q, scale = moe.silu_mul_quant(h, offsets=offsets, round_product=True)
    y = moe.grouped_mm_fp8(q, scale, w_down, down_scale, offsets)
    want = moe.combine(y, position, weights)
    assert (experts_fp8(*args) - want).abs().max() <= 0.02 * want.abs().max()


def test_opcheck(device):
    args = inputs(SHAPES["one token"], device)
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")  # test_schema multiplies float8
    torch.library.opcheck(experts_fp8, args, test_utils=tests)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda x: x.float(), r"x in torch\.float8_e4m3fn, got torch\.float32"),
        (2, lambda ids: ids.float(), "ids int32 or int64, got torch.float32"),
        (3, lambda w: w[:, :1], r"weights of ids' shape, got"),
        (6, lambda w: w[:, :64], r"w_down \[E, F, O\] with half of w_up's last dim, got 64"),
        (7, lambda s: s[:, :, :1], r"w_scale \[24, 1, 2\], got"),
    ],
)
def test_wrong_inputs(i, change, message, fn, device):
    args = list(inputs(SHAPES["few"], device))
    args[i] = change(args[i])
    with pytest.raises(ValueError, match=f"experts_fp8: expected {message}"):
        fn(*args)
