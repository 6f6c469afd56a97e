"""Routers of many spellings, each against its own unrewritten graph."""

import importlib
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from packaging.version import parse
from torch import Tensor, fx, nn

from moe_compile.ops import moe
from moe_compile.passes._outcome import Outcome
from moe_compile.passes.find_experts import find_experts
from moe_compile.passes.find_routing import find_routing
from moe_compile.testing import assert_documented, capture, render, run_passes

T, E, K, P = 33, 8, 2, 4
INF = float("inf")


def experts(weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reads a router's results: the place of each pair among its expert's rows, and sums."""
    _, _, position = moe.sort_tokens(ids, E)
    return weights, ids, position


def renormalize(w: Tensor, eps: float = 0.0) -> Tensor:
    return w / (w.sum(-1, keepdim=True) + eps)


def best_two(choice: Tensor) -> Tensor:
    return choice.view(-1, P, E // P).topk(2, dim=-1).values.sum(-1)


def keep_groups(choice: Tensor, best: Tensor, fill: float, top: int = 2) -> Tensor:
    """As transformers writes it."""
    ids = torch.topk(best, top, dim=-1, sorted=False).indices
    mask = torch.zeros_like(best).scatter_(1, ids, 1)
    mask = mask.unsqueeze(-1).expand(-1, P, E // P).reshape(-1, E)
    return choice.masked_fill(~mask.bool(), fill)


# Matched: what is written, and what the report says.


def softmax_topk(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.softmax(-1, dtype=torch.float32).topk(K, dim=-1)
    return experts(renormalize(w).to(logits.dtype), ids)


def topk_softmax(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.topk(K, dim=-1)
    return experts(w.softmax(-1), ids)


def topk_sigmoid(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.topk(K, dim=-1)
    return experts(w.sigmoid(), ids)


def sigmoid_bias_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = keep_groups(choice, best_two(choice), -INF).topk(K, sorted=False).indices
    return experts(renormalize(scores.gather(1, ids), 1e-20) * 2.5, ids)


def groups_by_view(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As in DeepSeek's own code: the mask is of groups, and false where they are chosen."""
    scores = logits.float().sigmoid()
    choice = (scores + bias).view(-1, P, E // P)
    ids = choice.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    mask = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter_(1, ids, False)
    ids = choice.masked_fill(mask.unsqueeze(-1), -INF).flatten(1).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def max_groups_zero(logits: Tensor) -> tuple[Tensor, ...]:
    scores = logits.float().softmax(-1)
    best = scores.view(-1, P, E // P).max(dim=-1).values
    w, ids = keep_groups(scores, best, 0.0).topk(K, dim=-1)
    return experts(w * 16.0, ids)


def best_group(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Inductor makes a comparison of a scatter of one index."""
    scores = logits.float().sigmoid()
    choice = scores + bias
    ids = keep_groups(choice, best_two(choice), -INF, top=1).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def one_group(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """All groups are kept."""
    scores = logits.float().sigmoid()
    choice = scores + bias
    best = choice.view(-1, 1, E).topk(2, dim=-1).values.sum(-1)
    mask = torch.zeros_like(best).scatter_(1, best.topk(1).indices, 1)
    mask = mask.unsqueeze(-1).expand(-1, 1, E).reshape(-1, E)
    ids = choice.masked_fill(~mask.bool(), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def clamped_sum(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(w / w.sum(-1, keepdim=True).clamp(min=1e-12), ids)


def shared_by_power_of_two(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().topk(K, dim=-1)
    return experts(w.softmax(-1) / 4, ids)


def rounded_scores(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.bfloat16().sigmoid()
    ids = (scores + bias).topk(K).indices
    return experts(renormalize(scores.gather(1, ids), 1e-6), ids)


def logits_with_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """A bias that weights have, too, is of the logits."""
    w, ids = (logits.float() + bias).softmax(-1).topk(K, dim=-1)
    return experts(w, ids)


def other_mask(logits: Tensor) -> tuple[Tensor, ...]:
    scores = logits.float().softmax(-1)
    w, ids = keep_groups(scores, best_two(scores), -1.0).topk(K, dim=-1)
    return experts(w, ids)


# The chain is matched as far as nobody else reads it.


def scores_used(logits: Tensor) -> tuple[Tensor, ...]:
    scores = logits.float().softmax(-1)
    w, ids = scores.topk(K, dim=-1)
    return *experts(renormalize(w), ids), scores.sum(0)


def chosen_used(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return *experts(renormalize(w), ids), w


def sum_used(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    total = w.sum(-1, keepdim=True)
    return *experts(w / total, ids), total


def scaled_first(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(renormalize(w * 2.5), ids)


def rounded_first(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(renormalize(w.bfloat16()), ids)


def norm_over_tokens(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(w / w.sum(0, keepdim=True), ids)


def clamped_biased(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """A bias may choose scores that add up to less than the clamp."""
    scores = logits.float().softmax(-1)
    ids = (scores + bias).topk(K).indices
    w = scores.gather(1, ids)
    return experts(w / w.sum(-1, keepdim=True).clamp(min=1e-12), ids)


def clamped_high(logits: Tensor) -> tuple[Tensor, ...]:
    """Two of eight scores may add up to less than 0.3."""
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(w / w.sum(-1, keepdim=True).clamp(min=0.3), ids)


def late_sigmoid(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """`route` has no bias where scores come after the choice."""
    ids = (logits.float() + bias).topk(K).indices
    return experts(logits.float().gather(1, ids).sigmoid(), ids)


def divided_by_three(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(w / 3, ids)


def scale_per_expert(logits: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.float().softmax(-1).topk(K, dim=-1)
    return experts(renormalize(w) * scale[ids], ids)


MATCHED = [
    (softmax_topk, "softmax, top-2, renormalised"),
    (topk_softmax, "top-2, softmax"),
    (topk_sigmoid, "top-2, sigmoid"),
    (sigmoid_bias_groups, "sigmoid + bias, 2 of 4 groups, top-2, renormalised, x2.5"),
    (groups_by_view, "sigmoid + bias, 2 of 4 groups, top-2"),
    (max_groups_zero, "softmax, 2 of 4 groups, top-2, x16"),
    (best_group, "sigmoid + bias, 1 of 4 groups, top-2"),
    (one_group, "sigmoid + bias, top-2"),
    (clamped_sum, "softmax, top-2, renormalised"),
    (shared_by_power_of_two, "top-2, softmax, x0.25"),
    (rounded_scores, "scores + bias, top-2; scores are rounded to bfloat16; renormalised outside"),
    (logits_with_bias, "softmax, top-2"),
    (other_mask, "top-2; experts are masked with -1.0"),
    (scores_used, "softmax, top-2, renormalised"),
    (chosen_used, "softmax, top-2; renormalised outside"),
    (sum_used, "softmax, top-2; renormalised outside"),
    (scaled_first, "softmax, top-2, x2.5; renormalised outside"),
    (rounded_first, "softmax, top-2; renormalised outside"),
    (norm_over_tokens, "softmax, top-2"),
    (clamped_biased, "softmax + bias, top-2; renormalised outside"),
    (clamped_high, "softmax, top-2; renormalised outside"),
    (late_sigmoid, "scores + bias, top-2"),
    (divided_by_three, "softmax, top-2"),
    (scale_per_expert, "softmax, top-2, renormalised"),
]


def tensors(fn: Any, dtype: torch.dtype = torch.float32, rows: int = T) -> list[Tensor]:
    """Logits, and as many vectors [E] as `fn` has other arguments."""
    vectors = [torch.rand(E) for _ in range(fn.__code__.co_argcount - 1)]
    return [torch.randn(rows, E).to(dtype), *vectors]


def check_values(gm: fx.GraphModule, inputs: list[Any]) -> Outcome:
    """Run the pass: ids are equal, pair for pair, and what is made of them is close."""
    before = gm(*inputs)
    (outcome,) = run_passes(gm, find_routing)
    after = gm(*inputs)
    orders = [results[1].argsort(-1) for results in (before, after)]  # a top-k may be unsorted
    for i, (a, b) in enumerate(zip(after, before, strict=True)):
        if i == 2:
            assert torch.equal(a.flatten().sort()[0], b.flatten().sort()[0])
        elif a.shape == before[1].shape:
            b, a = b.gather(1, orders[0]), a.gather(1, orders[1])
            torch.testing.assert_close(a, b)
        else:
            torch.testing.assert_close(a, b)
    return outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fn", "detail"), MATCHED, ids=lambda p: getattr(p, "__name__", ""))
def test_matched(fn: Any, detail: str, dtype: torch.dtype) -> None:
    inputs = tensors(fn, dtype)
    gm = capture(fn, *inputs)
    outcome = check_values(gm, inputs)
    assert [event.detail for event in outcome.rewrites] == [f"route: {detail}"]
    assert not outcome.declined


def test_docstring() -> None:
    def mixtral(logits: Tensor, y: Tensor) -> Tensor:
        w, ids = logits.float().softmax(-1).topk(2)
        w = w / w.sum(-1, keepdim=True)
        _, _, position = moe.sort_tokens(ids, 8)
        return moe.combine(y, position, w.to(y.dtype))

    logits, y = torch.randn(4, 8).bfloat16(), torch.randn(8, 64).bfloat16()
    assert_documented(find_routing, capture(mixtral, logits, y))


def rewritten(fn: Any, dtype: torch.dtype = torch.float32) -> str:
    gm = capture(fn, *tensors(fn, dtype, rows=4))
    run_passes(gm, find_routing)
    return render(gm.graph)


def test_graph_softmax_topk() -> None:
    assert_expected_inline(
        rewritten(softmax_topk),
        """\
arg0_1: f32[4, 8]
route = moe_compile.route(arg0_1, 2, score='softmax', renormalize=True)
getitem: f32[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
return [getitem, getitem_1, getitem_2]""",
    )


def test_graph_topk_softmax() -> None:
    assert_expected_inline(
        rewritten(topk_softmax, torch.bfloat16),
        """\
arg0_1: bf16[4, 8]
route = moe_compile.route(arg0_1, 2, score='softmax', score_first=False, dtype=bf16)
getitem: bf16[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
return [getitem, getitem_1, getitem_2]""",
    )


def test_graph_sigmoid_bias_groups() -> None:
    assert_expected_inline(
        rewritten(sigmoid_bias_groups, torch.bfloat16),
        """\
arg0_1: bf16[4, 8]
arg1_1: f32[8]
route = moe_compile.route(arg0_1, 2, score='sigmoid', bias=arg1_1, num_groups=4, top_groups=2, group_score='top2_sum', renormalize=True, eps=1e-20, scale=2.5)
getitem: f32[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
return [getitem, getitem_1, getitem_2]""",  # noqa: E501
    )


def test_graph_max_groups_zero() -> None:
    assert_expected_inline(
        rewritten(max_groups_zero),
        """\
arg0_1: f32[4, 8]
route = moe_compile.route(arg0_1, 2, score='softmax', num_groups=4, top_groups=2, group_score='max', scale=16.0)
getitem: f32[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
return [getitem, getitem_1, getitem_2]""",  # noqa: E501
    )


def test_graph_rounded_scores() -> None:
    assert_expected_inline(
        rewritten(rounded_scores),
        """\
arg0_1: f32[4, 8]
arg1_1: f32[8]
convert_element_type: bf16[4, 8] = prims.convert_element_type(arg0_1, bf16)
sigmoid: bf16[4, 8] = aten.sigmoid(convert_element_type)
route = moe_compile.route(sigmoid, 2, score='none', bias=arg1_1, dtype=bf16)
getitem: bf16[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
sum: bf16[4, 1] = aten.sum.dim_IntList(getitem, [-1], True)
add: bf16[4, 1] = aten.add.Tensor(sum, 1e-06)
div: bf16[4, 2] = aten.div.Tensor(getitem, add)
return [div, getitem_1, getitem_2]""",
    )


def test_graph_scores_used() -> None:
    assert_expected_inline(
        rewritten(scores_used),
        """\
arg0_1: f32[4, 8]
amax: f32[4, 1] = aten.amax(arg0_1, [-1], True)
sub: f32[4, 8] = aten.sub.Tensor(arg0_1, amax)
exp: f32[4, 8] = aten.exp(sub)
sum: f32[4, 1] = aten.sum.dim_IntList(exp, [-1], True)
div: f32[4, 8] = aten.div.Tensor(exp, sum)
route = moe_compile.route(arg0_1, 2, score='softmax', renormalize=True)
getitem: f32[4, 2] = route[0]
getitem_1: i64[4, 2] = route[1]
sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
getitem_2: i32[4, 2] = sort_tokens[2]
sum_1: f32[8] = aten.sum.dim_IntList(div, [0])
return [getitem, getitem_1, getitem_2, sum_1]""",
    )


# Left alone.


def smallest(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.topk(K, largest=False)
    return experts(w, ids)


def over_tokens(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.topk(K, dim=0)
    return experts(w, ids)


def batched(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.view(3, -1, E).softmax(-1).topk(K)
    return experts(w.view(-1, K), ids.view(-1, K))


def biased_used(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    biased, ids = (scores + bias).topk(K)
    return *experts(scores.gather(1, ids), ids), biased


def zero_below_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = scores + bias
    ids = keep_groups(choice, best_two(choice), 0.0).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def too_few_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = scores + bias
    ids = keep_groups(choice, best_two(choice), -INF, top=1).topk(3).indices
    return experts(scores.gather(1, ids), ids)


def masked_by_threshold(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = (scores + bias).masked_fill(scores < 0.1, -INF)
    ids = choice.topk(K).indices
    return experts(scores.gather(1, ids), ids)


def groups_of_scores(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    ids = keep_groups(scores + bias, best_two(scores), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def strided_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Experts e and e + P are of one group in the mask, e and e + 1 in its scores."""
    scores = logits.sigmoid()
    choice = scores + bias
    best = best_two(choice)
    mask = torch.zeros_like(best).scatter_(1, best.topk(2).indices, 1)
    mask = mask.unsqueeze(1).expand(-1, E // P, P).reshape(-1, E)
    ids = choice.masked_fill(~mask.bool(), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def worst_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = scores + bias
    best = best_two(choice)
    mask = torch.zeros_like(best).scatter_(1, best.topk(2).indices, 1)
    mask = mask.unsqueeze(-1).expand(-1, P, E // P).reshape(-1, E)
    ids = choice.masked_fill(mask.bool(), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def masked_in_three_dims(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = (scores + bias).view(-1, P, E // P) * 2.0
    ids = choice.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    mask = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter_(1, ids, False)
    ids = choice.masked_fill(mask.unsqueeze(-1), -INF).flatten(1).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def mean_groups(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    choice = scores + bias
    ids = keep_groups(choice, choice.view(-1, P, E // P).mean(-1), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def rounded_groups(logits: Tensor) -> tuple[Tensor, ...]:
    scores = logits.bfloat16().softmax(-1)
    ids = keep_groups(scores, best_two(scores), -INF).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def rounded_bias(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.bfloat16().sigmoid()
    ids = (scores + bias.bfloat16()).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def bias_per_token(logits: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    ids = (scores + logits.flip(-1)).topk(K).indices
    return experts(scores.gather(1, ids), ids)


def other_scores(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    ids = (logits.sigmoid() + bias).topk(K).indices
    return experts(logits.softmax(-1).gather(1, ids), ids)


def bias_before_softmax(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    ids = (logits + bias).softmax(-1).topk(K).indices
    return experts(logits.softmax(-1).gather(1, ids), ids)


def double(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.double().softmax(-1).topk(K)
    return experts(w, ids)


def ids_modified(logits: Tensor) -> tuple[Tensor, ...]:
    w, ids = logits.softmax(-1).topk(K)
    return experts(w, torch.where(ids < E // 2, ids, E))


def ids_from_values(logits: Tensor) -> tuple[Tensor, ...]:
    w, _ = logits.topk(K)
    return experts(w, w.long())


def ids_from_table(logits: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    ids = table.long().expand(logits.shape[0], E)[:, :K]
    return experts(logits.softmax(-1).gather(1, ids), ids)


def uniform_weights(logits: Tensor) -> tuple[Tensor, ...]:
    ids = logits.topk(K).indices
    return experts(torch.full_like(ids, 0.5, dtype=torch.float32), ids)


DECLINED = [
    (smallest, "top-k of the smallest"),
    (over_tokens, "top-k over another dim than the last"),
    (batched, "top-k of 3 dims, not of [T, E]"),
    (biased_used, "the top-k's values are used beside gathered scores"),
    (zero_below_bias, "experts are masked with 0.0, but a kept score may be less"),
    (too_few_groups, "1 groups of 2 experts are too few for 3 experts"),
    (
        masked_by_threshold,
        "experts are masked by something else than the groups that were not chosen",
    ),
    (groups_of_scores, "the groups are not chosen by the scores that choose the experts"),
    (strided_groups, "the mask of groups is not repeated for each expert of a group"),
    (worst_groups, "experts are masked by something else than the groups that were not chosen"),
    (masked_in_three_dims, "experts are masked before their scores have the shape [T, E]"),
    (mean_groups, "groups are scored by something else than their maximum or their best two"),
    (rounded_groups, "scores of groups are rounded to bfloat16"),
    (rounded_bias, "scores + bias are rounded to bfloat16"),
    (bias_per_token, "the bias is not one number for each expert"),
    (other_scores, "the weights are not taken from the scores that choose"),
    (bias_before_softmax, "the weights are not taken from the scores that choose"),
    (double, "logits are float64"),
    (ids_modified, "ids do not come from a top-k, but from aten.where.self"),
    (ids_from_values, "ids are the values of a top-k"),
    (ids_from_table, "ids do not come from a top-k, but from aten.slice.Tensor"),
    (uniform_weights, "no weights are made of the chosen scores"),
]


@pytest.mark.parametrize(("fn", "reason"), DECLINED, ids=lambda p: getattr(p, "__name__", ""))
def test_left_alone(fn: Any, reason: str) -> None:
    gm = capture(fn, *tensors(fn))
    before = render(gm.graph)
    (outcome,) = run_passes(gm, find_routing)
    assert render(gm.graph) == before
    assert [event.detail for event in outcome.declined] == [reason]
    assert not outcome.rewrites


def test_only_routers_are_looked_at() -> None:
    def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).topk(K)  # type: ignore[return-value]

    gm = capture(sample, torch.randn(T, E))
    (outcome,) = run_passes(gm, find_routing)
    assert outcome == Outcome()


def test_twice_is_once() -> None:
    gm = capture(sigmoid_bias_groups, *tensors(sigmoid_bias_groups))
    run_passes(gm, find_routing)
    once = render(gm.graph)
    (outcome,) = run_passes(gm, find_routing)
    assert render(gm.graph) == once
    assert outcome == Outcome()


@pytest.mark.parametrize("fn", [softmax_topk, sigmoid_bias_groups, groups_by_view, best_group])
def test_dynamic_tokens(fn: Any) -> None:
    inputs = tensors(fn)
    torch._dynamo.mark_dynamic(inputs[0], 0)
    gm = capture(fn, *inputs)
    assert any(isinstance(value, torch.SymInt) for value in fakes(gm))
    outcome = check_values(gm, inputs_of(gm))
    assert [len(outcome.rewrites), len(outcome.declined)] == [1, 0]


def fakes(gm: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]


def inputs_of(gm: fx.GraphModule) -> list[Any]:
    """Random inputs for a graph, parameters among them; T for every size that is not known."""
    inputs: list[Any] = []
    for value in fakes(gm):
        if isinstance(value, torch.SymInt):
            inputs.append(T)
        else:
            shape = [T if isinstance(size, torch.SymInt) else size for size in value.shape]
            inputs.append(torch.randn(shape).to(value.dtype))
    return inputs


def test_location() -> None:
    gm = capture(softmax_topk, *tensors(softmax_topk))
    (outcome,) = run_passes(gm, find_routing)
    assert outcome.rewrites[0].source.startswith("test_find_routing.py:")
    assert "topk(K, dim=-1)" in outcome.rewrites[0].source


# Routers of transformers.

CONFIG: dict[str, Any] = {
    "bias": False,
    "expert_selection_fn": "softmax",
    "hidden_size": 64,
    "input_jitter_noise": 0.0,
    "moe_k": K,
    "moe_num_experts": E,
    "moe_norm_min": 1e-12,
    "moe_norm_topk_prob_eps": 1e-20,
    "moe_router_logit_softcapping": 30.0,
    "moe_topk": K,
    "n_group": P,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts": E,
    "num_experts_per_tok": K,
    "num_local_experts": E,
    "rms_norm_eps": 1e-6,
    "route_scale": 2.5,
    "routed_scaling_factor": 2.5,
    "router_jitter_noise": 0.01,
    "router_scaling_factor": 2.5,
    "scoring_func": "sqrtsoftplus",
    "top_k_experts": K,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "use_expert_bias": True,
}
NORMED = "softmax, top-2, renormalised"
DEEPSEEK = "sigmoid + bias, 2 of 4 groups, top-2, renormalised, x2.5"
ROUTERS = [
    ("afmoe.AfmoeTokenChoiceRouter", "sigmoid + bias, top-2, renormalised, x2.5"),
    ("cohere2_moe.Cohere2MoeTopKRouter", "top-2, softmax"),
    ("deepseek_v2.DeepseekV2TopkRouter", "softmax, 2 of 4 groups, top-2, x2.5"),
    ("deepseek_v3.DeepseekV3TopkRouter", DEEPSEEK),
    ("deepseek_v4.DeepseekV4TopKRouter", "scores + bias, top-2; renormalised outside"),
    ("ernie4_5_moe.Ernie4_5_MoeTopKRouter", "softmax + bias, top-2; renormalised outside"),
    ("gemma4.Gemma4TextRouter", NORMED),
    ("glm4_moe.Glm4MoeTopkRouter", DEEPSEEK),
    ("gpt_oss.GptOssTopKRouter", "top-2, softmax"),
    ("granitemoe.GraniteMoeTopKRouter", "top-2, softmax"),
    ("hunyuan_v1_moe.HunYuanMoEV1Gate", NORMED),
    ("hy_v3.HYV3TopKRouter", "sigmoid + bias, top-2, renormalised, x2.5"),
    ("jamba.JambaTopKRouter", "softmax, top-2"),
    ("laguna.LagunaTopKRouter", "sigmoid + bias, top-2, renormalised"),
    (
        "lfm2_moe.Lfm2MoeTopKRouter",
        "scores + bias, top-2; scores are rounded to bfloat16; renormalised outside",
    ),
    ("minimax_m2.MiniMaxM2TopKRouter", "sigmoid + bias, top-2, renormalised"),
    ("mixtral.MixtralTopKRouter", NORMED),
    ("nemotron_h.NemotronHTopkRouter", DEEPSEEK),
    ("qwen3_moe.Qwen3MoeTopKRouter", NORMED),
    ("qwen3_vl_moe.Qwen3VLMoeTextTopKRouter", NORMED),
]
LEFT_ROUTERS = [
    ("inkling.InklingTopkRouter", "the weights are not taken from the scores that choose"),
    ("mistral4.Mistral4TopkRouter", "scores of groups are rounded to bfloat16"),
    ("phimoe.PhimoeTopKRouter", "ids do not come from a top-k, but from aten.cat.default"),
]


class Routed(nn.Module):
    """A router and what reads its results."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        results = self.router(x, *bias)
        i = next(i for i, result in enumerate(results) if result.dtype == torch.int64)
        return experts(results[i - 1], results[i])


def capture_router(name: str) -> fx.GraphModule:
    pytest.importorskip("transformers")
    family, _, cls = name.partition(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if not hasattr(module, cls):
        pytest.skip(f"this transformers has no {cls}")
    if family.startswith("granitemoe") and parse(version("transformers")) < parse("5.20"):
        pytest.skip("its routers return the ids first there, which this wrapper does not read")
    layer = {"layer_idx": 0} if family == "hunyuan_v1_moe" else {}
    router = getattr(module, cls)(SimpleNamespace(**CONFIG), **layer)
    inputs = [torch.randn(T, 64).bfloat16()]
    if family == "afmoe":
        inputs = [inputs[0].unsqueeze(0)]
    if family in ("afmoe", "hy_v3", "lfm2_moe", "minimax_m2"):
        inputs.append(torch.zeros(E))
    router = router.bfloat16().eval()
    for buffer in router.buffers():  # as from_pretrained keeps the biases
        buffer.data = buffer.data.float()
    with torch.no_grad():
        return capture(Routed(router), *inputs)


@pytest.mark.parametrize(("router", "detail"), ROUTERS, ids=lambda p: p.partition(".")[0])
def test_router(router: str, detail: str) -> None:
    gm = capture_router(router)
    outcome = check_values(gm, inputs_of(gm))
    assert [event.detail for event in outcome.rewrites] == [f"route: {detail}"]
    assert not outcome.declined


@pytest.mark.parametrize(("router", "reason"), LEFT_ROUTERS, ids=lambda p: p.partition(".")[0])
def test_router_left_alone(router: str, reason: str) -> None:
    (outcome,) = run_passes(capture_router(router), find_routing)
    assert [event.detail for event in outcome.declined] == [reason]
    assert not outcome.rewrites


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_model(experts: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=E,
    )
    model = transformers.MixtralForCausalLM(config).bfloat16().eval()
    model.set_experts_implementation(experts)
    with torch.no_grad():
        gm = capture(model, torch.arange(1, 6)[None], use_cache=False)
    _, outcome = run_passes(gm, find_experts, find_routing)
    assert [event.detail for event in outcome.rewrites] == [f"route: {NORMED}"] * 2
    layers = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert [event.layer for event in outcome.rewrites] == layers
