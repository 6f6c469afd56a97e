"""`quant_fp8` and `silu_mul_quant`, which share a kernel."""

import pytest
import torch
from helpers import FLOATS
from torch.library import opcheck

from moe_compile.ops.quant_fp8 import quant_fp8, quant_fp8_reference, quant_fp8_triton
from moe_compile.ops.silu_mul import silu_mul_reference
from moe_compile.ops.silu_mul_quant import (
    silu_mul_quant,
    silu_mul_quant_reference,
    silu_mul_quant_triton,
)

SHAPES = [(1, 128), (7, 768), (3, 200), (0, 128), (4, 0), (2, 64)]
PLAIN = [quant_fp8, quant_fp8_triton]
GATED = [silu_mul_quant, silu_mul_quant_triton]
NAMES = ["op", "triton"]
ROUNDINGS = [
    {},
    {"power_of_two": True},
    {"scale_by_reciprocal": True},
    {"quant_by_reciprocal": True},
    {"group": 64, "amax_floor": 0.0, "scale_floor": 1e-3},
]
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0}


def number(q):
    """Where each float8 stands in their order: neighbours differ by 1."""
    bits = q.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def assert_quantized(got, want):
    """The scales agree to float32's last places; values to one float8, and nearly all exactly."""
    (q, scale), (q_want, scale_want) = got, want
    assert q.shape == q_want.shape
    assert scale.shape == scale_want.shape
    assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    torch.testing.assert_close(scale, scale_want, rtol=1e-6, atol=0)
    steps = (number(q) - number(q_want)).abs()
    assert steps.numel() == 0 or steps.max() <= 1
    assert steps.numel() < 100 or (steps > 0).float().mean() < 0.01


