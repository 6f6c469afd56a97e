"""Experts in many spellings: what the pass makes of each, and what it must leave alone."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import assert_close
from models import (
    Batched,
    BatchedClamped,
    Decomposed,
    E,
    GptFast,
    Grouped,
    GroupedMasked,
    H,
    Layer,
    Megatron,
    Own,
    Titan,
)

from moe_compile.passes.find_experts import find_experts
from moe_compile.testing import assert_documented, capture, capture_all, render, run_passes

T = 6


def inputs(dtype=torch.bfloat16, tokens=T):
    return torch.randn(tokens, H, dtype=dtype), torch.rand(tokens, E).to(dtype)


def graph_inputs(fn, *args, dynamic=None):
    """The tensors that the placeholders of `capture(fn, *args)` stand for."""
    seen = []

    def backend(gm, example_inputs):
        seen.extend(example_inputs)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    return [x if isinstance(x, torch.Tensor) else int(x) for x in seen]


def check(experts, x, ids, weights, fn=None, args=None, rewrites=1):
    """The rewritten graph errs at most twice as much as the graph it was."""
    fn, args = (fn, args) if fn else (experts, (x, ids, weights))
    gm = capture(fn, *args)
    reals = graph_inputs(fn, *args)
    (before,) = gm(*reals)
    (outcome,) = run_passes(gm, find_experts)
    assert len(outcome.rewrites) == rewrites, outcome
    (after,) = gm(*reals)
    exact = experts.exact(x, ids, weights)
    assert_close(after, lambda x: exact if x.dtype == torch.float64 else before, x)
    return gm, outcome


FORMS = [
    (Grouped, {}),
    (Grouped, {"bias": True, "interleaved": True, "transposed": True}),
    (Grouped, {"gated": False}),
    (GroupedMasked, {}),
    (GroupedMasked, {"bias": True}),
    (Batched, {}),
    (Batched, {"bias": True, "interleaved": True, "transposed": True}),
    (Batched, {"gated": False}),
    (BatchedClamped, {"bias": True}),
    (Decomposed, {}),
    (Titan, {}),
    (GptFast, {}),
    (Own, {}),
]


FEW = [(1, 2), (T, 1), (1, 1)]  # tokens and experts of each


@pytest.mark.parametrize(
    ("form", "options", "tokens", "top_k"),
    [(form, options, T, 2) for form, options in FORMS]
    + [(form, {"bias": True}, *few) for form in (GroupedMasked, Batched) for few in FEW]
    + [(form, {}, *few) for form in (Titan, Decomposed) for few in FEW]
    + [(form, {}, 1, 2) for form in (GptFast, Own)],
)
def test_values(form, options, tokens, top_k):
    layer = Layer(form(**options), top_k)
    x, scores = inputs(tokens=tokens)
    weights, ids = scores.topk(top_k, dim=-1)
    check(layer.experts, x, ids, weights, layer, (x, scores))


def test_docstring():
    experts = Own(gated=False)
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    assert_documented(find_experts, capture(experts, x, ids, weights))


def rewritten(experts, x, *args):
    """The graph of a layer after the pass."""
    gm = capture(experts, x, *args)
    run_passes(gm, find_experts)
    return render(gm.graph)


def given(dtype=torch.bfloat16):
    x, scores = inputs(dtype)
    weights, ids = scores.topk(2, dim=-1)
    return x, ids, weights


def test_graph_of_grouped():
    assert_expected_inline(
        rewritten(Grouped(), *given()),
        """\
