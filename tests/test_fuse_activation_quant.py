"""Activation and quantisation become one op in every spelling; what only looks like it stays."""

import pytest
import torch
import torch.nn.functional as F
from float8 import number

from moe_compile.ops import moe
from moe_compile.passes.fuse_activation_quant import fuse_activation_quant
from moe_compile.testing import assert_documented, capture, render, run_passes

FP8 = torch.float8_e4m3fn
I = 256  # noqa: E741


def silu_mul(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def quant(y, group=128, eps=1e-10):
    y = y.reshape(*y.shape[:-1], -1, group).float()
    scale = y.abs().amax(-1, keepdim=True).clamp(min=eps) / 448
    return (y / scale).clamp(-448, 448).to(FP8).flatten(-2), scale.squeeze(-1)


def by_sigmoid(x):
    gate, up = x[..., :I], x[..., I:]
    return quant(gate * torch.sigmoid(gate) * up)


def by_split(x):
    gate, up = torch.split(x, I, -1)
    return quant(up * F.silu(gate))


def in_float32(x):
    gate, up = x.float().chunk(2, -1)
    return quant(F.silu(gate) * up)


def rounded_to_float16(x):
    return quant(silu_mul(x.float()).half())


def rounded_once(x):
    gate, up = x.chunk(2, -1)
    return quant((F.silu(gate.float()) * up.float()).to(x.dtype))


def by_max_and_reciprocal(x):
    y = silu_mul(x).view(-1, 2, 128)
    floor = torch.tensor(1e-10)
    scale = torch.maximum(y.abs().max(-1, keepdim=True).values.float(), floor) * (1 / 448)
    q = y.float() * (1.0 / scale)
    q = torch.minimum(torch.maximum(q, torch.tensor(-448.0)), torch.tensor(448.0))
    return q.to(FP8).view(x.shape[0], -1), scale[..., 0]


def by_norm(x):
    y = silu_mul(x).unflatten(-1, (-1, 128))
    scale = (torch.linalg.vector_norm(y, float("inf"), dim=-1).float() / 448).clamp_min(1e-12)
    return (y.float() * scale.reciprocal()[..., None]).to(FP8).flatten(1), scale


def powers_of_two(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = torch.exp2(torch.ceil(torch.log2(y.abs().amax(-1, keepdim=True).clamp(1e-4) / 448)))
    return (y / scale).to(FP8), scale


def gpt_oss(x):
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return quant(gate * torch.sigmoid(gate * 1.702) * (up + 1))


def clamped(x):
    gate, up = x.chunk(2, -1)
    return quant(F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0))


def times_448_over_amax(x, stored=448.0):
    """As DeepGEMM's users quantise for each token."""
    y = silu_mul(x)
    rows, columns = y.shape
    y = F.pad(y, (0, -columns % 128)).view(rows, -1, 128)
    amax = y.abs().float().amax(dim=2).view(rows, -1).clamp(1e-4)
    q = (y * (448.0 / amax.unsqueeze(2))).to(FP8)
    return q.view(rows, -1)[:, :columns], (amax / stored).view(rows, -1)


def in_groups_of_64(x):
    return quant(silu_mul(x), 64)


def of_three_dims(x):
    q, scale = quant(silu_mul(x.view(2, -1, 2 * I)))
    return q.view(-1, I), scale


def casts_elsewhere(x):
    y = silu_mul(x)
    groups = y.view(-1, I // 128, 128)
    amax = groups.abs().float().amax(dim=2).clamp(min=1e-10)
    scale = amax / 448.0
    q = y.float().view(-1, I // 128, 128) / scale.unsqueeze(-1)
    return q.clamp(-448.0, 448.0).to(FP8).view(y.shape), scale


def scales_by_columns(x):
    q, scale = quant(silu_mul(x))
    return q, scale.t().contiguous().t()


def floor_on_the_scale(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = torch.clamp(y.abs().amax(-1, keepdim=True) / 448, min=1e-8)
    return (y / scale).to(FP8), scale


def from_two_tensors(x):
    return quant(F.silu(x[:, :I].sin()) * x[:, I:].cos())


def up_first(x):
    up, gate = x.chunk(2, -1)
    return quant(F.silu(gate) * up)


SPELLINGS = {
    "chunk": (lambda x: quant(silu_mul(x)), {"round_silu": True, "round_product": True}),
    "sigmoid": (by_sigmoid, {"round_sigmoid": True, "round_silu": True, "round_product": True}),
    "split": (by_split, {"round_silu": True, "round_product": True}),
    "float32": (in_float32, {}),
    "two tensors": (from_two_tensors, {"round_silu": True, "round_product": True}),
    "up first": (up_first, {"round_silu": True}),
    "rounded once": (rounded_once, {"round_product": True}),
    "max, reciprocal": (
        by_max_and_reciprocal,
        {"scale_by_reciprocal": True, "quant_by_reciprocal": True},
    ),
    "448 / amax": (times_448_over_amax, {"quant_by_reciprocal": True}),
    "norm": (by_norm, {"quant_by_reciprocal": True, "amax_floor": 0.0}),
    "powers of two": (powers_of_two, {"power_of_two": True}),
    "gpt-oss": (gpt_oss, {"interleaved": True, "alpha": 1.702, "limit": 7.0, "round_terms": True}),
    "clamped": (clamped, {"limit": 10.0, "round_silu": True}),
    "groups of 64": (in_groups_of_64, {"group": 64}),
    "three dims": (of_three_dims, {"round_silu": True}),
    "casts elsewhere": (casts_elsewhere, {"round_silu": True, "round_product": True}),
    "scales by columns": (scales_by_columns, {"column_major": True}),
    "floor on the scale": (floor_on_the_scale, {"amax_floor": 0.0}),
}


def fused(fn, *inputs, dynamic=None):
    gm = capture(fn, *inputs, dynamic=dynamic)
    (outcome,) = run_passes(gm, fuse_activation_quant)
    return gm, outcome


def assert_quantized_alike(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.dtype == FP8:  # exp may differ in its last place, and a sum of three roundings then
            steps = (number(a.flatten()) - number(b.flatten())).abs()
            assert steps.max() <= 1
            assert (steps > 0).float().mean() < 0.01
        else:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


def x_of(rows=6, dtype=torch.bfloat16):
    return (torch.randn(rows, 2 * I) * 3).to(dtype)


def plain_chunk(x):
    y = silu_mul(x).view(4, 2, 128).float()
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (y / scale).to(FP8), scale


def test_documented():
    assert_documented(fuse_activation_quant, capture(plain_chunk, x_of(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, dtype):
    fn, options = SPELLINGS[name]
    gm, outcome = fused(fn, x_of(dtype=dtype))
    (event,) = outcome.rewrites
    assert not outcome.declined
    for key, value in options.items():
        assert f"{key}={value}" in event.detail
    text = render(gm.graph)
    assert "silu_mul_quant" in text
    assert "exp" not in text.replace("expand", "")
    assert "amax(" not in text
    x = x_of(dtype=dtype)
    assert_quantized_alike(gm(x), fn(x))
    (outcome,) = run_passes(gm, fuse_activation_quant)  # twice is once
    assert not outcome.rewrites
    assert render(gm.graph) == text


@pytest.mark.parametrize("name", ["chunk", "norm", "casts elsewhere", "gpt-oss"])
def test_any_number_of_rows(name):
    fn, _ = SPELLINGS[name]
    x = x_of()
    torch._dynamo.mark_dynamic(x, 0)
    _, outcome = fused(fn, x)
    assert len(outcome.rewrites) == 1
    compiled = torch.compile(
        fn, backend="moe_compile", options={"require": {"fuse_activation_quant": 1}}
    )
    for rows in 6, 9:
        x = x_of(rows)
        torch._dynamo.mark_dynamic(x, 0)
        assert_quantized_alike(compiled(x), fn(x))


def largest_value(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = y.amax(-1, keepdim=True) / 448
    return (y / scale).to(FP8), scale


def largest_of_others(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = (y * 2).abs().amax(-1, keepdim=True) / 448
    return (y / scale).to(FP8), scale


def other_largest(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = y.abs().amax(-1, keepdim=True) / 240
    return (y / scale).to(FP8), scale


def scale_in_bfloat16(x):
    y = silu_mul(x).view(x.shape[0], -1, 128)
    scale = y.abs().amax(-1, keepdim=True) / 448
    return (y / scale).to(FP8), scale


def static_scale(x):
    return (silu_mul(x).float() / 0.5).clamp(-448, 448).to(FP8)


def whole_rows(x):
    y = silu_mul(x).float()
    scale = y.abs().amax(-1, keepdim=True) / 448
    return (y / scale).to(FP8), scale


def over_rows(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = y.abs().amax(0, keepdim=True) / 448
    return (y / scale).to(FP8), scale


def uneven(x):
    return quant(F.silu(x[:, :I]) * x[:1, I:])


def gelu(x):
    gate, up = x.chunk(2, -1)
    return quant(F.gelu(gate) * up)


def clamped_both_ways(x):
    gate, up = x.chunk(2, -1)
    return quant(F.silu(gate.clamp(-10.0, 10.0)) * up.clamp(-10.0, 10.0))


def bounds_that_are_rounded(x):
    gate, up = x.chunk(2, -1)
    return quant(F.silu(gate.clamp(max=0.3)) * up.clamp(-0.3, 0.3))


def clamped_the_wrong_way(x):
    y = silu_mul(x).view(x.shape[0], -1, 128).float()
    scale = y.abs().amax(-1, keepdim=True) / 448
    return (y / scale).clamp(min=448).to(FP8), scale


def returned_too(x):
    y = silu_mul(x)
    return quant(y), y


def no_activation(x):
    return quant(x)


def another_scale_stored(x):
    return times_448_over_amax(x, 240.0)


NEAR_MISSES = {
    another_scale_stored: "amax / 448 is stored nowhere",
    largest_value: "not of the largest magnitude",
    largest_of_others: "other values than those divided",
    other_largest: "not the largest magnitude / 448",
    scale_in_bfloat16: "not divided by their scale in float32",
    static_scale: "neither divided by a scale",
    whole_rows: "groups of 256",
    over_rows: "not over the last dim",
    uneven: "other dtypes or shapes",
    gelu: "no silu(gate) * up",
    rounded_to_float16: "rounded to torch.float16",
    bounds_that_are_rounded: "a bound of 0.3, which torch.bfloat16 rounds",
    clamped_both_ways: "clamped to bounds that the op has not",
    clamped_the_wrong_way: "neither divided by a scale",
    returned_too: "returned, too",
    no_activation: "no silu(gate) * up",
}


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_near_misses(fn):
    gm, outcome = fused(fn, x_of())
    assert not outcome.rewrites
    assert "silu_mul_quant" not in render(gm.graph)
    (event,) = outcome.declined
    assert NEAR_MISSES[fn] in event.detail


def test_scales_by_columns_are_not_copied():
    gm, _ = fused(scales_by_columns, x_of())
    assert "clone" not in render(gm.graph)
    assert gm(x_of())[1].stride() == (1, 6)


# Between our own ops


def experts(x, w1, s1, offsets, w2, s2):
    q, scale = moe.quant_fp8(x)
    h = moe.grouped_mm_fp8(q, scale, w1, s1, offsets)
    q, scale = moe.quant_fp8(silu_mul(h))
    return moe.grouped_mm_fp8(q, scale, w2, s2, offsets)


def expert_inputs(E=3, H=128, N=7):
    def weight(G, H):
        w = torch.randn(E, G, H).to(FP8).transpose(1, 2)
        return w, torch.rand(E, -(-G // 128), -(-H // 128)).transpose(1, 2)

    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    return [torch.randn(N, H).bfloat16(), *weight(2 * I, H), offsets, *weight(H, I)]


def test_between_grouped_gemms():
    given = expert_inputs()
    gm, outcome = fused(experts, *given)
    (event,) = outcome.rewrites
    assert event.detail == "silu_mul_quant(round_silu=True, round_product=True), 256 columns"
    line = next(x for x in render(gm.graph).splitlines() if "silu_mul_quant" in x)
    assert "offsets=arg" in line  # rows of no expert are skipped
    (got,) = gm(*given)
    torch.testing.assert_close(got, experts(*given), rtol=2e-2, atol=2.0)
    assert not got[6:].any()
    assert not outcome.declined  # nobody is told of the quantisation that enters the layer


def test_rows_that_are_other_rows():
    """Two rows of the activation as one: its halves would no longer be where the op looks."""

    def fn(x):
        q, scale = moe.quant_fp8(silu_mul(x).view(-1, 2 * I))
        return q.float(), scale

    _, outcome = fused(fn, x_of())
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == [
        "the rows quantised are not those of the activation"
    ]


def test_rows_that_others_read_are_all_written():
    def fn(*given):
        y = experts(*given)
        q, scale = moe.quant_fp8(silu_mul(given[0].repeat(1, 4)))
        return y, q.float(), scale

    gm, outcome = fused(fn, *expert_inputs())
    assert len(outcome.rewrites) == 2
    lines = [x for x in render(gm.graph).splitlines() if "silu_mul_quant(" in x]
    assert sorted("offsets=" in line for line in lines) == [False, True]
