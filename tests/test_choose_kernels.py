import pytest
import torch
from float8 import gemm_inputs
from helpers import graph_on_gpu

from moe_compile.ops import moe
from moe_compile.passes.choose_kernels import MOST_TOKENS, choose_kernels
from moe_compile.testing import assert_documented, capture, render, run_passes

E, H, F, K = 4, 16, 12, 2


def layer(x, ids, weights, w1, w2, activate=moe.silu_mul, **more):
    rows, offsets, position = moe.sort_tokens(ids, E)
    g = moe.grouped_mm(x, w1, offsets, rows, K)
    y = moe.grouped_mm(activate(g), w2, offsets)
    return moe.combine(y, position, weights, **more)


def inputs(tokens, dtype=torch.float32):
    ids = torch.rand(tokens, E).topk(K).indices
    w1, w2 = torch.randn(E, H, 2 * F).to(dtype), torch.randn(E, F, H).to(dtype)
    return torch.randn(tokens, H).to(dtype), ids, torch.rand(tokens, K), w1, w2


def run(gm, args):
    """The graph on the inputs of the function it was captured from, whatever their order in it."""
    by_kind = {(a.dtype, tuple(a.shape)): a for a in args}
    holes = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    return gm(*(by_kind[v.dtype, tuple(v.shape)] for v in holes))[0]


def test_docstring():
    assert_documented(choose_kernels, capture(layer, *inputs(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, MOST_TOKENS])
def test_same_values_and_twice_is_once(tokens, dtype):
    args = inputs(tokens, dtype)
    gm = capture(layer, *args)
    before = run(gm, args)
    (outcome,) = run_passes(gm, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == [f"experts: {tokens} tokens in one op"]
    after = run(gm, args)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (after.float() - before.float()).abs().max() <= tolerance * before.abs().max()
    assert run_passes(gm, choose_kernels)[0].rewrites == []


def test_attributes_and_biases_go_along():
    def gpt_oss(x, ids, weights, w1, w2, b1, b2):
        rows, offsets, position = moe.sort_tokens(ids, E)
        g = moe.grouped_mm(x, w1, offsets, rows, K, b1)
        h = moe.silu_mul(g, True, 1.702, 7.0, 1.0)
        y = moe.grouped_mm(h, w2, offsets, None, 1, b2)
        return moe.combine(y, position, weights, dtype=torch.bfloat16)

    args = (*inputs(3), torch.randn(E, 2 * F), torch.randn(E, H))
    gm = capture(gpt_oss, *args)
    before = run(gm, args)
    assert len(run_passes(gm, choose_kernels)[0].rewrites) == 1
    last = render(gm.graph).splitlines()[-2]
    attributes = "interleaved=True, alpha=1.702, limit=7.0, up_shift=1.0, dtype=bf16"
    assert attributes in last
    torch.testing.assert_close(run(gm, args), before, rtol=2e-2, atol=2e-2)


def test_many_tokens_or_unknown_many_are_not_looked_at():
    unknown = capture(layer, *inputs(5), dynamic=True)
    for gm in (capture(layer, *inputs(MOST_TOKENS + 1)), unknown):
        before = render(gm.graph)
        (outcome,) = run_passes(gm, choose_kernels)
        assert (outcome.rewrites, outcome.declined) == ([], [])
        assert render(gm.graph) == before


def gelu(x, *args):
    return layer(x, *args, activate=moe.gelu_mul)


def other_sort(x, ids, weights, w1, w2):
    rows, offsets, _ = moe.sort_tokens(ids, E)
    _, _, position = moe.sort_tokens(ids.flip(0), E)
    y = moe.grouped_mm(moe.silu_mul(moe.grouped_mm(x, w1, offsets, rows, K)), w2, offsets)
    return moe.combine(y, position, weights)


def read_again(x, ids, weights, w1, w2):
    rows, offsets, position = moe.sort_tokens(ids, E)
    h = moe.silu_mul(moe.grouped_mm(x, w1, offsets, rows, K))
    return moe.combine(moe.grouped_mm(h, w2, offsets), position, weights), h


def scaled(x, ids, weights, w1, w2):
    rows, offsets, position = moe.sort_tokens(ids, E)
    h = moe.silu_mul(moe.grouped_mm(x, w1, offsets, rows, K))
    return moe.combine(moe.grouped_mm(h, w2, offsets) * 2, position, weights)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (gelu, "the activation is not silu_mul, read here alone"),
        (other_sort, "the GEMMs are not over the rows of one sort"),
        (read_again, "the activation is not silu_mul, read here alone"),
        (scaled, "the rows combined are not those of a GEMM alone"),
    ],
)
def test_left_alone(fn, reason):
    gm = capture(fn, *inputs(3))
    before = render(gm.graph)
    (outcome,) = run_passes(gm, choose_kernels)
    assert outcome.rewrites == []
    assert [e.detail for e in outcome.declined] == [reason]
    assert render(gm.graph) == before