arg0_1: i64[6, 2]
arg1_1: bf16[6, 16]
arg2_1: bf16[4, 64, 16]
arg3_1: bf16[4, 16, 32]
arg4_1: bf16[6, 2]
permute: bf16[4, 16, 64] = aten.permute(arg2_1, [0, 2, 1])
sort_tokens = moe_compile.sort_tokens(arg0_1, 4)
getitem: i32[12] = sort_tokens[0]
getitem_1: i32[4] = sort_tokens[1]
getitem_2: i32[6, 2] = sort_tokens[2]
grouped_mm: bf16[12, 64] = moe_compile.grouped_mm(arg1_1, permute, getitem_1, getitem, 2)
split = aten.split.Tensor(grouped_mm, 32, -1)
getitem_3: bf16[12, 32] = split[0]
getitem_4: bf16[12, 32] = split[1]
convert_element_type: f32[12, 32] = prims.convert_element_type(getitem_3, f32)
neg: f32[12, 32] = aten.neg(convert_element_type)
exp: f32[12, 32] = aten.exp(neg)
add: f32[12, 32] = aten.add.Tensor(exp, 1)
div: f32[12, 32] = aten.div.Tensor(convert_element_type, add)
convert_element_type_1: bf16[12, 32] = prims.convert_element_type(div, bf16)
mul: bf16[12, 32] = aten.mul.Tensor(convert_element_type_1, getitem_4)
permute_1: bf16[4, 32, 16] = aten.permute(arg3_1, [0, 2, 1])
grouped_mm_1: bf16[12, 16] = moe_compile.grouped_mm(mul, permute_1, getitem_1)
combine: bf16[6, 16] = moe_compile.combine(grouped_mm_1, getitem_2, arg4_1, dtype=bf16)
return [combine]""",
    )


def test_graph_of_grouped_masked_with_bias():
    assert_expected_inline(
        rewritten(GroupedMasked(bias=True, gated=False), *given()),
        """\
arg0_1: i64[6, 2]
arg1_1: bf16[6, 16]
arg2_1: bf16[4, 32, 16]
arg3_1: bf16[4, 32]
arg4_1: bf16[4, 16, 32]
arg5_1: bf16[4, 16]
arg6_1: bf16[6, 2]
permute: bf16[4, 16, 32] = aten.permute(arg2_1, [0, 2, 1])
sort_tokens = moe_compile.sort_tokens(arg0_1, 4)
getitem: i32[12] = sort_tokens[0]
getitem_1: i32[4] = sort_tokens[1]
getitem_2: i32[6, 2] = sort_tokens[2]
grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg1_1, permute, getitem_1, getitem, 2, arg3_1)
relu: bf16[12, 32] = aten.relu(grouped_mm)
pow: bf16[12, 32] = aten.pow.Tensor_Scalar(relu, 2)
permute_1: bf16[4, 32, 16] = aten.permute(arg4_1, [0, 2, 1])
grouped_mm_1: bf16[12, 16] = moe_compile.grouped_mm(pow, permute_1, getitem_1, None, 1, arg5_1)
combine: bf16[6, 16] = moe_compile.combine(grouped_mm_1, getitem_2, arg6_1, dtype=bf16)
return [combine]""",
    )


def test_graph_of_batched_with_bias_interleaved_transposed():
    options = {"bias": True, "interleaved": True, "transposed": True}
    assert_expected_inline(
        rewritten(Batched(**options).float(), *given(torch.float32)),
        """\
