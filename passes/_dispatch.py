"""How a model turns tokens into rows for its experts, read off the graph.

Two frames are known. In the *sorted* frame rows are grouped by expert: row r is pair `order[r]`,
with `order` from a sort of the flat ids. In the *flat* frame row t * K + k is slot k of token t,
and each row gathers its own copy of a weight.

Letters: T tokens, K experts per token, R = T * K rows, E experts.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_compile.passes._axes import Axis, Group, follow, group, views_of
from moe_compile.passes._graph import (
    COPIES,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    constant,
    is_call,
    is_exact_cast,
    prims,
    same,
    same_shape,
    strip,
    val,
)

SORTS = (aten.sort.default, aten.sort.stable)
LOWER = (aten.clamp_min.default,)
UPPER = (aten.clamp_max.default,)


@dataclass(frozen=True, eq=False)
class Dispatch:
    """One frame: the ids, R integers in flat order, and the sort of them if the frame is sorted."""

    ids: fx.Node
    num_tokens: Any
    top_k: int
    sort: fx.Node | None = None
    token: Axis = field(init=False)
    slot: Axis = field(init=False)
    row: Axis = field(init=False)

    def __post_init__(self) -> None:
        for name, size in ("token", self.num_tokens), ("slot", self.top_k), ("row", self.num_rows):
            object.__setattr__(self, name, Axis(size))

    @property
    def num_rows(self) -> Any:
        return self.num_tokens * self.top_k

    @property
    def rows(self) -> Group:
        """The axes that number the rows."""
        return group(self.row) if self.sort is not None else group(self.token, self.slot)

    def is_order(self, node: Any) -> bool:
        """Is `node` the flat (token, slot) index of each sorted row?"""
        return self.sort is not None and _is_output(exact(node), self.sort, 1)

    def is_expert_of_row(self, node: Any, num_experts: int) -> bool:
        """Is `node` the expert of each row, wherever that is one of E?"""
        if self.sort is None:
            return same_ids(node, self.ids)
        node = _unclamp(exact(node), num_experts)
        if is_call(node, aten.index.Tensor) and len(args(node)[1]) == 1:  # ids[order]
            ids, (order,) = args(node)
            return val(ids).ndim == 1 and self.is_order(order) and same_ids(ids, self.ids)
        return _is_output(node, self.sort, 0)

    def is_token_of_row(self, node: Any) -> bool:
        """Is `node` the token of each row: order // K?"""
        node = exact(node)
        if not is_call(node, aten.div.Tensor_mode, aten.floor_divide.default):
            return False
        # floor and trunc are one for an order, which is never negative
        floors = arg(node, 2, "rounding_mode", "floor") in ("floor", "trunc")
        return floors and self.is_order(args(node)[0]) and same(args(node)[1], self.top_k)

    def is_inverse(self, node: Any) -> bool:
        """Is `node` the inverse of the order: iota put at the order, or a sort of the order?"""
        node = exact(node)
        if is_call(node, aten.index_put.default):
            return self.puts_back(node) and self._is_iota(args(node)[2])
        if is_call(node, aten.scatter.src):
            return self.is_order(args(node)[2]) and self._is_iota(args(node)[3])
        if is_call(node, operator.getitem) and is_call(args(node)[0], *SORTS):
            sort, index = args(node)
            return index == 1 and ascending(sort) and self.is_order(args(sort)[0])
        return False

    def puts_back(self, node: Any) -> bool:
        """Is `node` index_put(any, [order], y): y in flat order, whatever was there before?"""
        if not is_call(node, aten.index_put.default) or arg(node, 3, "accumulate", False):
            return False
        indices = args(node)[1]
        return (
            len(indices) == 1
            and self.is_order(indices[0])
            and same(val(node).shape[0], self.num_rows)
        )

    def _is_iota(self, node: Any) -> bool:
        node = exact(node)
        return _is_range(node, self.num_rows)

    def zeroes_unowned(self, node: Any, num_experts: int) -> bool:
        """Is `node` where(ids >= E, 0, x), with the sorted ids and one for each row of x?"""
        if self.sort is None or not is_call(node, aten.where.self):
            return False
        mask, zero, x = args(node)
        mask, views = views_of(mask)
        if not is_call(mask, aten.ge.Scalar) or args(mask)[1] != num_experts or constant(zero) != 0:
            return False
        axes = follow((group(self.row),), views)
        leads = axes == (group(self.row), *((),) * (val(node).ndim - 1))
        return leads and same_shape(x, val(node).shape) and _is_output(args(mask)[0], self.sort, 0)

    def unmask(self, node: Any, num_experts: int) -> Any:
        """x of where(unowned, 0, x)."""
        return args(node)[2] if self.zeroes_unowned(node, num_experts) else node

    def counts_rows(self, offsets: Any, num_experts: int) -> bool:
        """Are `offsets` [E] the inclusive ends of each expert's rows in the sorted frame?"""
        if not same_shape(offsets, [num_experts]):
            return False
        offsets = exact(offsets)
        if is_call(offsets, aten.searchsorted.Tensor):
            keys, experts = args(offsets)
            right = offsets.kwargs.get("right", False) or offsets.kwargs.get("side") == "right"
            iota = _is_range(exact(experts), num_experts)
            return bool(right) and iota and _is_output(exact(keys), self.sort, 0)
        if not is_call(offsets, aten.cumsum.default) or arg(offsets, 1, "dim") not in (0, -1):
            return False
        if val(offsets).dtype not in _EXACT:
            return False
        counts = exact(args(offsets)[0])
        return self._is_histogram(counts, num_experts) or self._adds_ones(counts, num_experts)

    def _is_histogram(self, counts: Any, num_experts: int) -> bool:
        """Does `counts` [E] hold how many ids are e, by histc, bincount or a sum of one-hots?"""
        if is_call(counts, aten.histc.default):
            bounds = tuple(arg(counts, i, n) for i, n in ((1, "bins"), (2, "min"), (3, "max")))
            # torch takes min == max for "the range of the data"
            return (
                bounds == (num_experts, 0, num_experts - 1)
                and num_experts > 1
                and self._all_ids(counts)
            )
        if is_call(counts, aten.bincount.default):
            plain = arg(counts, 1, "weights") is None
            return plain and same_shape(counts, [num_experts]) and self._all_ids(counts)
        if not is_call(counts, aten.sum.dim_IntList):
            return False
        summed, dims = args(counts)[:2]
        rank = val(summed).ndim
        every = sorted(d % rank for d in dims) == list(range(rank - 1))
        if not every or not same(val(summed).shape[-1], num_experts):
            return False
        hot = exact(summed)
        if not same(val(hot).shape[-1], num_experts):
            return False
        return self._is_one_hot(hot, num_experts) or self._scatters_distinct(hot)

    def _is_one_hot(self, hot: Any, num_experts: int) -> bool:
        """Is `hot` ids[..., None] == iota(E), with all R ids?"""
        if is_call(hot, aten.where.self) and list(map(constant, args(hot)[1:])) == [1, 0]:
            hot = exact(args(hot)[0])
        if not is_call(hot, aten.eq.Tensor) or not same(val(hot).shape[-1], num_experts):
            return False
        ids, experts = args(hot)
        ids = strip(ids, aten.expand.default)
        whole = same(val(ids).shape[-1], 1) and same(val(ids).numel(), self.num_rows)
        return whole and _is_range(exact(experts), num_experts) and self._is_ids(ids)

    def _scatters_distinct(self, hot: Any) -> bool:
        """Is `hot` zeros [T, E] with ones at ids [T, K]? Equal ids count once: they must differ."""
        if not is_call(hot, aten.scatter.value) or len(hot.args) != 4:
            return False
        base, dim, index, one = args(hot)
        rows = (
            dim in (1, -1) and val(hot).ndim == 2 and same(val(index).shape[0], val(hot).shape[0])
        )
        return rows and constant(base) == 0 and one == 1 and self._is_ids(index) and distinct(index)

    def _adds_ones(self, counts: Any, num_experts: int) -> bool:
        """Is `counts` zeros [E] with a one added at each id?"""
        if is_call(counts, aten.scatter_add.default):
            base, _, index, ones = args(counts)
        elif is_call(counts, aten.index_put.default) and arg(counts, 3, "accumulate", False):
            base, (index,), ones = args(counts)[:3]
        else:
            return False
        whole = same(val(index).numel(), self.num_rows)
        return whole and constant(base) == 0 and constant(ones) == 1 and self._is_ids(index)

    def _all_ids(self, counts: fx.Node) -> bool:
        return self._is_ids(args(counts)[0])

    def _is_ids(self, node: Any) -> bool:
        """Has `node` the R ids in any order?"""
        return _is_output(exact(node), self.sort, 0) or same_ids(node, self.ids)


