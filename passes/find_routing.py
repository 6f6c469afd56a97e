"""Find the routers of MoE layers: how logits choose the experts of each token and weigh them."""

import operator
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    call,
    is_call,
    strip,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._scores import Selection, parse_selection
from moe_compile.passes._topk import is_row_sum
from moe_compile.passes._weights import Weights, follow_weights


@exactness("reassociating")
def find_routing(graph: fx.Graph) -> Outcome:
    """Replace the way from router logits to the experts' ids and weights by one `route`.

    Before:
        arg0_1: bf16[4, 8]
        arg1_1: bf16[8, 64]
        convert_element_type: f32[4, 8] = prims.convert_element_type(arg0_1, f32)
        amax: f32[4, 1] = aten.amax(convert_element_type, [-1], True)
        sub: f32[4, 8] = aten.sub.Tensor(convert_element_type, amax)
        exp: f32[4, 8] = aten.exp(sub)
        sum: f32[4, 1] = aten.sum.dim_IntList(exp, [-1], True)
        div: f32[4, 8] = aten.div.Tensor(exp, sum)
        topk = aten.topk(div, 2)
        getitem: f32[4, 2] = topk[0]
        getitem_1: i64[4, 2] = topk[1]
        sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
        getitem_2: i32[4, 2] = sort_tokens[2]
        sum_1: f32[4, 1] = aten.sum.dim_IntList(getitem, [-1], True)
        div_1: f32[4, 2] = aten.div.Tensor(getitem, sum_1)
        convert_element_type_1: bf16[4, 2] = prims.convert_element_type(div_1, bf16)
        combine: bf16[4, 64] = moe_compile.combine(arg1_1, getitem_2, convert_element_type_1)
        return [combine]

    After:
        arg0_1: bf16[4, 8]
        arg1_1: bf16[8, 64]
        route = moe_compile.route(arg0_1, 2, score='softmax', renormalize=True, dtype=bf16)
        getitem: bf16[4, 2] = route[0]
        getitem_1: i64[4, 2] = route[1]
        sort_tokens = moe_compile.sort_tokens(getitem_1, 8)
        getitem_2: i32[4, 2] = sort_tokens[2]
        combine: bf16[4, 64] = moe_compile.combine(arg1_1, getitem_2, getitem)
        return [combine]

    A router is a top-k whose ids go to `sort_tokens`. Upward it may be of some groups only, of
    scores and a bias, of softmax or sigmoid, in this order; downward weights may be scored (where
    the top-k was of logits), renormalised, scaled and rounded, in this order. Whatever comes in
    another order, or is used by others, stays outside: `route` then takes the scores as they are
    (score='none'), or what follows reads its weights.

    Left alone: ids that are not a top-k's own (a hash, ids remapped for expert parallel), weights
    that are not those of the scores that chose, sums rounded to less than float32 that choose,
    masks that are not proved to be of groups. Each is reported.
    Numerics: scores, sums and quotients are float32 on both sides, but may differ in the last bit,
    which chooses differently where two scores differ by no more. Of equal scores either may be
    chosen, as by a top-k; one that asks for no order gets the descending one. The weights are
    rounded once, where the model first rounds them; what follows stays outside.
    Returns: each rewrite with what was matched, and why a score stays outside if one does.
    """
    outcome = Outcome()
    seen = set()
    for node in list(graph.nodes):
        if not is_call(node, moe.sort_tokens.default):
            continue
        ids = strip(args(node)[0], *RESHAPES, *SQUEEZES, *CASTS, *COPIES)
        source = args(ids)[0] if is_call(ids, operator.getitem) else ids
        if source in seen or is_call(source, moe.route.default):
            continue
        seen.add(source)
        try:
            topk = _check_ids(ids, source)
            selection, weights = _match(topk, ids)
        except Declined as declined:
            outcome.decline(source, str(declined))
            continue
        outcome.rewrote(topk, _describe(selection, weights))
        _rewrite(graph, topk, ids, selection, weights)
    return outcome


def _check_ids(ids: fx.Node, source: fx.Node) -> fx.Node:
    if is_call(source, aten.topk.default):
        if ids.args[1] != 1:
            raise Declined("ids are the values of a top-k")
        return source
    made_by = source.target if source.op == "call_function" else f"an input, {source.name}"
    raise Declined(f"ids do not come from a top-k, but from {made_by}")


def _match(topk: fx.Node, ids: fx.Node) -> tuple[Selection, Weights]:
    """What chooses, and the weights that are made of the scores of the chosen."""
    values = [n for n in topk.users if n.args[1] == 0 and n.users]
    gathers = [n for n in ids.users if _is_gather(n, ids)]
    if values and gathers:
        raise Declined("the top-k's values are used beside gathered scores")
    if not (values or gathers):
        raise Declined("no weights are made of the chosen scores")
    if values:
        selection = parse_selection(topk, None)
        return selection, follow_weights(values[0], selection)
    (first, *others) = gathers
    if others:
        raise Declined("several tensors are gathered by the ids")
    selection = parse_selection(topk, args(first)[0])
    return selection, follow_weights(first, selection)


def _is_gather(node: fx.Node, ids: fx.Node) -> bool:
    return is_call(node, aten.gather.default) and node.args[2] is ids and node.args[1] in (1, -1)


def _rewrite(
    graph: fx.Graph, topk: fx.Node, ids: fx.Node, selection: Selection, weights: Weights
) -> None:
    with graph.inserting_before(topk):
        route = call(
            graph,
            moe.route.default,
            selection.logits,
            selection.top_k,
            like=topk,
            **_keywords(selection, weights),
        )
        new_weights, new_ids = unpack(graph, route, 2)
    assert val(new_weights).dtype == val(weights.node).dtype
    weights.node.replace_all_uses_with(new_weights)
    ids.replace_all_uses_with(new_ids)


def _keywords(selection: Selection, weights: Weights) -> dict[str, Any]:
    """The arguments of `route` that differ from their defaults, and the score always."""
    words: dict[str, Any] = {"score": weights.late_score or selection.score}
    if weights.late_score:
        words["score_first"] = False
    if selection.bias is not None:
        words["bias"] = selection.bias
    groups = selection.groups
    if groups is not None:
        words.update(num_groups=groups.num, top_groups=groups.top, group_score=groups.score)
    if weights.renormalize:
        words["renormalize"] = True
    if weights.eps:
        words["eps"] = weights.eps
    if weights.scale != 1.0:
        words["scale"] = weights.scale
    if val(weights.node).dtype != torch.float32:
        words["dtype"] = val(weights.node).dtype
    return words


def _describe(selection: Selection, weights: Weights) -> str:
    """As in "route: sigmoid + bias, 2 of 4 groups, top-2, renormalised, x2.5"."""
    groups = selection.groups
    score = "" if selection.is_plain else {"none": "scores"}.get(selection.score, selection.score)
    words = [
        score + " + bias" * (selection.bias is not None),
        f"{groups.top} of {groups.num} groups" if groups else "",
        f"top-{selection.top_k}",
        weights.late_score,
        "renormalised" * weights.renormalize,
        f"x{weights.scale:g}" if weights.scale != 1.0 else "",
    ]
    outside = [selection.outside]
    if any(is_row_sum(user, weights.node) for user in weights.node.users):
        outside.append("renormalised outside")
    notes = "".join(f"; {note}" for note in outside if note)
    return f"route: {', '.join(word for word in words if word)}{notes}"