arg0_1: i64[6, 2]
arg1_1: f32[6, 16]
arg2_1: f32[4, 16, 64]
arg3_1: f32[4, 64]
arg4_1: f32[4, 32, 16]
arg5_1: f32[4, 16]
arg6_1: f32[6, 2]
lt: b8[6, 2] = aten.lt.Scalar(arg0_1, 0)
add: i64[6, 2] = aten.add.Tensor(arg0_1, 4)
where: i64[6, 2] = aten.where.self(lt, add, arg0_1)
sort_tokens = moe_compile.sort_tokens(where, 4)
getitem: i32[12] = sort_tokens[0]
getitem_1: i32[4] = sort_tokens[1]
getitem_2: i32[6, 2] = sort_tokens[2]
grouped_mm: f32[12, 64] = moe_compile.grouped_mm(arg1_1, arg2_1, getitem_1, getitem, 2, arg3_1)
slice: f32[12, 32] = aten.slice.Tensor(grouped_mm, 1, 0, 9223372036854775807, 2)
clamp_max: f32[12, 32] = aten.clamp_max(slice, 7.0)
neg: f32[12, 32] = aten.neg(clamp_max)
exp: f32[12, 32] = aten.exp(neg)
add_1: f32[12, 32] = aten.add.Tensor(exp, 1)
div: f32[12, 32] = aten.div.Tensor(clamp_max, add_1)
slice_1: f32[12, 32] = aten.slice.Tensor(grouped_mm, 1, 1, 9223372036854775807, 2)
clamp_min: f32[12, 32] = aten.clamp_min(slice_1, -7.0)
clamp_max_1: f32[12, 32] = aten.clamp_max(clamp_min, 7.0)
add_2: f32[12, 32] = aten.add.Tensor(clamp_max_1, 1)
mul: f32[12, 32] = aten.mul.Tensor(div, add_2)
grouped_mm_1: f32[12, 16] = moe_compile.grouped_mm(mul, arg4_1, getitem_1, None, 1, arg5_1)
combine: f32[6, 16] = moe_compile.combine(grouped_mm_1, getitem_2, arg6_1, dtype=f32)
return [combine]""",
    )


def test_graph_of_batched_behind_top_k():
    assert_expected_inline(
        rewritten(Layer(BatchedClamped(gated=False)), *inputs()),
        """\
arg0_1: bf16[6, 4]
arg1_1: bf16[6, 16]
arg2_1: bf16[4, 32, 16]
arg3_1: bf16[4, 16, 32]
topk = aten.topk(arg0_1, 2)
getitem: bf16[6, 2] = topk[0]
getitem_1: i64[6, 2] = topk[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 4)
getitem_2: i32[12] = sort_tokens[0]
getitem_3: i32[4] = sort_tokens[1]
getitem_4: i32[6, 2] = sort_tokens[2]
permute: bf16[4, 16, 32] = aten.permute(arg2_1, [0, 2, 1])
grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg1_1, permute, getitem_3, getitem_2, 2)
relu: bf16[12, 32] = aten.relu(grouped_mm)
pow: bf16[12, 32] = aten.pow.Tensor_Scalar(relu, 2)
permute_1: bf16[4, 32, 16] = aten.permute(arg3_1, [0, 2, 1])
grouped_mm_1: bf16[12, 16] = moe_compile.grouped_mm(pow, permute_1, getitem_3)
combine: bf16[6, 16] = moe_compile.combine(grouped_mm_1, getitem_4, getitem, dtype=bf16)
return [combine]""",
    )


def test_graph_of_titan():
    assert_expected_inline(
        rewritten(Layer(Titan()), *inputs()),
        """\
arg0_1: bf16[6, 4]
arg1_1: bf16[4, 64, 16]
arg2_1: bf16[4, 16, 32]
arg3_1: bf16[6, 16]
topk = aten.topk(arg0_1, 2)
getitem: bf16[6, 2] = topk[0]
getitem_1: i64[6, 2] = topk[1]
split = aten.split.Tensor(arg1_1, 32, 1)
getitem_2: bf16[4, 32, 16] = split[0]
getitem_3: bf16[4, 32, 16] = split[1]
permute: bf16[4, 16, 32] = aten.permute(getitem_2, [0, 2, 1])
sort_tokens = moe_compile.sort_tokens(getitem_1, 4)
getitem_4: i32[12] = sort_tokens[0]
getitem_5: i32[4] = sort_tokens[1]
getitem_6: i32[6, 2] = sort_tokens[2]
grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg3_1, permute, getitem_5, getitem_4, 2)
convert_element_type: f32[12, 32] = prims.convert_element_type(grouped_mm, f32)
neg: f32[12, 32] = aten.neg(convert_element_type)
exp: f32[12, 32] = aten.exp(neg)
add: f32[12, 32] = aten.add.Tensor(exp, 1)
div: f32[12, 32] = aten.div.Tensor(convert_element_type, add)
convert_element_type_1: bf16[12, 32] = prims.convert_element_type(div, bf16)
permute_1: bf16[4, 16, 32] = aten.permute(getitem_3, [0, 2, 1])
grouped_mm_1: bf16[12, 32] = moe_compile.grouped_mm(arg3_1, permute_1, getitem_5, getitem_4, 2)
mul: bf16[12, 32] = aten.mul.Tensor(convert_element_type_1, grouped_mm_1)
permute_2: bf16[4, 32, 16] = aten.permute(arg2_1, [0, 2, 1])
grouped_mm_2: bf16[12, 16] = moe_compile.grouped_mm(mul, permute_2, getitem_5)
combine: bf16[6, 16] = moe_compile.combine(grouped_mm_2, getitem_6, getitem, dtype=bf16)
return [combine]""",
    )


def test_graph_of_gpt_fast():
    assert_expected_inline(
        rewritten(GptFast(), *given()),
        """\
