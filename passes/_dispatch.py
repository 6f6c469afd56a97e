"""How a model turns tokens into rows for its experts, read off the graph.

Two frames are known. In the *sorted* frame rows are grouped by expert: row r is pair `order[r]`, with
`order` from a sort of the flat ids. In the *flat* frame row t * K + k is slot k of token t, and each
row gathers its own copy of a weight.

Letters: T tokens, K experts per token, R = T * K rows, E experts.
"""

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    arg,
    aten,
    constant,
    has_val,
    is_call,
    operands,
    prims,
    same,
    strip,
    val,
)

SORTS = (aten.sort.default, aten.sort.stable)
CLAMPS = (aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default)


@dataclass(frozen=True)
class Dispatch:
    """One frame: the flat ids [R], and the sort of them if the frame is sorted."""

    ids: fx.Node  # integer, R elements, in flat order
    top_k: int
    sort: fx.Node | None = None

    def is_order(self, node: Any) -> bool:
        """Is `node` the flat (token, slot) index of each sorted row?"""
        return self.sort is not None and _is_output(node, self.sort, 1)

    def is_expert_of_row(self, node: Any) -> bool:
        """Is `node` the expert id of each row, perhaps clamped into range?"""
        node = strip(node, *CLAMPS, *CASTS)
        if self.sort is not None:
            return _is_output(node, self.sort, 0)
        return strip(node, *RESHAPES) is strip(strip(self.ids, *CLAMPS, *CASTS), *RESHAPES)

    def is_token_of_row(self, node: Any) -> bool:
        """Is `node` the token of each row: order // K?"""
        if is_call(node, aten.div.Tensor_mode, aten.floor_divide.default):
            floor = arg(node, 2, "rounding_mode", "floor") in ("floor", "trunc")  # order >= 0
            return floor and self.is_order(node.args[0]) and node.args[1] == self.top_k
        return False

    def is_inverse(self, node: Any) -> bool:
        """Is `node` the inverse of the order: index_put(_, [order], iota), or a sort of the order?"""
        if is_call(node, aten.index_put.default, aten.index_put_.default):
            (index, *more), values = node.args[1], node.args[2]
            accumulate = arg(node, 3, "accumulate", False)
            return not (more or accumulate) and self.is_order(index) and _is_iota(values)
        if is_call(node, aten.scatter.src):
            return self.is_order(node.args[2]) and _is_iota(node.args[3])
        if is_call(node, operator.getitem) and is_call(node.args[0], *SORTS):
            return node.args[1] == 1 and ascending(node.args[0]) and self.is_order(node.args[0].args[0])
        return False

    def is_unowned_mask(self, node: Any, num_experts: int) -> bool:
        """Is `node` true just for the rows whose id is E or more?"""
        node = strip(node, *SQUEEZES, *RESHAPES, aten.expand.default)
        if not is_call(node, aten.ge.Scalar) or node.args[1] != num_experts:
            return False
        return self.sort is not None and _is_output(node.args[0], self.sort, 0)

    def zeroes_unowned(self, node: Any, num_experts: int) -> bool:
        """Is `node` where(unowned, 0, x)?"""
        return (
            is_call(node, aten.where.self)
            and constant(node.args[1]) == 0
            and self.is_unowned_mask(node.args[0], num_experts)
        )

    def unmask(self, node: Any, num_experts: int) -> Any:
        """x of where(unowned, 0, x)."""
        return node.args[2] if self.zeroes_unowned(node, num_experts) else node

    def counts_rows(self, offsets: Any, num_experts: int) -> bool:
        """Are `offsets` [E] the inclusive ends of each expert's rows in the sorted frame?"""
        offsets = strip(offsets, *CASTS)
        if not is_call(offsets, aten.cumsum.default) or arg(offsets, 1, "dim") not in (0, -1):
            return False
        counts = strip(offsets.args[0], *CASTS)
        if is_call(counts, aten.histc.default):
            bins, low, high = (arg(counts, i, n) for i, n in ((1, "bins"), (2, "min"), (3, "max")))
            source = strip(counts.args[0], *CASTS)
            in_range = (bins, low, high) == (num_experts, 0, num_experts - 1)
            return in_range and (self._is_ids(source) or self.is_expert_of_row(source))
        if is_call(counts, aten.bincount.default):
            return self._is_ids(counts.args[0]) or self.is_expert_of_row(counts.args[0])
        return self._sums_one_hot(counts, num_experts)

    def _sums_one_hot(self, counts: Any, num_experts: int) -> bool:
        """Is `counts` the column sum of zeros [T, E] with True scattered at the ids?"""
        if not is_call(counts, aten.sum.dim_IntList) or list(counts.args[1]) != [0]:
            return False
        hot = strip(counts.args[0], *CASTS)
        if not is_call(hot, aten.scatter.value) or not same(val(hot).shape[1], num_experts):
            return False
        base, dim, index, one = hot.args
        return constant(base) == 0 and dim in (1, -1) and one == 1 and self._is_ids(index)

    def _is_ids(self, node: Any) -> bool:
        return strip(node, *RESHAPES, *CASTS) is strip(self.ids, *RESHAPES, *CASTS)


