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
    operands,
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


@dataclass(frozen=True)
class Marks:
    """The chosen groups as a mask of groups."""

    node: fx.Node  # [T, P], one number at the chosen groups and another elsewhere
    index: fx.Node  # the ids of the chosen groups
    expands: list[fx.Node]  # what repeats it for the experts


def parse_groups(choice: fx.Node, top_k: int) -> tuple[fx.Node, Groups | None]:
    """What `choice` [T, E] is before experts are masked, and the groups that are kept."""
    where = strip(choice, *RESHAPES)
    mask, kept, fill, keeps = _parse_where(where)
    if fill is None:
        return choice, None
    if fill not in (-math.inf, 0.0):
        raise Declined(f"experts are masked with {fill}")
    marks = _parse_mask(mask, keeps)
    T, P = val(marks.node).shape
    S = val(choice).shape[1] // P
    repeated = all(
        same_shape(args(e)[0], (T, P, 1)) and same_shape(e, (T, P, S)) for e in marks.expands
    )
    broadcast = same_shape(mask, (T, P, 1)) and same_shape(where, (T, P, S))
    if not (repeated and (broadcast or same_shape(mask, val(where).shape))):
        raise Declined("the mask of groups is not repeated for each expert of a group")
    best, top = _parse_index(marks.index)
    if not same_shape(best, (T, P)):
        raise Declined("the groups are not chosen by one score each")
    while not same_shape(kept, val(choice).shape):
        if not is_call(kept, *RESHAPES):
            raise Declined("experts are masked before their scores have the shape [T, E]")
        kept = args(kept)[0]
    if top == P:  # whatever the groups' scores are
        return kept, None
    score, scores_TPS = _parse_group_score(best)
    if not same_shape(scores_TPS, (T, P, S)) or _flat(scores_TPS) is not _flat(kept):
        raise Declined("the groups are not chosen by the scores that choose the experts")
    if top * S < top_k:
        raise Declined(f"{top} groups of {S} experts are too few for {top_k} experts")
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


def _parse_mask(mask: fx.Node, keeps: bool) -> Marks:
    """What `mask` is made of, where true means kept or, if not `keeps`, masked.

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
    index, base, mark = _parse_scatter(node)
    marks = {(0, 1): keeps, (1, 0): not keeps}  # what is written where: elsewhere, chosen groups
    if index is None or not marks.get((base, mark)):
        raise Declined("experts are masked by something else than the groups that were not chosen")
    return Marks(node, index, expands)


def _parse_scatter(node: Any) -> tuple[Any, Any, Any]:
    """The ids of the marked groups, and the numbers elsewhere and at the marked groups."""
    if is_call(node, aten.scatter.value, aten.scatter.src) and val(node).ndim == 2:
        base, dim, index, mark = args(node)[:4]
        return index if dim in (1, -1) else None, constant(base), constant(mark)
    if is_call(node, aten.where.self) and is_call(node.args[0], aten.eq.Tensor):
        equal, mark, base = args(node)
        for a, b in operands(equal):  # Inductor's form of a scatter of one group
            index = strip(a, aten.expand.default)
            if _counts_groups(b, node) and same_shape(index, (val(node).shape[0], 1)):
                return index, _number(base), _number(mark)
    return None, None, None


def _counts_groups(node: Any, marks: fx.Node) -> bool:
    """Is `node` 0, 1, ... along the last dim of `marks` [T, P]?"""
    count = strip(node, *RESHAPES, *SQUEEZES)
    return (
        is_call(count, torch.ops.prims.iota.default)
        and (count.kwargs.get("start"), count.kwargs.get("step")) == (0, 1)
        and val(marks).ndim == 2
        and same_shape(node, (1, val(marks).shape[1]))
    )


def _number(node: Any) -> Any:
    return node.args[0] if is_call(node, aten.scalar_tensor.default) else constant(node)


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