arg0_1: bf16[4, 64, 16]
arg1_1: bf16[4, 16, 32]
arg2_1: i64[6, 2]
arg3_1: bf16[6, 16]
arg4_1: bf16[6, 2]
split = aten.split.Tensor(arg0_1, 32, 1)
getitem: bf16[4, 32, 16] = split[0]
getitem_1: bf16[4, 32, 16] = split[1]
lt: b8[6, 2] = aten.lt.Scalar(arg2_1, 0)
add: i64[6, 2] = aten.add.Tensor(arg2_1, 4)
where: i64[6, 2] = aten.where.self(lt, add, arg2_1)
sort_tokens = moe_compile.sort_tokens(where, 4)
getitem_2: i32[12] = sort_tokens[0]
getitem_3: i32[4] = sort_tokens[1]
getitem_4: i32[6, 2] = sort_tokens[2]
permute: bf16[4, 16, 32] = aten.permute(getitem, [0, 2, 1])
grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg3_1, permute, getitem_3, getitem_2, 2)
reshape: bf16[6, 2, 32] = aten.reshape(grouped_mm, [6, 2, 32])
convert_element_type: f32[6, 2, 32] = prims.convert_element_type(reshape, f32)
neg: f32[6, 2, 32] = aten.neg(convert_element_type)
exp: f32[6, 2, 32] = aten.exp(neg)
add_1: f32[6, 2, 32] = aten.add.Tensor(exp, 1)
div: f32[6, 2, 32] = aten.div.Tensor(convert_element_type, add_1)
convert_element_type_1: bf16[6, 2, 32] = prims.convert_element_type(div, bf16)
permute_1: bf16[4, 16, 32] = aten.permute(getitem_1, [0, 2, 1])
grouped_mm_1: bf16[12, 32] = moe_compile.grouped_mm(arg3_1, permute_1, getitem_3, getitem_2, 2)
reshape_1: bf16[6, 2, 32] = aten.reshape(grouped_mm_1, [6, 2, 32])
mul: bf16[6, 2, 32] = aten.mul.Tensor(convert_element_type_1, reshape_1)
reshape_2: bf16[12, 32] = aten.reshape(mul, [-1, 32])
permute_2: bf16[4, 32, 16] = aten.permute(arg1_1, [0, 2, 1])
grouped_mm_2: bf16[12, 16] = moe_compile.grouped_mm(reshape_2, permute_2, getitem_3)
combine: bf16[6, 16] = moe_compile.combine(grouped_mm_2, getitem_4, arg4_1, dtype=bf16)
reshape_3: bf16[6, 16, 1] = aten.reshape(combine, [6, 16, 1])
permute_3: bf16[6, 16, 1] = aten.permute(reshape_3, [0, 1, 2])
reshape_4: bf16[6, 16] = aten.reshape(permute_3, [6, 16])
return [reshape_4]""",
    )


def test_graph_of_megatron():
    assert_expected_inline(
        rewritten(Megatron(gated=False), *given()),
        """\