def sorted_dispatch(order: Any, top_k: int) -> Dispatch | None:
    """The sorted frame whose order is `order`, if it is one."""
    if not (is_call(order, operator.getitem) and order.args[1] == 1):
        return None
    sort = order.args[0]
    if not (is_call(sort, *SORTS) and ascending(sort) and val(sort.args[0]).ndim == 1):
        return None
    return Dispatch(sort.args[0], top_k, sort)


def ascending(sort: fx.Node) -> bool:
    """Does the sort go up?"""
    descending = arg(sort, 3, "descending", False) if is_call(sort, aten.sort.stable) else arg(
        sort, 2, "descending", False
    )
    return not descending


def in_range(ids: Any, num_experts: int) -> bool:
    """Is every id proved to be in [0, E): from a top-k over at most E values, or clamped?"""
    ids = strip(ids, *RESHAPES, *SQUEEZES, *CASTS, *COPIES)
    if is_call(ids, aten.clamp_max.default) and is_call(ids.args[0], aten.clamp_min.default):
        return bool(ids.args[0].args[1] >= 0 and ids.args[1] < num_experts)
    if is_call(ids, aten.clamp.default):
        low, high = arg(ids, 1, "min"), arg(ids, 2, "max")
        return low is not None and high is not None and low >= 0 and high < num_experts
    if not (is_call(ids, operator.getitem) and ids.args[1] == 1):
        return False
    choice = ids.args[0]
    if not is_call(choice, aten.topk.default):
        return False
    scores = choice.args[0]
    size = val(scores).shape[arg(choice, 2, "dim", -1)]
    return isinstance(size, int) and size <= num_experts


def repeated_tokens(node: Any, top_k: int) -> fx.Node | None:
    """x of x.repeat_interleave(K, 0) as [R, H] or x.unsqueeze(1).expand(T, K, H), else None."""
    node = strip(node, *COPIES, *RESHAPES)
    node = strip(node, *COPIES)
    if not is_call(node, aten.expand.default):
        return None
    x = node.args[0]
    if not is_call(x, aten.unsqueeze.default) or x.args[1] not in (1, -2):
        return None
    source = x.args[0]
    shape = val(node).shape
    if val(source).ndim == 2 and len(shape) == 3 and same(shape[1], top_k):
        return source  # type: ignore[no-any-return]
    return None


def _is_output(node: Any, call: fx.Node, index: int) -> bool:
    return is_call(node, operator.getitem) and node.args[0] is call and node.args[1] == index


def _is_iota(node: Any) -> bool:
    if not (is_call(node, prims.iota.default) and has_val(node)):
        return False
    return (arg(node, 1, "start", 0), arg(node, 2, "step", 1)) == (0, 1) or (
        node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
    )


__all__ = [
    "CLAMPS",
    "SORTS",
    "Dispatch",
    "in_range",
    "operands",
    "repeated_tokens",
    "sorted_dispatch",
]
