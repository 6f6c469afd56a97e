import pytest
import torch
from float8 import QUANT_SHAPES, ROUNDINGS, assert_quantized, dequantized
from helpers import FLOATS
from torch.library import opcheck

from moe_compile.ops._quant_kernel import FP8, launch
from moe_compile.ops.silu_mul import silu_mul_reference
from moe_compile.ops.silu_mul_quant import (
    silu_mul_quant,
    silu_mul_quant_reference,
    silu_mul_quant_triton,
)

FUNCTIONS = [silu_mul_quant, silu_mul_quant_triton]
NAMES = ["op", "triton"]
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", QUANT_SHAPES, ids=str)
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
@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_matches_reference(fn, options, shape, dtype, device):
    R, F = shape
    x = torch.randn(R, 2 * F, device=device).to(dtype)
    got = fn(x, **options)
    assert_quantized(got, silu_mul_quant_reference(x, **options))
    activation = {k: v for k, v in options.items() if k in GPT_OSS}
    exact = silu_mul_reference(x.double(), **activation)
    err = (dequantized(*got).double() - exact).abs()
    step = got[1].repeat_interleave(128, 1)[:, :F]
    assert (err <= exact.abs() / 13 + step / 256).all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_weights_come_before_the_quantisation(fn, device):
    x, weights = torch.randn(5, 512, device=device), torch.rand(5, device=device)
    got = fn(x, None, weights)
    assert_quantized(got, silu_mul_quant_reference(x, None, weights))
    plain = fn(x)
    torch.testing.assert_close(got[1], plain[1] * weights[:, None])


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
def test_epsilons_come_behind_the_floors(fn, device):
    x = torch.randn(5, 400, device=device)  # the last group is short
    got = fn(x, amax_floor=0.1, scale_floor=1e-3, amax_eps=0.3, scale_eps=7e-4)
    amax = fn(x, amax_floor=0.0)[1].double() * 448
    want = ((amax.clamp(min=0.1) + 0.3) / 448).clamp(min=1e-3) + 7e-4
    torch.testing.assert_close(got[1].double(), want, rtol=1e-6, atol=0)
    step = got[1].repeat_interleave(128, 1)[:, :200].double()
    exact = silu_mul_reference(x.double())
    assert ((dequantized(*got).double() - exact).abs() <= exact.abs() / 13 + step / 256).all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=NAMES)
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


def test_rows_of_no_expert_are_not_written(device):
    """The kernel; NaN there must reach nothing, and what memory held stays."""
    R, F, real = 9, 256, 5
    x = torch.randn(R, 2 * F, device=device)
    x[real:] = float("nan")
    offsets = torch.tensor([2, 2, real], dtype=torch.int32, device=device)
    out = torch.ones(R, F, device=device).to(FP8), torch.full((R, 2), 7.0, device=device)
    launch(x, out, 128, False, 1e-10, 0.0, (False, False), offsets, gated=True)
    assert_quantized([o[:real] for o in out], silu_mul_quant_reference(x[:real]))
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
def test_rows_apart(fn, device):
    """As in a tensor of whole groups whose columns were cut off."""
    x = torch.randn(5, 400, device=device)
    (q, scale), (q_want, scale_want) = fn(x, pad_rows=True), fn(x)
    assert q.stride() == (256, 1)
    assert q_want.is_contiguous()
    assert torch.equal(q.float(), q_want.float())
    assert torch.equal(scale, scale_want)
    opcheck(silu_mul_quant, (x,), {"pad_rows": True}, test_utils=("test_schema", "test_faketensor"))


def test_opcheck(device):
    x = torch.randn(5, 512, device=device)
    offsets = torch.tensor([3, 5], dtype=torch.int32, device=device)
    for options in {}, {"column_major": True}, {"group": 64, "offsets": offsets, "scale_eps": 1e-6}:
        opcheck(silu_mul_quant, (x,), options, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        ((4, 3), None, r"expected x \[R, 2F\], got \[4, 3\]"),
        ((4, 256), (3,), r"expected weights \[4\], got \[3\]"),
        ((4, 256), (4, 1), r"expected weights \[R\], got \[4, 1\]"),
    ],
)
def test_refused(x, weights, message, device):
    weights = None if weights is None else torch.ones(weights, device=device)
    with pytest.raises(ValueError, match=f"silu_mul_quant: {message}"):
        silu_mul_quant(torch.randn(x, device=device), None, weights)
