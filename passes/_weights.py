"""Everything below a router's top-k that makes weights of the chosen scores."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    constant,
    is_call,
    operands,
    same_shape,
    val,
)
from moe_compile.passes._scores import Selection
from moe_compile.passes._topk import FLOATS, is_row_sum, is_widening, parse_softmax

_SCORED, _RENORMALIZED, _SCALED, _ROUNDED = range(1, 5)


@dataclass(frozen=True)
class Weights:
    """What becomes of the chosen scores, in the words of `route`, down to `node`."""

    node: fx.Node
    stage: int = 0
    late_score: str = ""
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0


def follow_weights(start: fx.Node, selection: Selection) -> Weights:
    """As far down from `start` as `route` does the same in the same order, and nobody else looks.

    Every step computes in float32; the one rounding that `route` does is the last.
    """
    weights = Weights(start)
    while weights.stage < _ROUNDED:
        steps = (step(weights, selection) for step in _STEPS)
        further = next((w for w in steps if w is not None), None)
        if further is None:
            break
        weights = further
    return weights


def _late_score(weights: Weights, selection: Selection) -> Weights | None:
    """A score of the chosen logits: sigmoid, or softmax over the K of them."""
    if weights.stage > 0 or not selection.is_plain:
        return None
    for user in weights.node.users:
        if is_call(user, aten.sigmoid.default) and _is_closed(weights.node, user, set()):
            stage = _SCORED if val(user).dtype == torch.float32 else _ROUNDED
            return replace(weights, node=user, stage=stage, late_score="sigmoid")
    for end in _below(weights.node, 3):
        softmax = parse_softmax(end)
        if softmax is None or softmax[0] is not weights.node:
            continue
        if _is_closed(weights.node, end, softmax[1]):
            return replace(weights, node=end, stage=_SCORED, late_score="softmax")
    return None


def _renormalize(weights: Weights, selection: Selection) -> Weights | None:
    """w / sum(w), w / (sum(w) + eps), or w / max(sum(w), eps) where the sum is proved more."""
    w = weights.node
    if weights.stage >= _RENORMALIZED or val(w).dtype != torch.float32:
        return None
    for end in w.users:
        if not (is_call(end, aten.div.Tensor) and end.args[0] is w and _is_like(end, w)):
            continue
        between: set[fx.Node] = set()
        eps = _parse_denominator(end.args[1], weights, selection, between)
        if eps is not None and _is_closed(w, end, between):
            return replace(weights, node=end, stage=_RENORMALIZED, renormalize=True, eps=eps)
    return None


def _parse_denominator(
    node: Any, weights: Weights, selection: Selection, between: set[fx.Node]
) -> float | None:
    """The eps of `sum(w) + eps`, adding the nodes of it to `between`."""
    between.add(node)
    if is_row_sum(node, weights.node):
        return 0.0
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        for total, eps in operands(node):
            if is_row_sum(total, weights.node) and isinstance(constant(eps), (int, float)):
                between.add(total)
                return float(constant(eps))
    if is_call(node, aten.clamp_min.default):
        total, eps = args(node)
        if is_row_sum(total, weights.node) and _sum_exceeds(eps, weights, selection):
            between.add(total)
            return 0.0
    return None


def _sum_exceeds(eps: Any, weights: Weights, selection: Selection) -> bool:
    """Is the sum of the chosen scores more than `eps` for any logits?

    K of E numbers that add up to 1, chosen because they are the largest, add up to K / E at least;
    half of that is left for rounding.
    """
    if weights.late_score == "softmax":
        return constant(eps) is not None and constant(eps) < 0.5
    largest = selection.score == "softmax" and selection.bias is None and selection.groups is None
    E = int(val(selection.logits).shape[1])
    return largest and constant(eps) is not None and constant(eps) < 0.5 * selection.top_k / E


def _scale(weights: Weights, selection: Selection) -> Weights | None:
    """A product with a number, or a quotient by a power of two, which is the same."""
    w = weights.node
    if weights.stage >= _SCALED or val(w).dtype != torch.float32 or len(w.users) != 1:
        return None
    (end,) = w.users
    scale = None
    if is_call(end, aten.mul.Tensor, aten.mul.Scalar):
        scale = next((constant(b) for a, b in operands(end) if a is w), None)
    elif is_call(end, aten.div.Tensor, aten.div.Scalar) and end.args[0] is w and len(end.args) == 2:
        by = constant(end.args[1])
        scale = 1.0 / by if by and abs(math.frexp(by)[0]) == 0.5 else None
    if scale is None or not _is_like(end, w):
        return None
    return replace(weights, node=end, stage=_SCALED, scale=float(scale))


def _cast(weights: Weights, selection: Selection) -> Weights | None:
    """Chosen logits made wider, or the last rounding."""
    w = weights.node
    if len(w.users) != 1:
        return None
    (end,) = w.users
    if not is_call(end, *CASTS):
        return None
    if is_widening(end):
        return replace(weights, node=end)
    rounds = val(w).dtype == torch.float32 and val(end).dtype in FLOATS
    return replace(weights, node=end, stage=_ROUNDED) if rounds else None


def _is_closed(start: fx.Node, end: fx.Node, between: set[fx.Node]) -> bool:
    """Is whatever reads `start` and what is `between` in the match, so that only `end` is seen?"""
    inside = {end, *between}
    return all(user in inside for node in (start, *between) for user in node.users)


def _is_like(end: fx.Node, start: fx.Node) -> bool:
    return val(end).dtype == val(start).dtype and same_shape(end, val(start).shape)


def _below(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    """What reads `node`, at most `depth` calls away."""
    for user in node.users:
        yield user
        if depth > 1:
            yield from _below(user, depth - 1)


_STEPS: tuple[Callable[[Weights, Selection], Weights | None], ...] = (
    _late_score,
    _renormalize,
    _scale,
    _cast,
)
