"""How every value of a graph lies on the ranks of every group: replicated, partial sum, shards.

An abstract interpretation of the functional graph. Facts come from collectives, from marks
(`moe_compile.parallel.mark_replicated` and its like), from DTensor parameters, and from ops whose
meaning is known; the rules of the ops stand in _transfer.py. Every rank runs the same program, on
groups that form one mesh: that is assumed, and what a rank could do on its own (`x[rank * k :]`, an
integer that could be its index) is unknown.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moe_compile.passes._collectives import (
    _PLAIN,
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    COLLECTIVES,
    MARK,
    REDUCE_SCATTER,
    SHARD,
    WAIT,
    Group,
    are_orthogonal,
    group_of,
    groups_of,
)
from moe_compile.passes._graph import args, has_val, is_call, val
from moe_compile.passes._here import Here
from moe_compile.passes._outcome import trail_of
from moe_compile.passes._placement import Placement, partial, replicated, shard, unknown
from moe_compile.passes._transfer import transfer
from moe_compile.passes._transfer_pointwise import is_divided

_KEY = "moe_compile_placements"


@dataclass(frozen=True)
class Finding:
    """A mistake: the node, its kind ("double reduce", ...) and what is wrong."""

    node: fx.Node
    kind: str
    text: str


def set_facts(node: fx.Node, facts: list[tuple[Group, Placement]]) -> None:
    """Say how the value of a placeholder lies on the ranks."""
    node.meta[_KEY] = facts


class Placements:
    """The placements of all values, and the mistakes that they show."""

    def __init__(self, graph: fx.Graph) -> None:
        facts = [g for n in graph.nodes for g, _ in n.meta.get(_KEY, ())]
        groups = dict.fromkeys([*groups_of(graph), *(g for g in facts if g.size > 1)])
        # Larger groups first: a smaller one may ask what is known of those around it.
        self.groups: list[Group] = sorted(groups, key=lambda g: -g.size)
        self.findings: list[Finding] = []
        self._known: dict[Group, dict[fx.Node, Any]] = {g: {} for g in self.groups}
        for node in graph.nodes if self.groups else ():
            for group in self.groups:
                self._known[group][node] = self._place(node, group)

    def of(self, node: Any, group: Group) -> Placement:
        """The placement of a node's value over a group of the graph."""
        found = self._known.get(group, {}).get(node)
        return (
            found if isinstance(found, Placement) else unknown("the graph does not name the group")
        )

    def _place(self, node: fx.Node, group: Group) -> Any:
        if node.op == "placeholder":
            return self._fact(node, group)
        if node.op == "output":
            self._check_outputs(node, group)
        if node.op != "call_function":
            return unknown("a constant of this rank's graph")
        if is_call(node, WAIT):
            return self._known[group][args(node)[0]]
        if is_call(node, *COLLECTIVES):
            return self._collective(node, group)
        if is_call(node, MARK):
            return self._mark(node, group)
        if is_call(node, SHARD):
            return self._shard(node, group)
        made = node.args[0] if node.args else None
        if isinstance(made, fx.Node) and isinstance(self._known[group].get(made), list):
            several: list[Placement] = self._known[group][made]  # of a coalesced collective
            return several[int(args(node)[1])]

        def of(value: Any) -> Placement:
            found = self._known[group].get(value) if isinstance(value, fx.Node) else None
            return found if isinstance(found, Placement) else unknown("it is no tensor")

        return transfer(Here(node, group, of, self._report))

    def _report(self, node: fx.Node, kind: str, text: str) -> None:
        self.findings.append(Finding(node, kind, text))

    def _fact(self, node: fx.Node, group: Group) -> Placement:
        facts: list[tuple[Group, Placement]] = node.meta.get(_KEY, [])
        for g, p in facts:
            if g == group or (p.is_replicated and set(group.ranks) <= set(g.ranks)):
                return replace(p, origin=node)
        return unknown(f"nothing says how the input {node.name} lies on the ranks")

    def _mark(self, node: fx.Node, group: Group) -> Placement:
        x, kind, dim = args(node)[:3]
        marked = group_of(node)
        if marked == group:
            if kind == "shard":
                return shard(dim % val(node).ndim, node)
            return partial(node, exact=True) if kind == "partial" else replicated(node)
        if marked and kind == "replicated" and set(group.ranks) <= set(marked.ranks):
            return replicated(node)
        if marked and kind != "replicated" and len(set(marked.ranks) & set(group.ranks)) > 1:
            return unknown(f"it is marked for {marked}")
        return self._of(x, group)

    def _shard(self, node: fx.Node, group: Group) -> Placement:
        x, dim = args(node)[:2]
        found, mine = self._of(x, group), group_of(node)
        if mine == group and found.is_replicated:
            return shard(dim % val(node).ndim, node)
        if mine == group and found.is_partial:
            return unknown("shards of a partial sum")
        if mine is not None and are_orthogonal(mine, group):
            return found
        return unknown("shards over other ranks")

    def _of(self, node: Any, group: Group) -> Placement:
        found = self._known[group].get(node)
        return found if isinstance(found, Placement) else unknown("it is no tensor")

    # Collectives

    def _collective(self, node: fx.Node, group: Group) -> Any:
        target = _PLAIN.get(node.target)
        if target is None:
            return self._one(node, node.target, args(node)[0], group)
        return [self._one(node, target, x, group) for x in args(node)[0]]

    def _one(self, node: fx.Node, target: Any, x: fx.Node, group: Group) -> Placement:
        over, found = group_of(node), self._of(x, group)
        if over is None:
            return unknown("this process knows no such group")
        op = args(node)[1]
        if set(group.ranks) <= set(over.ranks):
            if target in (ALL_REDUCE, REDUCE_SCATTER) and op == "sum":
                self._check_sum(node, x, found, group, over)
            if target in (ALL_REDUCE, ALL_GATHER, BROADCAST):
                return replicated(node)
            same_group = target is REDUCE_SCATTER and over == group
            return shard(0, node) if same_group else unknown("a collective over more ranks")
        linear = target is not ALL_REDUCE or op in ("sum", "avg")
        if set(over.ranks) < set(group.ranks):
            return self._inside(node, target, found, group, over, linear)
        if not are_orthogonal(over, group) or not linear or target not in _MESH:
            return unknown("a collective over ranks of no mesh with these")
        first_dim = found.is_shard and found.dim == 0 and target is not ALL_REDUCE
        return unknown("shards that another group joins") if first_dim else found

    def _inside(
        self, node: fx.Node, target: Any, found: Placement, group: Group, over: Group, linear: bool
    ) -> Placement:
        """A collective over a part of the ranks of `group`."""
        if found.is_replicated and target in (ALL_REDUCE, ALL_GATHER, BROADCAST):
            return found
        if not (found.is_partial and target is ALL_REDUCE and linear):
            return unknown("a collective over some of these ranks")
        inner = (*found.inner, over)
        covered = 1
        for g in inner:
            covered *= g.size
        apart = all(are_orthogonal(a, b) for a in inner for b in inner if a is not b)
        if apart and covered == group.size:
            return replicated(node)
        return replace(found, inner=inner)

    def _check_sum(
        self, node: fx.Node, x: fx.Node, found: Placement, group: Group, over: Group
    ) -> None:
        name = "all-reduce" if "all_reduce" in str(node.target) else "reduce-scatter"
        if found.is_replicated and not found.nth and not is_divided(node, group.size):
            since, times = _from(found), f"counted {group.size} times"
            text = f"{name} over {over} of a value that {{}} hold already{since}: {times}"
            if over == group:
                self._report(node, "double reduce", text.format("all of them"))
            elif not self.of(x, over).is_replicated:
                self._report(node, "wrong group", text.format(group))
        if found.is_partial and found.exact and over != group:
            covered = 1
            for other in self.groups:
                if set(other.ranks) <= set(over.ranks) and self._of(x, other).is_partial:
                    covered *= other.size
            if covered < over.size:
                text = f"{name} over {over} of a partial sum over {group} alone{_from(found)}"
                self._report(node, "wrong group", text)

    def _check_outputs(self, node: fx.Node, group: Group) -> None:
        returned = args(node)[0]
        for value in returned if isinstance(returned, (list, tuple)) else [returned]:
            if not has_val(value) or not (found := self._of(value, group)).is_partial:
                continue
            if not is_call(value, MARK):  # marked last of all: that is meant
                text = f"a sum over {group} that is still to be reduced is returned{_from(found)}"
                self._report(value, "missing reduce", text)


_MESH = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)


def _from(found: Placement) -> str:
    source = trail_of(found.origin, 1) if found.origin is not None else ""
    return f" (since {source})" if source else ""
