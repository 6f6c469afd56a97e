import pytest
import torch
from float8 import QUANT_SHAPES, ROUNDINGS, assert_quantized, dequantized
from helpers import FLOATS
from torch.library import opcheck

from moe_compile.ops._quant_kernel import FP8, launch
from moe_compile.ops.quant_fp8 import quant_fp8, quant_fp8_reference, quant_fp8_triton

FUNCTIONS = [quant_fp8, quant_fp8_triton]
NAMES = ["op", "triton"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", QUANT_SHAPES, ids=str)
@pytest.mark.parametrize("options", ROUNDINGS, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_matches_reference(fn, options, shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    got = fn(x, **options)
    assert_quantized(got, quant_fp8_reference(x, **options))
    back = dequantized(*got, options.get("group", 128))
    step = got[1].repeat_interleave(options.get("group", 128), 1)[:, : x.shape[1]]
    assert ((back - x.float()).abs() <= x.float().abs() / 15 + step / 512).all()


def test_rows_of_no_expert_are_not_written(device):
    """The kernel; NaN there must reach nothing, and what memory held stays."""
    R, F, real = 9, 256, 5
    x = torch.randn(R, F, device=device)
    x[real:] = float("nan")
    offsets = torch.tensor([2, 2, real], dtype=torch.int32, device=device)
    out = torch.ones(R, F, device=device).to(FP8), torch.full((R, 2), 7.0, device=device)
    launch(x, out, 128, False, 1e-10, 0.0, (False, False), offsets)
    assert_quantized([o[:real] for o in out], quant_fp8_reference(x[:real]))
    assert (out[0][real:].float() == 1).all()
    assert (out[1][real:] == 7).all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_scales_by_columns(fn, device):
    x = torch.randn(6, 768, device=device)
    q, scale = fn(x, column_major=True)
    assert scale.stride() == (1, 6)
    q_rows, scale_rows = fn(x)
    assert scale_rows.is_contiguous()
    assert torch.equal(scale, scale_rows)
    assert torch.equal(q.view(torch.uint8), q_rows.view(torch.uint8))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_powers_of_two(fn, device):
    """Exact powers stay, all others go up; then no value is clamped."""
    x = torch.zeros(6, 128, device=device)
    x[:, 0] = torch.tensor([448.0, 448.5, 447.0, 1.0, 3e-40, 0.0])
    _, scale = fn(x, power_of_two=True, amax_floor=0.0)
    assert scale[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0**-8, 2.0**-126, 2.0**-126]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_epsilons(fn, device):
    """Behind the floors, and the scale's before the power of two; the last group is short.

    What is wanted is computed on a CPU: on a GPU, torch multiplies by 1 / 448 where it divides.
    """
    x = torch.randn(6, 200, device=device)
    x[0], x[1] = 0, 1e-9  # where an epsilon is all there is, and where a floor is
    amax = torch.stack([g.abs().amax(1) for g in x.cpu().split(128, 1)], 1)
    how = {"amax_eps": 0.3, "scale_eps": 7e-4}
    got = [y.cpu() for y in fn(x, amax_floor=0.1, scale_floor=1e-3, **how)]
    want = ((amax.clamp(min=0.1) + 0.3) / 448).clamp(min=1e-3) + 7e-4
    assert torch.equal(got[1], want)
    assert_quantized(got, ((x.cpu() / want.repeat_interleave(128, 1)[:, :200]).to(FP8), want))
    exact = ((amax.double().clamp(min=0.1) + 0.3) / 448).clamp(min=1e-3) + 7e-4
    torch.testing.assert_close(got[1].double(), exact, rtol=2e-7, atol=0)
    _, scale = fn(x, amax_floor=0.0, scale_by_reciprocal=True, **how)
    assert torch.equal(scale.cpu(), (amax + 0.3) * (1 / 448) + 7e-4)
    _, scale = fn(x, amax_floor=0.0, power_of_two=True, scale_eps=2.0**-9)
    assert torch.equal(scale.cpu(), torch.exp2(torch.log2(amax / 448 + 2.0**-9).ceil()))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_extreme_values(fn, device):
    x = torch.zeros(4, 128, device=device)
    x[1, 3], x[1, 4], x[2, 5], x[3, 7] = 3e38, -1e38, float("nan"), 1e-30
    q, scale = fn(x)
    assert not q[0].float().any()  # a group of zeros, with the floor's scale
    torch.testing.assert_close(scale[0], torch.full_like(scale[0], 1e-10 / 448))
    assert q[1, 3:5].float().tolist() == [448, -144]
    if q.is_cuda or fn is quant_fp8:  # Triton's interpreter makes 384 of NaN
        assert q[2, 5].float().isnan()
    assert not q[3].float().any()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_strided_input(fn, device):
    wide = torch.randn(7, 512, device=device)
    for x in wide[:, 128:384], torch.randn(128, 7, device=device).t():
        assert_quantized(fn(x), quant_fp8_reference(x))


def test_opcheck(device):
    x = torch.randn(5, 512, device=device)
    offsets = torch.tensor([3, 5], dtype=torch.int32, device=device)
    for options in {}, {"column_major": True}, {"group": 64, "offsets": offsets, "amax_eps": 1e-6}:
        opcheck(quant_fp8, (x,), options, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ([(4,)], {}, r"expected x \[R, F\], got \[4\]"),
        ([(4, 128)], {"group": 32}, r"expected groups of 64 or 128, got 32"),
        ([(4, 128)], {"amax_floor": -1.0}, r"expected floors of 0 or more, got"),
        ([(4, 128)], {"scale_eps": -1.0}, r"expected finite epsilons of 0 or more, got \(0.0, -1"),
        ([(4, 128)], {"amax_eps": float("inf")}, r"expected finite epsilons of 0 or more, got"),
    ],
)
def test_refused(args, options, message, device):
    with pytest.raises(ValueError, match=f"quant_fp8: {message}"):
        quant_fp8(*(torch.randn(a, device=device) for a in args), **options)