def sorted_dispatch(order: Any, num_tokens: Any, top_k: int) -> Dispatch | None:
    """The sorted frame whose order is `order`, if it is one."""
    order = exact(order)
    if not (is_call(order, operator.getitem) and args(order)[1] == 1):
        return None
    sort = args(order)[0]
    if not (is_call(sort, *SORTS) and ascending(sort)):
        return None
    ids = args(sort)[0]
    if not same_shape(ids, [num_tokens * top_k]) or val(ids).dtype not in (
        torch.int32,
        torch.int64,
    ):
        return None
    return Dispatch(ids, num_tokens, top_k, sort)


def ascending(sort: fx.Node) -> bool:
    """Does the sort go up?"""
    at = 3 if is_call(sort, aten.sort.stable) else 2
    return not arg(sort, at, "descending", False)


def exact(node: Any) -> Any:
    """An index before views and casts that keep its values and their order."""
    while is_call(node, *RESHAPES, *SQUEEZES, *COPIES) or is_exact_cast(node):
        node = node.args[0]
    return node


_EXACT = (torch.int32, torch.int64)


def same_ids(a: Any, b: Any) -> bool:
    """Are two indices one, after views, exact casts and equal clamps?"""
    a, b = exact(a), exact(b)
    if a is b:
        return True
    clamps = is_call(a, *LOWER, *UPPER, aten.clamp.default) and is_call(b, a.target)
    return (
        clamps
        and a.args[1:] == b.args[1:]
        and a.kwargs == b.kwargs
        and same_ids(a.args[0], b.args[0])
    )


