"""Scales shifted by an epsilon, wherever a model adds it, are the op's own bit by bit."""

import copy

import pytest
import torch
from test_fuse_activation_quant import FP8, fused, silu_mul, x_of

from moe_compile.passes.fuse_activation_quant import fuse_activation_quant
from moe_compile.testing import capture, render, run_passes

AMAX_EPS, SCALE_EPS = 0.25, 1e-3  # large enough to be seen in every scale


def groups_of(x, group=128):
    """The activation in groups, and their largest magnitudes."""
    y = silu_mul(x).unflatten(-1, (-1, group)).float()
    return y, y.abs().amax(-1, keepdim=True)


def on_the_scale(x):
    y, amax = groups_of(x)
    scale = amax / 448 + SCALE_EPS
    return (y / scale).to(FP8), scale


def on_the_magnitude(x):
    y, amax = groups_of(x)
    scale = (AMAX_EPS + amax) / 448
    return (y / scale).to(FP8), scale


def on_both_behind_floors(x):
    y, amax = groups_of(x)
    scale = ((amax.clamp(min=0.5) + AMAX_EPS) * (1 / 448)).clamp(min=2e-3) + SCALE_EPS
    return (y * scale.reciprocal()).to(FP8), scale


def written_twice(x):
    """As `y / (scale + eps)` and then the same sum in what is returned."""
    y, amax = groups_of(x)
    scale = amax.squeeze(-1) / 448
    return (y / (scale[..., None] + SCALE_EPS)).to(FP8), scale + SCALE_EPS


def before_the_power_of_two(x):
    y, amax = groups_of(x)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448 + SCALE_EPS)))
    return (y / scale).to(FP8), scale


def held_by_a_tensor(x):
    y, amax = groups_of(x)
    scale = amax / 448 + torch.tensor(SCALE_EPS, dtype=torch.bfloat16)
    return (y / scale).to(FP8), scale


def on_what_is_stored_alone(x):
    """Values are divided by the scale; the sum is left to those that asked for it."""
    y, amax = groups_of(x)
    scale = amax.clamp(min=AMAX_EPS) / 448
    return (y / scale).to(FP8), scale + SCALE_EPS


def of_448_over_amax(x):
    y, amax = groups_of(x)
    return (y * (448 / (amax + AMAX_EPS))).to(FP8), ((amax + AMAX_EPS) / 448).squeeze(-1)


IN_BFLOAT16 = torch.tensor(SCALE_EPS, dtype=torch.bfloat16).item()
SPELLINGS = {
    on_the_scale: {"scale_eps": SCALE_EPS},
    on_the_magnitude: {"amax_eps": AMAX_EPS},
    on_both_behind_floors: {
        **{"amax_floor": 0.5, "amax_eps": AMAX_EPS, "scale_eps": SCALE_EPS},
        "scale_by_reciprocal": True,
    },
    written_twice: {"scale_eps": SCALE_EPS},
    before_the_power_of_two: {"power_of_two": True, "scale_eps": SCALE_EPS},
    held_by_a_tensor: {"scale_eps": IN_BFLOAT16},
    on_what_is_stored_alone: {"amax_floor": AMAX_EPS},
    of_448_over_amax: {"amax_eps": AMAX_EPS},
}


def assert_bitwise(got, want):
    """The same as the graph gave before."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.equal(a.float(), b.float())


def x_with_zeros(rows=6):
    x = x_of(rows)
    x[1] = 0
    return x


def fused_and_before(fn, *inputs):
    """The graph with the pass, what the pass did, and the graph without."""
    gm = capture(fn, *inputs)
    before = copy.deepcopy(gm)
    (outcome,) = run_passes(gm, fuse_activation_quant)
    return gm, outcome, before


@pytest.mark.parametrize(
    ("fn", "rows"),
    [*((fn, "static") for fn in SPELLINGS), (written_twice, "dynamic")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_spellings(fn, rows):
    x = x_with_zeros()
    if rows == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    gm, outcome, before = fused_and_before(fn, x)
    inputs = [6, x] if rows == "dynamic" else [x]
    (event,) = outcome.rewrites
    assert not outcome.declined
    for key, value in SPELLINGS[fn].items():
        assert f"{key}={value}" in event.detail
    text = render(gm.graph)
    assert "amax(" not in text
    (q, scale), (q_want, scale_want) = gm(*inputs), before(*inputs)
    if fn is of_448_over_amax:  # the op multiplies by the inverse of the scale: another rounding
        assert ((q.float() - q_want.float()).abs() <= q_want.float().abs() / 8).all()
        q = q_want
    assert_bitwise((q, scale), (q_want, scale_want))
    (outcome,) = run_passes(gm, fuse_activation_quant)  # twice is once
    assert not outcome.rewrites
    assert render(gm.graph) == text


def of_a_value(x):
    y, amax = groups_of(x)
    scale = amax / 448 + x[0, 0].float().abs()
    return (y / scale).to(FP8), scale


def negative(x):
    y, amax = groups_of(x)
    scale = amax / 448 + -1e-6
    return (y / scale).to(FP8), scale


def several_times(x):
    y, amax = groups_of(x)
    scale = torch.add(amax / 448, 1e-3, alpha=2)
    return (y / scale).to(FP8), scale


def in_bfloat16(x):
    y = silu_mul(x).unflatten(-1, (-1, 128))
    scale = (y.abs().amax(-1, keepdim=True) + AMAX_EPS).float() / 448
    return (y.float() / scale).to(FP8), scale


def on_the_quotient(x):
    y, amax = groups_of(x)
    scale = amax / 448
    return (y / scale + 1e-3).to(FP8), scale


def on_the_divisor_alone(x):
    y, amax = groups_of(x)
    scale = amax / 448
    return (y / (scale + SCALE_EPS)).to(FP8), scale


def another_on_what_is_stored(x):
    y, amax = groups_of(x)
    scale = amax / 448
    return (y / (scale + SCALE_EPS)).to(FP8), scale + 2e-3


def under_448_alone(x):
    y, amax = groups_of(x)
    return (y * (448 / (amax + AMAX_EPS))).to(FP8), amax / 448


def before_the_floor(x):
    y, amax = groups_of(x)
    scale = (amax + AMAX_EPS).clamp(min=0.5) / 448
    return (y / scale).to(FP8), scale


def behind_the_power_of_two(x):
    y, amax = groups_of(x)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448))) + SCALE_EPS
    return (y / scale).to(FP8), scale


def returned_twice(x):
    """Two tensors for the model, which may write to one of them."""
    y, amax = groups_of(x)
    return (y / (amax / 448 + SCALE_EPS)).to(FP8), amax / 448 + SCALE_EPS, amax / 448 + SCALE_EPS


NEAR_MISSES = {
    of_a_value: "what is added to the scale or the largest magnitude is not a constant",
    negative: "an epsilon of -1e-06",
    several_times: "not a constant",
    in_bfloat16: "an epsilon is added in torch.bfloat16",
    on_the_quotient: "neither divided by a scale",
    on_the_divisor_alone: "another scale than the one that values are divided by is returned",
    another_on_what_is_stored: "another scale than the one that values are divided by is returned",
    under_448_alone: "amax / 448 is stored nowhere",
    before_the_floor: "an epsilon is added before the floor",
    returned_twice: "the scale is computed and returned twice",
    behind_the_power_of_two: "an epsilon or a floor behind the power of two",
}


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_near_misses(fn):
    gm, outcome = fused(fn, x_of())
    assert not outcome.rewrites
    assert "silu_mul_quant" not in render(gm.graph)
    (event,) = outcome.declined
    assert NEAR_MISSES[fn] in event.detail