arg0_1: i64[6, 2]
arg1_1: bf16[6, 2]
arg2_1: bf16[6, 16]
arg3_1: bf16[4, 32, 16]
arg4_1: bf16[4, 16, 32]
full: b8[6, 4] = aten.full([6, 4], False, dtype=b8)
scatter: b8[6, 4] = aten.scatter.value(full, 1, arg0_1, True)
permute: b8[4, 6] = aten.permute(scatter, [1, 0])
clone: b8[4, 6] = aten.clone(permute)
reshape: b8[24] = aten.reshape(clone, [24])
sort = aten.sort.stable(reshape, stable=True, descending=True)
getitem: i64[24] = sort[1]
full_1: bf16[6, 16] = aten.full([6, 16], 0, dtype=bf16)
slice: i64[12] = aten.slice.Tensor(getitem, 0, 0, 12)
remainder: i64[12] = aten.remainder.Scalar(slice, 6)
unsqueeze: i64[12, 1] = aten.unsqueeze(remainder, 1)
expand: i64[12, 16] = aten.expand(unsqueeze, [-1, 16])
permute_1: bf16[4, 16, 32] = aten.permute(arg3_1, [0, 2, 1])
sum: i64[4] = aten.sum.dim_IntList(scatter, [0])
cumsum: i64[4] = aten.cumsum(sum, 0)
convert_element_type: i32[4] = prims.convert_element_type(cumsum, i32)
convert_element_type_1: i32[12] = prims.convert_element_type(remainder, i32)
grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg2_1, permute_1, convert_element_type, convert_element_type_1)
relu: bf16[12, 32] = aten.relu(grouped_mm)
pow: bf16[12, 32] = aten.pow.Tensor_Scalar(relu, 2)
permute_2: bf16[4, 32, 16] = aten.permute(arg4_1, [0, 2, 1])
grouped_mm_1: bf16[12, 16] = moe_compile.grouped_mm(pow, permute_2, convert_element_type)
full_2: bf16[6, 4] = aten.full([6, 4], 0, dtype=bf16)
scatter_1: bf16[6, 4] = aten.scatter.src(full_2, 1, arg0_1, arg1_1)
permute_3: bf16[4, 6] = aten.permute(scatter_1, [1, 0])
clone_1: bf16[4, 6] = aten.clone(permute_3)
reshape_1: bf16[24] = aten.reshape(clone_1, [24])
index: bf16[12] = aten.index.Tensor(reshape_1, [slice])
unsqueeze_1: bf16[12, 1] = aten.unsqueeze(index, -1)
mul: bf16[12, 16] = aten.mul.Tensor(grouped_mm_1, unsqueeze_1)
scatter_add: bf16[6, 16] = aten.scatter_add(full_1, 0, expand, mul)
return [scatter_add]""",  # noqa: E501
    )


def foreign(tokens=T):
    """Ids with the sentinel E among them, as expert parallelism gives, weighted by 0."""
    x, scores = inputs(tokens=tokens)
    weights, ids = scores.topk(2, dim=-1)
    ids[0, 0], ids[2, 1], ids[3] = E, E, E
    return x, ids, weights.masked_fill(ids == E, 0.0)


@pytest.mark.parametrize("options", [{}, {"bias": True}])
def test_foreign_ids_sorted(options):
    experts = GroupedMasked(**options)
    gm, _ = check(experts, *foreign())
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.where.self]


def test_foreign_ids_gathered():
    """The clamp stays: what it does to a foreign id is the model's meaning, whatever the weight."""
    gm, _ = check(BatchedClamped(), *foreign())
    assert "clamp_max" in render(gm.graph)


def test_clamp_of_top_k_goes():
    gm = capture(Layer(BatchedClamped(gated=False)), *inputs())
    run_passes(gm, find_experts)
    assert "clamp" not in render(gm.graph)


def test_negative_ids_count_from_the_end():
    experts = Batched()
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    gm = capture(experts, x, ids, weights)
    reals = [n - E if n.dtype == torch.int64 else n for n in graph_inputs(experts, x, ids, weights)]
    run_passes(gm, find_experts)
    (after,) = gm(*reals)
    exact, eager = experts.exact(x, ids, weights), experts(x, ids - E, weights)
    assert_close(after, lambda x: exact if x.dtype == torch.float64 else eager, x)