def _bounds(node: Any) -> tuple[Any, Any]:
    """The low and the high bound of a clamp."""
    if is_call(node, *LOWER):
        return args(node)[1], None
    if is_call(node, *UPPER):
        return None, args(node)[1]
    return (
        (arg(node, 1, "min"), arg(node, 2, "max"))
        if is_call(node, aten.clamp.default)
        else (None, None)
    )


def _unclamp(node: Any, num_experts: int) -> Any:
    """An index before clamps that leave 0 to E - 1 as they are."""
    while is_call(node, *LOWER, *UPPER, aten.clamp.default):
        low, high = _bounds(node)
        if (low is not None and low > 0) or (high is not None and high < num_experts - 1):
            return node
        node = exact(args(node)[0])
    return node


def simplest_ids(ids: fx.Node, num_experts: int) -> fx.Node:
    """The ids before a clamp, where that is proved to change none of them."""
    raw = _unclamp(exact(ids), num_experts)
    return raw if val(raw).dtype in _EXACT and in_range(raw, num_experts) else ids


def in_range(ids: Any, num_experts: int) -> bool:
    """Is every id proved to be in [0, E): from a top-k over at most E values, or clamped?"""
    ids = exact(ids)
    low, high = False, False
    while is_call(ids, *LOWER, *UPPER, aten.clamp.default):
        # with every bound in [0, E), and one of each kind, the result is one or between two
        bounds = _bounds(ids)
        if any(b is not None and not 0 <= b < num_experts for b in bounds):
            return False
        low, high = low or bounds[0] is not None, high or bounds[1] is not None
        ids = exact(args(ids)[0])
    if low and high:
        return True
    topk = _topk(ids)
    if topk is None:
        return False
    size = val(args(topk)[0]).shape[arg(topk, 2, "dim", -1)]
    return isinstance(size, int) and size <= num_experts


def distinct(ids: Any) -> bool:
    """Are the ids of each token proved to differ: from one top-k over the last dim?"""
    shape, ids = val(ids).shape, exact(ids)
    topk = _topk(ids)
    if topk is None or not same_shape(ids, shape):
        return False
    return arg(topk, 2, "dim", -1) in (-1, val(ids).ndim - 1)


def _topk(ids: Any) -> fx.Node | None:
    """The top-k whose indices `ids` are."""
    if (
        is_call(ids, operator.getitem)
        and args(ids)[1] == 1
        and is_call(args(ids)[0], aten.topk.default)
    ):
        return args(ids)[0]  # type: ignore[no-any-return]
    return None


def never_negative(node: Any) -> bool:
    """Is every element of this index proved to be at least 0?"""
    node = exact(node)
    while is_call(node, aten.slice.Tensor, aten.div.Tensor_mode, aten.expand.default):
        if is_call(node, aten.div.Tensor_mode) and not _positive(args(node)[1]):
            return False
        node = exact(args(node)[0])
    if is_call(node, aten.remainder.Scalar):
        return _positive(args(node)[1])
    return is_call(node, operator.getitem) and args(node)[1] == 1 and is_call(args(node)[0], *SORTS)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def reads_tokens(node: Any, dispatch: Dispatch) -> fx.Node | None:
    """x [T, H] of x[token of row], rows in the sorted frame."""
    rows = strip(node, *COPIES)
    if not is_call(rows, aten.index.Tensor) or len(args(rows)[1]) != 1:
        return None
    x, (token,) = args(rows)
    found = val(x).ndim == 2 and val(token).ndim == 1 and dispatch.is_token_of_row(token)
    return x if found else None


def _is_range(node: Any, size: Any) -> bool:
    """Is `node` 0, 1, ... size - 1?"""
    if not is_call(node, prims.iota.default):
        return False
    length = args(node)[0]
    length = length.meta["val"] if isinstance(length, fx.Node) else length
    return same(length, size) and (node.kwargs["start"], node.kwargs["step"]) == (0, 1)


def _is_output(node: Any, call: fx.Node | None, index: int) -> bool:
    return is_call(node, operator.getitem) and args(node)[0] is call and args(node)[1] == index
