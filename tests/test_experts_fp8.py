import pytest
import torch
from float8 import gemm_inputs, scales

from moe_compile.ops import moe
from moe_compile.ops._experts_kernel import FewBlocks, are_few, launch_few_fp8
from moe_compile.ops._gate_up_fp8_kernel import GateUpBlocks
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_kernel import Gate
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


def unquantised(shape, device, how):
    """Spread values, which another floor or group would change, and what they are quantised to."""
    T, _, _, H, *_ = shape
    x = (torch.randn(T, H, device=device) * scales(device, T, H) / 8).bfloat16()
    return x, moe.quant_fp8(x, **{k: how[k] for k in ("power_of_two", "amax_floor") if k in how})


@pytest.mark.parametrize("shape", [(1, 1, 4, 200, 128, 16), (3, 1, 2, 128, 128, 16)], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_quantises_x(fn, shape, device):
    _, _, *rest = inputs(shape, device)
    x, q = unquantised(shape, device, {})
    assert_close_layer(fn(x, None, *rest), *q, *rest)


ANY_BLOCKS = {
    "sums": (GateUpBlocks(32, 512, 1, 2), FewBlocks(128, 8, 2, 2)),
    "dots": (GateUpBlocks(64, 256, 2, 3, True), FewBlocks(256, 16, 2, 3, True)),
}


@pytest.mark.parametrize("blocks", ANY_BLOCKS)
@pytest.mark.parametrize("attributes", ATTRIBUTES)
def test_quantises_x_with_any_blocks(attributes, blocks, device):
    """H of 200 has a short group; one id is of no expert."""
    T, H, out = 2, 200, 24
    how = ATTRIBUTES[attributes]
    shape = T, 2, 16, H, 128, out
    _, _, ids, weights, *w = inputs(shape, device)
    ids[0, 1] = -1
    x, q = unquantised(shape, device, how)
    x = torch.stack((x, x), -1)[..., 0]
    gate = Gate(False, how.get("alpha", 1.0), how.get("limit"), how.get("up_shift", 0.0))
    gate = gate._replace(round_silu=how.get("round_silu", False))
    quantisation = how.get("amax_floor", 1e-10), how.get("power_of_two", False)
    up, down = ANY_BLOCKS[blocks]
    got = torch.empty(T, out, device=device, dtype=torch.float16)
    launch_few_fp8(
        x, None, ids, weights, w[:2], w[2:], got, got.dtype, gate, quantisation, up, down
    )  # fmt: skip
    assert_close_layer(got, *q, ids, weights, *w, **how, dtype=got.dtype)


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


DOTS = [(1, torch.bfloat16), (2, torch.float16), (4, torch.float32)]


@pytest.mark.parametrize(("T", "dtype"), DOTS, ids=str)
def test_dots(T, dtype, device):
    """Experts that are no power of two, steps that leave a rest, weights that are parts."""
    K, E, H, F, out = 3, 12, 320, 384, 24
    _, _, ids, weights, *w = inputs((T, K, E, H, F, out), device)
    ids[0, 0] = E
    ids[-1, 2] = -7
    x, q = unquantised((T, K, E, H), device, {})
    x = x.to(torch.float32)
    w[0] = torch.cat((w[0].mT, w[0].mT), 2)[..., :H].mT
    w[2] = torch.cat((w[2].mT, w[2].mT))[E:].mT
    up, down = GateUpBlocks(128, 256, 4, 2, True), FewBlocks(256, 16, 4, 2, True)
    got = torch.empty(T, out, device=device, dtype=dtype)
    how = dtype, Gate(), (1e-10, False), up, down
    residual = torch.randn_like(got) if T > 1 else None
    launch_few_fp8(x, None, ids, weights, w[:2], w[2:], got, *how, residual_TO=residual)
    assert_close_layer(got, *q, ids, weights, *w, dtype=dtype, residual_TO=residual)


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


@pytest.mark.gpu  # the interpreter's NaN in float8 is a number
def test_no_experts_and_short_blocks_over_a_least_amax_of_zero(device):
    args = inputs((2, 2, 16, 200, 128, 24), device)
    args[2][0, 1] = -1
    x = torch.randn(2, 200, device=device).bfloat16()
    dots = GateUpBlocks(16, 256, 2, 2, True), FewBlocks(512, 16, 4, 2, True)
    sums = None, FewBlocks(512, 8, 2, 2)
    for given, blocks in ((args[:2], sums), ((x, None), sums), ((x, None), dots)):
        out = torch.empty(2, 24, device=device, dtype=x.dtype)
        how = out.dtype, Gate(), (0.0, False), *blocks
        launch_few_fp8(*given, *args[2:4], args[4:6], args[6:], out, *how)
        assert_close_layer(out, *given, *args[2:], amax_floor=0.0)


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
    x = torch.randn(1, 200, device=device)
    torch.library.opcheck(experts_fp8, (x, None, *args[2:]), test_utils=tests)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
@pytest.mark.parametrize(
    ("i", "change", "message"),
    [
        (0, lambda x: x.float(), r"x in torch\.float8_e4m3fn, got torch\.float32"),
        (1, lambda scale: None, "x in float32, float16 or bfloat16, got torch.float8_e4m3fn"),
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