def test_base_is_added():
    layer, (x, scores), base = Layer(Titan()), inputs(), torch.randn(T, H, dtype=torch.bfloat16)
    gm = capture(layer, x, scores, base)
    reals = graph_inputs(layer, x, scores, base)
    (before,) = gm(*reals)
    run_passes(gm, find_experts)
    weights, ids = scores.topk(2, dim=-1)
    exact = layer.experts.exact(x, ids, weights) + base.double()
    assert_close(gm(*reals)[0], lambda x: exact if x.dtype == torch.float64 else before, x)


@pytest.mark.parametrize("form", [Grouped, Batched, Titan, GptFast, Own])
def test_dynamic_tokens(form):
    layer, x = Layer(form()), inputs()[0]

    def fn(x):
        return layer(x, x[:, :E])

    gm = capture(fn, x, dynamic=True)
    assert "s" in str(gm.graph.find_nodes(op="placeholder")[0].meta["val"])
    reals = graph_inputs(fn, x, dynamic=True)
    (before,) = gm(*reals)
    (outcome,) = run_passes(gm, find_experts)
    assert len(outcome.rewrites) == 1, outcome
    weights, ids = x[:, :E].topk(2, dim=-1)
    exact = layer.experts.exact(x, ids, weights)
    assert_close(gm(*reals)[0], lambda x: exact if x.dtype == torch.float64 else before, x)


def test_twice_is_once():
    gm = capture(Layer(Grouped()), *inputs())
    run_passes(gm, find_experts)
    once = render(gm.graph)
    (outcome,) = run_passes(gm, find_experts)
    assert (render(gm.graph), outcome.rewrites, outcome.declined) == (once, [], [])


def test_lone_gemms():
    """Megatron-Core sorts no ids: its GEMMs become ours, its order and its scatter stay."""
    layer = Layer(Megatron())
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    gm, outcome = check(layer.experts, x, ids, weights, layer, (x, scores), rewrites=0)
    assert len(outcome.declined) == 2
    assert all("the GEMM alone became grouped_mm" in event.detail for event in outcome.declined)
    assert render(gm.graph).count("moe_compile.grouped_mm(") == 2


def test_training_graph():
    """Rows saved for backward are read outside of the layer."""
    experts = Grouped().requires_grad_(True)
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    graphs = capture_all(experts, x, ids, weights)
    (outcome,) = run_passes(graphs[0], find_experts)
    assert not outcome.rewrites
    assert "is also read by output" in outcome.declined[-1].detail


# Near misses: one step of a layer is another function, and the report says which.


