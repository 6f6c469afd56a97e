"""Columns filled up to a group and cut off again are the op's short last group."""

import pytest
import torch
import torch.nn.functional as F
from test_fuse_activation_quant import FP8, fused, quant, silu_mul
from test_quant_scale import assert_bitwise, fused_and_before

from moe_compile.ops import moe
from moe_compile.passes.fuse_activation_quant import fuse_activation_quant
from moe_compile.testing import render, run_passes

I = 200  # noqa: E741


def x_of(rows=6):
    return (torch.randn(rows, 2 * I) * 3).bfloat16()


def as_deepgemm(x):
    y = silu_mul(x)
    rows, columns = y.shape
    padding = -columns % 128
    y = F.pad(y, (0, padding), value=0).view(rows, -1, 128)
    amax = y.abs().float().amax(dim=2).view(rows, -1).clamp(1e-4)
    q = (y * (448.0 / amax.unsqueeze(2))).to(FP8).view(rows, columns + padding)
    return q[:, :columns].contiguous(), (amax / 448.0).view(rows, -1)


def in_groups_of_64(x):
    q, scale = quant(F.pad(silu_mul(x).float(), (0, 56)), 64)
    return q[..., :I], scale


def into_zeros(x):
    padded = torch.zeros(x.shape[0], 256, dtype=x.dtype, device=x.device)
    padded[:, :I] = silu_mul(x)
    q, scale = quant(padded)
    return q[:, :I], scale


def behind_zeros_in_float32(x):
    y = silu_mul(x)
    q, scale = quant(torch.cat([y, torch.zeros(x.shape[0], 56, device=x.device)], -1))
    return q.narrow(1, 0, I), scale


def cut_before_the_cast(x):
    y = F.pad(silu_mul(x), (0, 56)).view(x.shape[0], -1, 128).float()
    scale = y.abs().amax(-1, keepdim=True) / 448 + 1e-3
    q = (y / scale).view(x.shape[0], -1)[:, :I].clamp(-448, 448)
    return q.to(FP8), scale.squeeze(-1)


def of_three_dims(x):
    q, scale = quant(F.pad(silu_mul(x.view(2, -1, 2 * I)), (0, 56)))
    return q[..., :I].flatten(0, 1), scale


SPELLINGS = {
    as_deepgemm: "quant_by_reciprocal=True",
    in_groups_of_64: "group=64",
    into_zeros: "round_product=True",
    behind_zeros_in_float32: "round_product=True",
    cut_before_the_cast: "scale_eps=0.001",
    of_three_dims: "round_product=True",
}


@pytest.mark.parametrize(
    ("fn", "rows"),
    [
        *((fn, "static") for fn in SPELLINGS),
        *((fn, "dynamic") for fn in (as_deepgemm, into_zeros, behind_zeros_in_float32)),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_spellings(fn, rows):
    x = x_of()
    if rows == "dynamic":
        torch._dynamo.mark_dynamic(x, 0)
    gm, outcome, before = fused_and_before(fn, x)
    inputs = [6, x] if rows == "dynamic" else [x]
    (event,) = outcome.rewrites
    assert not outcome.declined
    assert SPELLINGS[fn] in event.detail
    assert event.detail.endswith("200 columns")
    text = render(gm.graph)
    for gone in "constant_pad", "slice", "cat", "clone", "amax(":
        assert gone not in text
    (q, scale), (q_want, scale_want) = gm(*inputs), before(*inputs)
    assert scale.shape[-1] == -(-I // (64 if fn is in_groups_of_64 else 128))
    if fn is as_deepgemm:  # the op multiplies by the inverse of the scale: another rounding
        assert ((q.float() - q_want.float()).abs() <= q_want.float().abs() / 8).all()
        q = q_want
    assert_bitwise((q, scale), (q_want, scale_want))
    assert q.stride() == q_want.stride()  # which the model may have looked at
    (outcome,) = run_passes(gm, fuse_activation_quant)  # twice is once
    assert not outcome.rewrites
    assert render(gm.graph) == text


def test_between_grouped_gemms():
    """The op's short last group is what the second product reads."""

    def fn(x, w1, s1, offsets, w2, s2):
        h = moe.grouped_mm_fp8(*moe.quant_fp8(x), w1, s1, offsets)
        return moe.grouped_mm_fp8(*into_zeros(h), w2, s2, offsets)

    def weight(G, H):
        w = torch.randn(2, G, H).to(FP8).transpose(1, 2)
        return w, torch.rand(2, -(-G // 128), -(-H // 128)).transpose(1, 2)

    offsets = torch.tensor([2, 6], dtype=torch.int32)
    given = [torch.randn(6, 128).bfloat16(), *weight(2 * I, 128), offsets, *weight(128, I)]
    gm, outcome, before = fused_and_before(fn, *given)
    assert len(outcome.rewrites) == 1
    assert "slice" not in render(gm.graph)
    assert "pad_rows" not in render(gm.graph)  # our ops do not mind where rows lie
    assert_bitwise(gm(*given), before(*given))


def padded(x, *amounts, cut=slice(None, I), **how):
    q, scale = quant(F.pad(silu_mul(x), amounts, **how))
    return q[:, cut], scale


def kept(x):
    return quant(F.pad(silu_mul(x), (0, 56)))


def cut_and_kept(x):
    q, scale = kept(x)
    return q[:, :I], q.float().sum(), scale


def other_rows(x):
    q, scale = quant(F.pad(silu_mul(x).view(-1, 2 * I), (0, 112)))
    return q[:, : 2 * I], scale


def into_zeros_from_the_right(x):
    zeros = torch.zeros(x.shape[0], 256, dtype=x.dtype)
    zeros[:, 56:] = silu_mul(x)
    q, scale = quant(zeros)
    return q[:, :I], scale


ELSEWHERE = "padded elsewhere than behind the last column"
NOT_THE_PADDING = "what is cut off is not just the padding"
NEAR_MISSES = {
    "with ones": (lambda x: padded(x, 0, 56, value=1.0), "padded with 1.0, not with zeros"),
    "on the left": (lambda x: padded(x, 56, 0, cut=slice(56, None)), ELSEWHERE),
    "on both sides": (lambda x: padded(x, 28, 28, cut=slice(28, 228)), ELSEWHERE),
    "rows, too": (lambda x: padded(x, 0, 56, 0, 2), ELSEWHERE),
    "zeros on the left": (into_zeros_from_the_right, ELSEWHERE),
    "a group too many": (lambda x: padded(x, 0, 184), "200 columns are padded to 384, not to"),
    "cut too late": (lambda x: padded(x, 0, 56, cut=slice(None, 208)), NOT_THE_PADDING),
    "cut too early": (lambda x: padded(x, 0, 56, cut=slice(None, 192)), NOT_THE_PADDING),
    "cut on the left": (lambda x: padded(x, 0, 56, cut=slice(56, None)), NOT_THE_PADDING),
    "every second": (lambda x: padded(x, 0, 56, cut=slice(None, None, 2)), NOT_THE_PADDING),
    "not cut": (kept, "columns of the padding are read, too"),
    "cut and kept": (cut_and_kept, "columns of the padding are read, too"),
    "other rows": (other_rows, "the rows that are padded are not those of the activation"),
    "not padded": (lambda x: quant(silu_mul(x), 100), "groups of 100, not of 64 or 128"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    fn, reason = NEAR_MISSES[name]
    gm, outcome = fused(fn, x_of())
    assert not outcome.rewrites
    assert "silu_mul_quant" not in render(gm.graph)
    (event,) = outcome.declined
    assert reason in event.detail
