"""find_experts where the products are float8 already: what `quantize` makes of a model's own."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from helpers import graph_on_gpu

from moe_compile._stacked import Float8Weight
from moe_compile.fp8 import quantize_weight
from moe_compile.ops import moe
from moe_compile.passes.choose_kernels import choose_kernels
from moe_compile.passes.find_experts import find_experts
from moe_compile.passes.fuse_activation_quant import fuse_activation_quant
from moe_compile.testing import capture, render, run_passes

E, H, FEATURES, T, K = 8, 256, 128, 6, 2


def inputs(tokens=T):
    """x, weights of E experts for each token, up [E, 2F, H] and down [E, H, F] with scales."""
    up, down = torch.randn(E, 2 * FEATURES, H) / 16, torch.randn(E, H, FEATURES) / 16
    x, scores = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, E).bfloat16()
    return x, scores, *quantize_weight(up), *quantize_weight(down)


def wrapped(q, scale, swapped=True):
    return Float8Weight(q, scale, swapped, torch.bfloat16, "w")


def grouped(x, scores, up, up_scale, down, down_scale, halves=False):
    weights, ids = scores.topk(K)
    expert, order = ids.reshape(-1).sort(stable=True)
    experts = torch.arange(E, device=ids.device)
    offsets = torch.searchsorted(expert, experts, right=True).int()
    rows = x[order // K]
    if halves:  # two products up, of weights that are one here
        w = wrapped(up[:, :FEATURES], up_scale[:, :1])
        gate, h = (torch._grouped_mm(rows, w, offs=offsets) for _ in range(2))
    else:
        gate, h = torch._grouped_mm(rows, wrapped(up, up_scale), offs=offsets).chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * h, wrapped(down, down_scale), offs=offsets)
    y = y * weights.reshape(-1)[order][:, None]
    return torch.zeros_like(x).index_add(0, order // K, y)


def batched(x, scores, up, up_scale, down, down_scale):
    weights, ids = scores.topk(K)
    expert, rows = ids.reshape(-1), x.repeat_interleave(K, dim=0)
    w = wrapped(up, up_scale, swapped=False)[expert]
    gate, h = torch.bmm(w, rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    w = wrapped(down, down_scale)[expert]
    y = torch.bmm((F.silu(gate) * h).unsqueeze(1), w).squeeze(1)
    return (y * weights.reshape(-1, 1)).view(-1, K, H).sum(1)


def run(gm, args):
    """The graph on the inputs of the function it was captured from, whatever their order in it."""
    by_kind = {(a.dtype, tuple(a.shape)): a for a in args}
    holes = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    return gm(*(by_kind[v.dtype, tuple(v.shape)] for v in holes))[0]


@pytest.mark.parametrize("form", [grouped, batched])
@pytest.mark.parametrize("tokens", [1, T])
def test_values(form, tokens):
    args = inputs(tokens)
    gm = capture(form, *args)
    before = run(gm, args).float()
    (outcome,) = run_passes(gm, find_experts)
    kind = form.__name__
    assert [e.detail for e in outcome.rewrites] == [
        f"{kind}, float8: 8 experts, top-2, 1 GEMM up, 1 down"
    ]
    assert outcome.declined == []
    after = run(gm, args).float()
    assert (after - before).norm() < 2**-7 * before.norm()  # the sum is rounded once
    text = render(gm.graph)
    (again,) = run_passes(gm, find_experts)
    assert (again.rewrites, again.declined, render(gm.graph)) == ([], [], text)


@pytest.mark.parametrize("form", [grouped, batched])
def test_graph(form):
    """Both forms come to one, with the rows of a token quantised once."""
    gm = capture(form, *inputs())
    run_passes(gm, find_experts, fuse_activation_quant)
    stages = [line for line in render(gm.graph).splitlines() if "moe_compile." in line]
    assert_expected_inline(
        "\n".join(stages),
        """\
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
quant_fp8 = moe_compile.quant_fp8(arg1_1)
grouped_mm_fp8: bf16[12, 256] = moe_compile.grouped_mm_fp8(getitem_5, getitem_6, permute, permute_1, getitem_3, getitem_2, 2)
silu_mul_quant = moe_compile.silu_mul_quant(grouped_mm_fp8, round_silu=True, round_product=True, offsets=getitem_3)
grouped_mm_fp8_1: bf16[12, 256] = moe_compile.grouped_mm_fp8(getitem_7, getitem_8, permute_2, permute_3, getitem_3)
combine: bf16[6, 256] = moe_compile.combine(grouped_mm_fp8_1, getitem_4, getitem, dtype=bf16)""",  # noqa: E501
    )


@pytest.mark.parametrize("form", [grouped, batched])
def test_unknown_number_of_tokens(form):
    x, _, *weights = inputs()
    torch._dynamo.mark_dynamic(x, 0)
    gm = capture(lambda x, *w: form(x, x[:, :E], *w), x, *weights)
    (outcome,) = run_passes(gm, find_experts)
    assert len(outcome.rewrites) == 1, outcome
    assert outcome.declined == []
    (sums,) = gm.graph.find_nodes(op="call_function", target=moe.combine.default)
    assert isinstance(sums.meta["val"].shape[0], torch.SymInt)


def test_two_products_up_share_the_quantised_rows():
    gm = capture(lambda *a: grouped(*a, halves=True), *inputs())
    (outcome,) = run_passes(gm, find_experts)
    assert outcome.rewrites[0].detail.endswith("2 GEMM up, 1 down")
    assert render(gm.graph).count("= moe_compile.quant_fp8(") == 2


@pytest.mark.parametrize("form", [grouped, batched])
def test_few_tokens_on_a_gpu(form):
    """One op for the layer, where hardly two tokens share an expert."""
    gm = capture(form, *inputs(1))
    run_passes(gm, find_experts, fuse_activation_quant)
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    on_gpu = graph_on_gpu(lambda *a: gm(*a)[0], *values)
    (outcome,) = run_passes(on_gpu, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == ["experts_fp8: 1 tokens in one op"]


def near_miss(name):
    """A batched layer of which one thing is otherwise."""

    def layer(x, scores, up, up_scale, down, down_scale):
        weights, ids = scores.topk(K)
        expert, rows = ids.reshape(-1), x.repeat_interleave(K, dim=0)
        R = rows.shape[0]
        ends = torch.arange(1, R + 1, dtype=torch.int32)
        others = expert.flip(0)

        def product(x, w, scale, last=False):
            mine = name if last else ""
            q, q_scale = moe.quant_fp8(x)
            if mine == "other rows' scales":
                q_scale = moe.quant_fp8(x.flip(0))[1]
            scale = scale[others if mine == "scales of other experts" else expert]
            at = torch.zeros_like(ends) + R if mine == "all rows to one" else ends
            bias = torch.ones(R, w.shape[1]).bfloat16() if mine == "a bias of its own" else None
            y = moe.grouped_mm_fp8(q, q_scale, w[expert].mT, scale.mT, at, None, 1, bias)
            return (y, q) if last else y

        gate, h = product(rows, up, up_scale).chunk(2, -1)
        y, q = product(F.silu(gate) * h, down, down_scale, last=True)
        out = (y * weights.reshape(-1, 1)).view(-1, K, H).sum(1)
        return (out, q.float()) if name == "rows read by others" else out

    return layer


NEAR_MISSES = [
    "other rows' scales",
    "scales of other experts",
    "all rows to one",
    "a bias of its own",
    "rows read by others",
]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    gm = capture(near_miss(name), *inputs())
    before = render(gm.graph)
    (outcome,) = run_passes(gm, find_experts)
    assert outcome.rewrites == []
    assert render(gm.graph) == before


def test_the_near_misses_are_near():
    (outcome,) = run_passes(capture(near_miss(""), *inputs()), find_experts)
    assert len(outcome.rewrites) == 1