def sorted_layer(
    x,
    ids,
    weights,
    up,
    down,
    activate=torch.relu,
    order=lambda ids: ids.sort(stable=True)[1],
    counted=lambda ids: ids,
    divisor=2,
    scored=lambda y, weights: y * weights,
    weights_by=lambda order: order,
    also=lambda h, y: (),
):
    """A plain layer in the sorted frame; each step can be replaced."""
    flat = ids.flatten()
    rows = order(flat)
    offsets = torch.histc(counted(flat).float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
    h = torch._grouped_mm(
        x[rows // divisor % x.shape[0]] if divisor != 2 else x[rows // 2], up, offs=offsets
    )
    y = torch._grouped_mm(activate(h), down, offs=offsets)
    y = scored(y, weights.flatten()[weights_by(rows)].unsqueeze(-1))
    out = y[rows.argsort()].view(-1, 2, H).sum(1)
    return out, *also(h, y)


def gathered_layer(
    x, ids, weights, up, down, activate=torch.relu, down_ids=lambda ids: ids, scale=None
):
    """A plain layer in the flat frame."""
    flat = ids.flatten()
    h = torch.bmm(x.repeat_interleave(2, 0).unsqueeze(1), up[flat])
    y = torch.bmm(activate(h), down[down_ids(flat)]).view(-1, 2, H)
    y = y * (weights.unsqueeze(-1) if scale is None else scale(x))
    return y.sum(1)


def run(fn, **steps):
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    up, down = torch.randn(E, H, 32).bfloat16(), torch.randn(E, 32, H).bfloat16()
    gm = capture(lambda *a: fn(*a, **steps), x, ids, weights, up, down)
    (outcome,) = run_passes(gm, find_experts)
    return gm, outcome


@pytest.mark.parametrize("fn", [sorted_layer, gathered_layer])
def test_plain_layers_match(fn):
    _, outcome = run(fn)
    assert len(outcome.rewrites) == 1, outcome
    assert not outcome.declined


NOT_COUNTS = "the offsets are not proved to be the running counts of the sorted ids"
NO_SUM = "no weighted sum over the experts of each token was found below"
NEAR_MISSES = {
    "softmax over rows": (
        sorted_layer,
        {"activate": lambda h: h.softmax(0)},
        "is also read by sum",
    ),
    "mean over rows": (
        sorted_layer,
        {"activate": lambda h: h - h.mean(0)},
        "is also read by mean",
    ),
    "rows flipped": (
        sorted_layer,
        {"activate": lambda h: h.flip(0)},
        "is not known to treat each row alone",
    ),
    "rows shifted": (
        sorted_layer,
        {"activate": lambda h: h.roll(1, 0)},
        "is not known to treat each row alone",
    ),
    "rows summed up": (sorted_layer, {"activate": lambda h: h.cumsum(0)}, "is not known to treat"),
    "rows halved": (
        sorted_layer,
        {"activate": lambda h: torch.cat([h, h])[: h.shape[0]]},
        "does not keep one row per token and expert",
    ),
    "rows numbered": (
        sorted_layer,
        {"activate": lambda h: h * torch.arange(h.shape[0]).unsqueeze(-1).bfloat16()},
        "is not known to treat each row alone",
    ),
    "dropout": (
        sorted_layer,
        {"activate": lambda h: torch.nn.functional.dropout(h)},
        "inductor_random",
    ),
    "rows read outside": (sorted_layer, {"also": lambda h, y: (h,)}, "is also read by output"),
    "product read outside": (sorted_layer, {"also": lambda h, y: (y,)}, "is also read by output"),
    "offsets of other ids": (sorted_layer, {"counted": lambda ids: ids + 1}, NOT_COUNTS),
    "descending": (sorted_layer, {"order": lambda ids: ids.sort(descending=True)[1]}, NO_SUM),
    "not sorted": (sorted_layer, {"order": lambda ids: torch.arange(ids.shape[0])}, NO_SUM),
    "another K": (sorted_layer, {"divisor": 3}, "the up GEMM's rows are not each token K times"),
    "weights in other order": (sorted_layer, {"weights_by": lambda order: order.flip(0)}, NO_SUM),
    "no weights": (sorted_layer, {"scored": lambda y, weights: y}, NO_SUM),
    "other ids for down": (
        gathered_layer,
        {"down_ids": lambda ids: ids.flip(0)},
        "the GEMMs gather weights by different ids",
    ),
    "other clamp for down": (
        gathered_layer,
        {"down_ids": lambda ids: ids.clamp(0, 1)},
        "the GEMMs gather weights by different ids",
    ),
    "a weight for each token": (
        gathered_layer,
        {"scale": lambda x: x[:, :1].unsqueeze(-1)},
        NO_SUM,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    fn, steps, reason = NEAR_MISSES[name]
    gm, outcome = run(fn, **steps)
    assert not outcome.rewrites
    assert "sort_tokens" not in render(gm.graph)
    assert len(outcome.declined) == 2
    assert any(reason in event.detail for event in outcome.declined), outcome.declined


def test_counts_of_ids_that_may_repeat():
    """True scattered at [t, e] counts a token's second row of one expert not at all."""
    x, scores = inputs()
    weights, ids = scores.topk(2, dim=-1)
    (outcome,) = run_passes(capture(Titan(), x, ids, weights), find_experts)
    assert not outcome.rewrites
    assert NOT_COUNTS in outcome.declined[0].detail