def dequantized(q, scale, group=128):
    return q.float() * scale.repeat_interleave(group, 1)[:, : q.shape[1]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", ROUNDINGS, ids=str)
@pytest.mark.parametrize("fn", PLAIN, ids=NAMES)
def test_plain_matches_reference(fn, options, shape, dtype, device):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    got = fn(x, **options)
    assert_quantized(got, quant_fp8_reference(x, **options))
    back = dequantized(*got, options.get("group", 128))
    step = got[1].repeat_interleave(options.get("group", 128), 1)[:, : x.shape[1]]
    assert ((back - x.float()).abs() <= x.float().abs() / 15 + step / 512).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        *ROUNDINGS[:2],
        GPT_OSS,
        {"limit": 0.5},
        {"round_silu": True, "round_product": True},
        {"round_sigmoid": True},
        {**GPT_OSS, "round_terms": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("fn", GATED, ids=NAMES)
def test_gated_matches_reference(fn, options, shape, dtype, device):
    R, F = shape
    x = torch.randn(R, 2 * F, device=device).to(dtype)
    got = fn(x, **options)
    assert_quantized(got, silu_mul_quant_reference(x, **options))
    activation = {k: v for k, v in options.items() if k in GPT_OSS}
    exact = silu_mul_reference(x.double(), **activation)
    err = (dequantized(*got).double() - exact).abs()
    step = got[1].repeat_interleave(128, 1)[:, :F]
    assert (err <= exact.abs() / 13 + step / 256).all()


@pytest.mark.parametrize("fn", GATED, ids=NAMES)
def test_weights_come_before_the_quantisation(fn, device):
    x, weights = torch.randn(5, 512, device=device), torch.rand(5, device=device)
    got = fn(x, None, weights)
    assert_quantized(got, silu_mul_quant_reference(x, None, weights))
    plain = fn(x)
    torch.testing.assert_close(got[1], plain[1] * weights[:, None])


@pytest.mark.parametrize("fn", GATED, ids=NAMES)
def test_two_tensors_are_as_two_halves(fn, device):
    x = torch.randn(5, 512, device=device).bfloat16()
    wide = torch.randn(5, 300, device=device).bfloat16()
    for gate, up in (x.chunk(2, 1), (x[:, :256].contiguous(), wide[:, 11:267])):
        got, want = fn(gate, up, limit=0.5), fn(torch.cat([gate, up], 1), limit=0.5)
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(got[1], want[1])
    with pytest.raises(ValueError, match=r"silu_mul_quant: expected up \[5, 256\] as x, got"):
        fn(gate, up[:1])
    with pytest.raises(ValueError, match=r"silu_mul_quant: expected up in x's torch.bfloat16, got"):
        fn(gate, up.float())
    with pytest.raises(ValueError, match="silu_mul_quant: expected no up where gate and up are"):
        fn(gate, up, interleaved=True)


@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_no_expert_are_not_written(gated, device):
    """The kernel; NaN there must reach nothing, and what memory held stays."""
    from moe_compile.ops._quant_kernel import FP8, launch

    R, F, real = 9, 256, 5
    x = torch.randn(R, F * (1 + gated), device=device)
    x[real:] = float("nan")
    offsets = torch.tensor([2, 2, real], dtype=torch.int32, device=device)
    out = torch.ones(R, F, device=device).to(FP8), torch.full((R, 2), 7.0, device=device)
    launch(x, out, 128, False, 1e-10, 0.0, (False, False), offsets, gated=gated)
    reference = silu_mul_quant_reference if gated else quant_fp8_reference
    assert_quantized([o[:real] for o in out], reference(x[:real]))
    assert (out[0][real:].float() == 1).all()
    assert (out[1][real:] == 7).all()


@pytest.mark.parametrize("fn", [*PLAIN, *GATED], ids=["op", "triton", "gated op", "gated triton"])
def test_scales_by_columns(fn, device):
    x = torch.randn(6, 768, device=device)
    q, scale = fn(x, column_major=True)
    assert scale.stride() == (1, 6)
    q_rows, scale_rows = fn(x)
    assert scale_rows.is_contiguous()
    assert torch.equal(scale, scale_rows)
    assert torch.equal(q.view(torch.uint8), q_rows.view(torch.uint8))


@pytest.mark.parametrize("fn", PLAIN, ids=NAMES)
def test_powers_of_two(fn, device):
    """Exact powers stay, all others go up; then no value is clamped."""
    x = torch.zeros(6, 128, device=device)
    x[:, 0] = torch.tensor([448.0, 448.5, 447.0, 1.0, 3e-40, 0.0])
    _, scale = fn(x, power_of_two=True, amax_floor=0.0)
    assert scale[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0**-8, 2.0**-126, 2.0**-126]


@pytest.mark.parametrize("fn", PLAIN, ids=NAMES)
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


@pytest.mark.parametrize("fn", PLAIN, ids=NAMES)
def test_strided_input(fn, device):
    wide = torch.randn(7, 512, device=device)
    for x in wide[:, 128:384], torch.randn(128, 7, device=device).t():
        assert_quantized(fn(x), quant_fp8_reference(x))


def test_opcheck(device):
    x = torch.randn(5, 512, device=device)
    offsets = torch.tensor([3, 5], dtype=torch.int32, device=device)
    for options in {}, {"column_major": True}, {"group": 64, "offsets": offsets}:
        opcheck(quant_fp8, (x,), options, test_utils=("test_schema", "test_faketensor"))
        opcheck(silu_mul_quant, (x,), options, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ([(4,)], {}, r"expected x \[R, F\], got \[4\]"),
        ([(4, 128)], {"group": 32}, r"expected groups of 64 or 128, got 32"),
        ([(4, 128)], {"amax_floor": -1.0}, r"expected floors of 0 or more, got"),
    ],
)
def test_refused(args, options, message, device):
    with pytest.raises(ValueError, match=f"quant_fp8: {message}"):
        quant_fp8(*(torch.randn(a, device=device) for a in args), **options)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        ((4, 3), None, r"expected x \[R, 2F\], got \[4, 3\]"),
        ((4, 256), (3,), r"expected weights \[4\], got \[3\]"),
        ((4, 256), (4, 1), r"expected weights \[R\], got \[4, 1\]"),
    ],
)
def test_refused_gated(x, weights, message, device):
    weights = None if weights is None else torch.ones(weights, device=device)
    with pytest.raises(ValueError, match=f"silu_mul_quant: {message}"):
        silu_mul_quant(torch.randn(x, device=device), None, weights)