def on_gpu(tokens, num_experts, along_h=True):
    x, ids, weights, *_ = inputs(tokens, torch.bfloat16)
    w1, w2 = torch.randn(num_experts, 2 * F, H).mT, torch.randn(num_experts, H, F).mT
    w = [(w if along_h else w.contiguous()).bfloat16() for w in (w1, w2)]

    def fn(x, ids, weights, w1, w2):
        rows, offsets, position = moe.sort_tokens(ids, num_experts)
        g = moe.grouped_mm(x, w1, offsets, rows, K)
        y = moe.grouped_mm(moe.silu_mul(g), w2, offsets)
        return moe.combine(y, position, weights)

    return graph_on_gpu(fn, x, ids, weights, *w)


@pytest.mark.parametrize("along_h", [True, False])
def test_few_tokens_on_a_gpu(along_h):
    gm = on_gpu(2, 16, along_h)
    (outcome,) = run_passes(gm, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == ["experts: 2 tokens in one op"]
    assert render(gm.graph).splitlines()[-2:] == [
        "experts: bf16[2, 16] = moe_compile.experts(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1)",
        "return [experts]",
    ]
    assert run_passes(gm, choose_kernels)[0].rewrites == []


@pytest.mark.parametrize("along_h", [True, False])
def test_tokens_that_share_experts_on_a_gpu(along_h):
    gm = on_gpu(2, 15, along_h)
    before = render(gm.graph)
    (outcome,) = run_passes(gm, choose_kernels)
    assert (outcome.rewrites, outcome.declined) == ([], [])
    assert render(gm.graph) == before


def fp8_on_gpu(tokens, num_experts, **how):
    K, H, F = 2, 256, 128
    *inputs, w1, w1_scale, _ = gemm_inputs([tokens] + [0] * (num_experts - 1), 0, H, 2 * F, "cpu")
    *_, w2, w2_scale, _ = gemm_inputs([0] * num_experts, 0, F, H, "cpu")
    ids = torch.zeros(tokens, K, dtype=torch.long)

    def fn(x, x_scale, ids, weights, w1, w1_scale, w2, w2_scale):
        rows, offsets, position = moe.sort_tokens(ids, num_experts)
        h = moe.grouped_mm_fp8(x, x_scale, w1, w1_scale, offsets, rows, K)
        kinds = {"round_silu": True, "round_product": True, "offsets": offsets, **how}
        q, scale = moe.silu_mul_quant(h, **kinds)
        return moe.combine(moe.grouped_mm_fp8(q, scale, w2, w2_scale, offsets), position, weights)

    return graph_on_gpu(fn, *inputs, ids, torch.rand(tokens, K), w1, w1_scale, w2, w2_scale)


def test_few_tokens_in_float8():
    gm = fp8_on_gpu(2, 16, limit=7.0)
    (outcome,) = run_passes(gm, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == ["experts_fp8: 2 tokens in one op"]
    call = "experts_fp8(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, arg6_1, arg7_1,"
    assert render(gm.graph).splitlines()[-2:] == [
        f"experts_fp8: bf16[2, 256] = moe_compile.{call} limit=7.0, round_silu=True)",
        "return [experts_fp8]",
    ]
    assert run_passes(gm, choose_kernels)[0].rewrites == []


def test_inputs_of_the_graph_are_declined():
    """What our ops are given may come from anywhere: `q.args[0]` of an input was an IndexError."""

    def fn(y, position, weights):
        return moe.combine(y, position, weights)

    def gemm(x, w, offsets, position, weights):
        return moe.combine(moe.grouped_mm(moe.silu_mul(x), w, offsets), position, weights)

    def stages(x, w1, w2, offsets, rows, position, weights):
        h = moe.silu_mul(moe.grouped_mm(x, w1, offsets, rows, 2))
        return moe.combine(moe.grouped_mm(h, w2, offsets), position, weights)

    def fp8(q, scale, w, w_scale, offsets, position, weights):
        y = moe.grouped_mm_fp8(q, scale, w, w_scale, offsets)
        return moe.combine(y, position, weights)

    position, weights = torch.zeros(2, 2, dtype=torch.int32), torch.rand(2, 2)
    offsets, rows = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    w1, w2 = torch.randn(4, 16, 24), torch.randn(4, 12, 16)
    given = {
        fn: (torch.randn(4, 16), position, weights),
        gemm: (torch.randn(4, 24), w2, offsets, position, weights),
        stages: (torch.randn(2, 16), w1, w2, offsets, rows, position, weights),
        fp8: (*gemm_inputs([4, 0], 0, 128, 128, "cpu"), position, weights),
    }
    for layer_of_inputs, args in given.items():
        (outcome,) = run_passes(graph_on_gpu(layer_of_inputs, *args), choose_kernels)
        assert not outcome.rewrites
        assert len(outcome.declined) == 1


@pytest.mark.parametrize(
    "how", [{"round_product": False}, {"scale_by_reciprocal": True}, {"round_sigmoid": True}]
)
def test_what_float8_in_one_op_does_not_know(how):
    (outcome,) = run_passes(fp8_on_gpu(2, 16, **how), choose_kernels)
    assert [e.detail for e in outcome.declined] == [
        "an activation or quantisation that experts_fp8 does not know"
    ]


def test_tokens_that_share_experts_in_float8():
    (outcome,) = run_passes(fp8_on_gpu(2, 15), choose_kernels)
    assert (outcome.rewrites, outcome.declined) == ([], [])


def unquantised_on_gpu(quantise):
    """Two tokens as they come to transformers' FP8Experts, and how x is quantised."""
    *_, w1, w1_scale, _ = gemm_inputs([0] * 16, 0, 256, 256, "cpu")
    *_, w2, w2_scale, _ = gemm_inputs([0] * 16, 0, 128, 256, "cpu")

    def fn(x, ids, weights, w1, w1_scale, w2, w2_scale):
        rows, offsets, position = moe.sort_tokens(ids, 16)
        h = moe.grouped_mm_fp8(*quantise(x), w1, w1_scale, offsets, rows, 2)
        q, scale = moe.silu_mul_quant(h, round_product=True, offsets=offsets)
        return moe.combine(moe.grouped_mm_fp8(q, scale, w2, w2_scale, offsets), position, weights)

    ids, weights = torch.zeros(2, 2, dtype=torch.long), torch.rand(2, 2)
    x = torch.randn(2, 256).bfloat16()
    return graph_on_gpu(fn, x, ids, weights, w1, w1_scale, w2, w2_scale)


def test_float8_in_one_op_quantises_x():
    gm = unquantised_on_gpu(moe.quant_fp8)
    (outcome,) = run_passes(gm, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == ["experts_fp8: 2 tokens in one op"]
    call = "experts_fp8(arg0_1, None, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, arg6_1)"
    assert render(gm.graph).splitlines()[-2:] == [
        f"experts_fp8: bf16[2, 256] = moe_compile.{call}",
        "return [experts_fp8]",
    ]
    assert "quant_fp8 =" not in render(gm.graph)
    assert run_passes(gm, choose_kernels)[0].rewrites == []


QUANTISED_OTHERWISE = {
    "powers of two": lambda x: moe.quant_fp8(x, power_of_two=True),
    "another floor": lambda x: moe.quant_fp8(x, amax_floor=1e-12),
    "another rounding": lambda x: moe.quant_fp8(x, quant_by_reciprocal=True),
    "of two": lambda x: (moe.quant_fp8(x)[0], moe.quant_fp8(x + 1)[1]),
}


@pytest.mark.parametrize("case", QUANTISED_OTHERWISE)
def test_what_is_quantised_otherwise_stays_so(case):
    gm = unquantised_on_gpu(QUANTISED_OTHERWISE[case])
    (outcome,) = run_passes(gm, choose_kernels)
    assert [e.detail for e in outcome.rewrites] == ["experts_fp8: 2 tokens in one op"]
    last = render(gm.graph).splitlines()[-2]
    assert "quant_fp8 =" in render(gm.graph)
    assert "None" not in last
