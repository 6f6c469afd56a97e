"""Collectives in a graph: what they are, over which ranks, and how to make new ones."""

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._process_groups import process_group, world_group
from moe_compile.passes._graph import args, aten, call, has_val, is_call, same_shape, val

c10d = torch.ops._c10d_functional

WAIT = c10d.wait_tensor.default
ALL_REDUCE = c10d.all_reduce.default
REDUCE_SCATTER = c10d.reduce_scatter_tensor.default
ALL_GATHER = c10d.all_gather_into_tensor.default
BROADCAST = c10d.broadcast.default
SHARD = moe.shard.default
MARK = moe.mark_placement.default

_GROUP_AT: dict[Any, int] = {  # the argument that names the group
    ALL_REDUCE: 2,
    c10d.all_reduce_coalesced.default: 2,
    REDUCE_SCATTER: 3,
    c10d.reduce_scatter_tensor_coalesced.default: 3,
    ALL_GATHER: 2,
    c10d.all_gather_into_tensor_coalesced.default: 2,
    BROADCAST: 2,
    c10d.all_to_all_single.default: 3,
}
COLLECTIVES = tuple(_GROUP_AT)
_PLAIN: dict[Any, Any] = {  # coalesced form: the form for one tensor
    c10d.all_reduce_coalesced.default: ALL_REDUCE,
    c10d.reduce_scatter_tensor_coalesced.default: REDUCE_SCATTER,
    c10d.all_gather_into_tensor_coalesced.default: ALL_GATHER,
}


@dataclass(frozen=True)
class Group:
    """The ranks that take part, in their order. Two names may stand for the same ranks.

    arg: what collectives in the graph name the group by: a string, or the node of one.
    """

    ranks: tuple[int, ...]
    arg: Any = field(compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def name(self) -> str:
        return self.arg if isinstance(self.arg, str) else str(self.arg.meta["val"].group_name)

    def __str__(self) -> str:
        ranks = self.ranks
        return f"ranks {ranks[0]} to {ranks[-1]}" if _is_run(ranks) else f"ranks {list(ranks)}"


def _is_run(ranks: tuple[int, ...]) -> bool:
    return len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1))


@dataclass(frozen=True)
class Collective:
    """One value that a collective gave, seen through the wait for it."""

    value: fx.Node  # what the wait returns
    call: fx.Node  # the collective, perhaps of several tensors at once
    target: Any  # ALL_REDUCE, ... : the form for one tensor
    source: fx.Node  # what this rank gave
    group: Group

    @property
    def op(self) -> str:
        """ "sum", "avg", "max", ... of a reduction."""
        return str(args(self.call)[1])


def group_of(node: fx.Node) -> Group | None:
    """The group of a collective, a shard or a mark; None where the process knows of none."""
    index = 3 if node.target in (SHARD, MARK) else _GROUP_AT.get(node.target)
    return None if index is None else resolve(args(node)[index])


def resolve(arg: Any) -> Group | None:
    """The group by the name that stands in the graph."""
    name = arg if isinstance(arg, str) else arg.meta["val"].group_name
    try:
        group = process_group(name)
    except (RuntimeError, KeyError, ValueError):
        return None
    return Group(tuple(dist.get_process_group_ranks(group)), arg)


def world() -> Group | None:
    """All ranks, if there are several processes."""
    if not dist.is_initialized():
        return None
    group = world_group()
    return Group(tuple(dist.get_process_group_ranks(group)), group.group_name)


def collective_of(node: Any, *targets: Any) -> Collective | None:
    """What `node` waits for, if that is one of `targets`, or any collective where none is named."""
    value = look_through_copies(node)
    if not is_call(value, WAIT):
        return None
    made, index = args(value)[0], None
    if is_call(made, operator.getitem):
        made, index = args(made)
    if not is_call(made, *COLLECTIVES) or (group := group_of(made)) is None:
        return None
    target = _PLAIN.get(made.target, made.target)
    if targets and target not in targets:
        return None
    source = args(made)[0] if index is None else args(made)[0][index]
    return Collective(value, made, target, source, group)


def look_through_copies(node: Any) -> Any:
    """In-place collectives are traced as copies of what they return over what they were given."""
    while (
        is_call(node, aten.copy.default)
        and val(args(node)[0]).dtype == val(args(node)[1]).dtype
        and same_shape(args(node)[0], val(args(node)[1]).shape)
    ):
        node = args(node)[1]
    return node


def collectives(graph: fx.Graph) -> list[Collective]:
    """All of them, in the graph's order."""
    found = [collective_of(n) for n in graph.nodes if is_call(n, WAIT) and has_val(n)]
    return [c for c in found if c is not None]


def groups_of(graph: fx.Graph) -> list[Group]:
    """Every group that the graph names, in order of appearance, which is equal on all ranks."""
    named = [n for n in graph.nodes if is_call(n, *COLLECTIVES, SHARD, MARK)]
    found = [g for n in named if (g := group_of(n)) is not None]
    return list(dict.fromkeys(g for g in found if g.size > 1))


def all_reduce(graph: fx.Graph, x: fx.Node, op: str, group: Group, like: fx.Node) -> fx.Node:
    """A new all-reduce and the wait for it, where the graph inserts."""
    made = call(graph, ALL_REDUCE, x, op, group.arg, like=like)
    return call(graph, WAIT, made, like=like)


def reduce_scatter(graph: fx.Graph, x: fx.Node, op: str, group: Group, like: fx.Node) -> fx.Node:
    """A new reduce-scatter along the first dim and the wait for it."""
    made = call(graph, REDUCE_SCATTER, x, op, group.size, group.arg, like=like)
    return call(graph, WAIT, made, like=like)


def are_orthogonal(a: Group, b: Group) -> bool:
    """Do two groups meet in one rank only, as rows and columns of a mesh do?"""
    return len(set(a.ranks) & set(b.ranks)) == 1


def product_ranks(a: Group, b: Group) -> tuple[int, ...] | None:
    """The ranks of the mesh that two groups span, both of even steps; None if they span none."""
    (me, *others) = set(a.ranks) & set(b.ranks)
    if others or not (_even(a.ranks) and _even(b.ranks)):
        return None
    spanned = {x + y - me for x in a.ranks for y in b.ranks}
    return tuple(sorted(spanned)) if len(spanned) == a.size * b.size else None


def _even(ranks: tuple[int, ...]) -> bool:
    return len({y - x for x, y in itertools.pairwise(ranks)}) == 1
