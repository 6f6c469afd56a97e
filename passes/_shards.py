"""Own parts of what all ranks hold: reduce or gather no more than what each keeps.

`moe_compile.parallel.shard` says "the own part" without naming the rank, so that the graph is the
same on all ranks and all rewrite alike.
"""

from typing import Any

import torch
from torch import fx

from moe_compile.passes._collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    SHARD,
    Collective,
    group_of,
    reduce_scatter,
)
from moe_compile.passes._elide import Rewriter, first_dim_of
from moe_compile.passes._graph import CASTS, args, aten, call, has_val, is_call, same, val

_ROW_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var_mean.correction)


def push_shards_up(r: Rewriter, c: Collective) -> None:
    """shard(all_gather(x)) = x, and shard(all_reduce(x)) = reduce_scatter(x).

    The second also where row-wise ops stand between, such as a residual add and an RMS norm: part r
    of f(x, y) is f of part r of x and part r of y, whatever y is on other ranks. Only if nothing
    wants the whole, which would be reduced anyway.
    """
    if c.target is ALL_GATHER:
        for user in list(c.value.users):
            if is_call(user, SHARD) and group_of(user) == c.group and args(user)[1] == 0:
                r.swap(user, c.source, "the own part of an all-gather is the rank's own value")
    elif c.target is ALL_REDUCE and c.op in ("sum", "avg"):
        _scatter(r, c)


def _scatter(r: Rewriter, c: Collective) -> None:
    region, shards = _region(c)
    if not shards:
        return
    if len({(args(s)[1] % val(s).ndim, val(args(s)[0]).ndim) for s in shards}) > 1:
        return
    dim = args(shards[0])[1] % val(shards[0]).ndim
    if reason := _why_not(c, region, dim):
        r.decline(c.value, reason)
        return
    if not r.allows(c):
        return
    parts = _Parts(r, c, dim)
    for node in region:
        with r.graph.inserting_before(node):
            parts.of[node] = parts.computed(node)
    for shard in shards:
        if args(shard)[0] is c.value:
            parts.reduced()
    between = f" before {len(region)} row-wise ops" if region else ""
    for shard in shards:
        r.swap(shard, parts.of[args(shard)[0]], f"all-reduce becomes a reduce-scatter{between}")
        r.prune(shard)


def _region(c: Collective) -> tuple[list[fx.Node], list[fx.Node]]:
    """The row-wise ops after `c` in order, and the shards that all of it ends in; else nothing."""
    inside: dict[fx.Node, None] = {}
    shards: dict[fx.Node, None] = {}
    todo = [c.value]
    while todo:
        for user in todo.pop().users:
            if is_call(user, SHARD) and group_of(user) == c.group:
                shards[user] = None
            elif _is_row_wise(user) and user not in inside:
                inside[user] = None
                todo.append(user)
            elif user not in inside:
                return [], []
    order = {node: i for i, node in enumerate(c.value.graph.nodes)}
    return sorted(inside, key=order.__getitem__), sorted(shards, key=order.__getitem__)


def _is_row_wise(node: fx.Node) -> bool:
    if not has_val(node):
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:  # other numbers for other rows
        return False
    return torch.Tag.pointwise in tags or is_call(node, *CASTS, *_ROW_REDUCTIONS)


def _why_not(c: Collective, region: list[fx.Node], dim: int) -> str:
    if not first_dim_of(c.value, dim):
        return f"the own part is taken along dim {dim}; a reduce-scatter goes along the first"
    rows, ndim = val(c.value).shape[dim], val(c.value).ndim
    for node in region:
        reduces = is_call(node, *_ROW_REDUCTIONS)
        if val(node).ndim != ndim or not same(val(node).shape[dim], rows):
            return "the ops between all-reduce and own part do not go row by row"
        if reduces and any(d % ndim == dim for d in args(node)[1]):
            return "the ops between all-reduce and own part do not go row by row"
    return ""


def _has_rows(x: fx.Node, dim: int, ndim: int) -> bool:
    """Does an operand, broadcast from the right, run along the rows?"""
    mine = dim - (ndim - val(x).ndim)
    return mine >= 0 and not same(val(x).shape[mine], 1)


class _Parts:
    """The own parts of values, computed from the own part of the sum."""

    def __init__(self, r: Rewriter, c: Collective, dim: int) -> None:
        self.of: dict[fx.Node, fx.Node] = {}
        self._r, self._c, self._dim = r, c, dim

    def reduced(self) -> fx.Node:
        """The own part of the sum, by one reduce-scatter."""
        r, c = self._r, self._c
        if c.value not in self.of:
            source, shape = c.source, list(val(c.value).shape)
            with r.graph.inserting_before(c.value.next):
                if self._dim:
                    flat = shape[self._dim :]
                    source = call(r.graph, aten.reshape.default, source, flat, like=c.value)
                part = reduce_scatter(r.graph, source, c.op, c.group, c.value)
                if self._dim:
                    shape[self._dim] = shape[self._dim] // c.group.size
                    part = call(r.graph, aten.reshape.default, part, shape, like=c.value)
            self.of[c.value] = part
        return self.of[c.value]

    def computed(self, node: fx.Node) -> fx.Node:
        """A row-wise op on own parts."""
        target: Any = node.target
        mapped: Any = fx.map_arg((node.args, node.kwargs), lambda x: self._part(x, node))
        given, named = mapped
        return call(self._r.graph, target, *given, like=node, **named)

    def _part(self, x: fx.Node, reader: fx.Node) -> fx.Node:
        c = self._c
        if x is c.value:
            return self.reduced()
        if x not in self.of:
            ndim = val(c.value).ndim
            if not _has_rows(x, self._dim, ndim):
                return x
            dim = self._dim - (ndim - val(x).ndim)
            self.of[x] = call(self._r.graph, SHARD, x, dim, c.group.size, c.group.name, like=reader)
        return self.of[x]
