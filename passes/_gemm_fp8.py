"""The GEMMs of experts in float8: of rows that `quant_fp8` makes where they meet the weights.

Letters: R rows, E experts, H features in, G features out.
"""

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._axes import views_of
from moe_compile.passes._graph import arg, args, aten, call, is_call, prims, same, unpack, val


@dataclass(frozen=True)
class Float8:
    """What a product has beside x, which it quantises, and its weights."""

    quant: fx.Node  # quant_fp8 of x
    rows: tuple[fx.Node, fx.Node]  # its two results
    weight: fx.Node  # [E, ., .], of which each row gathers its own if not grouped
    scale: fx.Node
    ids: fx.Node | None  # of the gather

    @property
    def x(self) -> fx.Node:
        return args(self.quant)[0]  # type: ignore[no-any-return]


def parse_float8(node: fx.Node) -> Float8 | None:
    """The parts of a `grouped_mm_fp8` that is not a stage of a layer already."""
    q, q_scale, w, w_scale, ends = args(node)[:5]
    gathers = arg(node, 5, "rows") is not None or arg(node, 6, "top_k", 1) != 1
    if gathers or arg(node, 7, "bias") is not None:
        return None
    if _is_part(ends, moe.sort_tokens.default) or not _is_part(q, moe.quant_fp8.default, 0):
        return None
    quant = args(q)[0]
    if not _is_part(q_scale, moe.quant_fp8.default, 1) or args(q_scale)[0] is not quant:
        return None
    if arg(quant, 8, "offsets") is not None:
        return None
    table, views = views_of(w)
    scales, scale_views = views_of(w_scale)
    if not is_call(table, aten.index.Tensor):
        return Float8(quant, (q, q_scale), w, w_scale, None)
    # w[ids] and its scales in the same layout, and one row for each
    alike = is_call(scales, aten.index.Tensor) and args(scales)[1] == args(table)[1]
    if not alike or len(args(table)[1]) != 1 or _layout(views) != _layout(scale_views):
        return None
    if _layout(views) is None or not _counts_ones(ends, val(q).shape[0]):
        return None
    return Float8(quant, (q, q_scale), args(table)[0], args(scales)[0], args(table)[1][0])


def _is_part(node: Any, target: Any, index: int | None = None) -> bool:
    """Is `node` a result (this one) of a call of `target`?"""
    found = is_call(node, operator.getitem) and is_call(args(node)[0], target)
    return found and index in (None, args(node)[1])


def _layout(views: list[fx.Node]) -> list[Any] | None:
    """Permutations, which are the same for weights and for the scales of their blocks."""
    known = all(is_call(view, aten.permute.default) for view in views)
    return [list(args(view)[1]) for view in views] if known else None


def _counts_ones(ends: Any, size: Any) -> bool:
    """Is `ends` 1, 2, ... size?"""
    if not is_call(ends, prims.iota.default):
        return False
    length = args(ends)[0]
    length = length.meta["val"] if isinstance(length, fx.Node) else length
    return same(length, size) and (ends.kwargs["start"], ends.kwargs["step"]) == (1, 1)


def quantized(graph: fx.Graph, x: fx.Node, old: fx.Node, before: fx.Node) -> tuple[fx.Node, ...]:
    """x as `old` quantises its rows: a group runs along a row, so which rows there are is one."""
    how, named = args(old)[1:], old.kwargs
    for user in x.users:
        known = is_call(user, moe.quant_fp8.default) and (args(user)[1:], user.kwargs) == (
            how,
            named,
        )
        if known and user is not old and user < before:
            parts = {args(part)[1]: part for part in user.users}
            if parts.keys() == {0, 1} and all(part < before for part in parts.values()):
                return parts[0], parts[1]
    quant = call(graph, moe.quant_fp8.default, x, *how, like=old, **named)
    return unpack(graph, quant, 2)
