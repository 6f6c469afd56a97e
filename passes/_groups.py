"""Experts chosen from some groups only: what masks the others, and how the groups were chosen.

Letters: T tokens, E experts, P groups of S experts.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    constant,
    is_call,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined
from moe_compile.passes._topk import check_topk, dtype_name, over_last_dim

_NEGATIONS = (aten.bitwise_not.default, aten.logical_not.default, aten.eq.Scalar)
_COMPARISONS = (aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar)
_REPEATS = (*CASTS, *COPIES, *RESHAPES, *SQUEEZES, aten.expand.default)


@dataclass(frozen=True)
class Groups:
    """Experts may be chosen from the `top` best of `num` groups; the others' scores are `fill`."""

    num: int
    top: int
    score: str
    fill: float


def parse_groups(choice: fx.Node, top_k: int) -> tuple[fx.Node, Groups | None]:
    """What `choice` [T, E] is before experts are masked, and the groups that are kept."""
    where = strip(choice, *RESHAPES)
    mask, kept, fill, keeps = _parse_where(where)
    if fill is None:
        return choice, None
    if fill not in (-math.inf, 0.0):
        raise Declined(f"experts are masked with {fill}")
    scatter, expands = _parse_mask(mask, keeps)
    T, P = val(scatter).shape
    S = val(choice).shape[1] // P
    repeated = all(same_shape(e.args[0], (T, P, 1)) and same_shape(e, (T, P, S)) for e in expands)
    broadcast = same_shape(mask, (T, P, 1)) and same_shape(where, (T, P, S))
    if not (repeated and (broadcast or same_shape(mask, val(where).shape))):
        raise Declined("the mask of groups is not repeated for each expert of a group")
    best, top = _parse_index(args(scatter)[2])
    score, scores_TPS = _parse_group_score(best)
    if not same_shape(scores_TPS, (T, P, S)) or _flat(scores_TPS) is not _flat(kept):
        raise Declined("the groups are not chosen by the scores that choose the experts")
    if top * S < top_k:
        raise Declined(f"{top} groups of {S} experts are too few for {top_k} experts")
    while not same_shape(kept, val(choice).shape):
        (kept, *_) = args(kept)
    return kept, Groups(P, top, score, float(fill))


def _flat(node: Any) -> Any:
    return strip(node, *RESHAPES)


def _parse_where(where: fx.Node) -> tuple[Any, Any, Any, bool]:
    """The mask, what it keeps, what it puts elsewhere (None: no mask), whether true means kept."""
    if is_call(where, aten.masked_fill.Scalar):
        kept, mask, fill = args(where)
        return mask, kept, fill, False
    if not is_call(where, aten.where.self):
        return None, None, None, False
    mask, a, b = args(where)
    if constant(a) is not None:
        return mask, b, constant(a), False
    return mask, a, constant(b), True


def _parse_mask(mask: fx.Node, keeps: bool) -> tuple[fx.Node, list[fx.Node]]:
    """The scatter [T, P] that marks the chosen groups, and the expands that repeat it.

    Everything between keeps values (0 or 1, false or true) or negates them, and keeps order.
    """
    node: Any = mask
    expands = []
    while is_call(node, *_NEGATIONS, *_COMPARISONS, *_REPEATS):
        if node.target in _COMPARISONS and node.args[1] != 0:
            break
        if node.target is aten.expand.default:
            expands.append(node)
        keeps ^= node.target in _NEGATIONS
        node = node.args[0]
    if is_call(node, aten.scatter.value, aten.scatter.src) and val(node).ndim == 2:
        base, dim, _, mark = args(node)[:4]
        marks = {(0, 1): keeps, (1, 0): not keeps}  # what is written where: base, chosen groups
        if dim in (1, -1) and marks.get((constant(base), constant(mark))):
            return node, expands
    raise Declined("experts are masked by something else than the groups that were not chosen")


def _parse_index(index: Any) -> tuple[fx.Node, int]:
    """The scores of the groups, and how many groups are chosen by them."""
    if is_call(index, operator.getitem) and index.args[1] == 1:
        topk = index.args[0]
        if is_call(topk, aten.topk.default):
            return check_topk(topk)
    raise Declined("the groups are not chosen by a top-k")


def _parse_group_score(best: fx.Node) -> tuple[str, fx.Node]:
    """How a group [T, P] is scored, and the experts' scores [T, P, S] it is scored by."""
    if is_call(best, aten.amax.default) and over_last_dim(best, keepdim=False):
        return "max", args(best)[0]
    if is_call(best, operator.getitem) and is_call(best.args[0], aten.max.dim):
        maximum, output = args(best)
        if output == 0 and over_last_dim(maximum, keepdim=False):
            return "max", args(maximum)[0]
    if is_call(best, aten.sum.dim_IntList) and over_last_dim(best, keepdim=False):
        values = args(best)[0]
        if is_call(values, operator.getitem) and is_call(values.args[0], aten.topk.default):
            return _parse_best_two(best, *args(values))
    raise Declined("groups are scored by something else than their maximum or their best two")


def _parse_best_two(best: fx.Node, topk: fx.Node, output: int) -> tuple[str, fx.Node]:
    scores, k = check_topk(topk)
    if output != 0 or k > 2:
        raise Declined("groups are scored by something else than their maximum or their best two")
    if k == 2 and val(best).dtype != torch.float32:
        raise Declined(f"scores of groups are rounded to {dtype_name(best)}")
    return ("top2_sum" if k == 2 else "max"), scores
