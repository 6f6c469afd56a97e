"""Rules for one collective, or one on top of another. n is the number of ranks, v_r rank r's value.

Each returns after at most one rewrite; `elide_all_reduces` tries them until none holds.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from moe_compile.passes._collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    SHARD,
    WAIT,
    Collective,
    all_reduce,
    collective_of,
    groups_of,
    product_ranks,
    reduce_scatter,
    world,
)
from moe_compile.passes._constants import escapes
from moe_compile.passes._graph import args, aten, call, is_call, val
from moe_compile.passes._outcome import Outcome
from moe_compile.passes.placements import Placements

_EQUAL_OPS = ("avg", "max", "min")  # of equal values these are the value


class Rewriter:
    """One graph while rules change it. `placements` are those at the start of a round."""

    placements: Placements

    def __init__(self, graph: fx.Graph, outcome: Outcome, may_reassociate: bool) -> None:
        self.graph = graph
        self.outcome = outcome
        self.may_reassociate = may_reassociate
        self.declined: dict[fx.Node, str] = {}
        self.count = 0

    def swap(self, old: fx.Node, new: fx.Node, detail: str) -> None:
        """Use `new` for `old`. A caller must not get memory that it also holds otherwise."""
        self.outcome.rewrote(old, detail)
        self.count += 1
        if escapes(old) and (new.op == "placeholder" or new.users):
            with self.graph.inserting_before(old):
                new = call(self.graph, aten.clone.default, new, like=old)
        old.replace_all_uses_with(new)
        self.drop(old)

    def drop(self, value: fx.Node) -> None:
        """Erase a wait that nothing uses, which plain dead-code elimination keeps, and its call."""
        if value._erased or value.users or not is_call(value, WAIT):
            return
        made = args(value)[0]
        self.graph.erase_node(value)
        while isinstance(made, fx.Node) and not made.users and made.op == "call_function":
            source = args(made)[0]
            self.graph.erase_node(made)
            made = source if is_call(source, *_CALLS) else None

    def prune(self, node: fx.Node) -> None:
        """Erase a node that nothing uses any more, and what only it used."""
        todo = [node]
        while todo:
            node = todo.pop()
            if node._erased or node.users or node.op != "call_function":
                continue
            if is_call(node, WAIT):
                self.drop(node)
            else:
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                todo += inputs

    def decline(self, node: fx.Node, reason: str) -> None:
        self.declined[node] = reason

    def tell_declined(self) -> None:
        for node, reason in self.declined.items():
            if not node._erased:
                self.outcome.decline(node, reason)

    def allows(self, found: Collective, exact: bool = False) -> bool:
        """May a rewrite here add up in another order?"""
        if exact or self.may_reassociate:
            return True
        self.decline(found.value, "it would add up in another order, and exactness=bitwise")
        return False

    def scaled(self, x: fx.Node, factor: int, like: fx.Node) -> fx.Node:
        """factor * x, where the graph inserts."""
        return x if factor == 1 else call(self.graph, aten.mul.Tensor, x, factor, like=like)


def drop_unused(r: Rewriter, c: Collective) -> None:
    """A collective whose result is unused does nothing; every rank sees that it is unused."""
    if not c.value.users:
        r.outcome.rewrote(c.value, f"unused {_name(c)} gone")
        r.count += 1
        r.drop(c.value)


def share_equal(r: Rewriter, c: Collective) -> None:
    """Two equal collectives of one value give equal results."""
    waits = [w for made in c.source.users for w in made.users if is_call(w, WAIT)]
    for other in map(collective_of, waits):
        if other is None or not other.value < c.value:
            continue
        equal = (other.target, other.source, other.group) == (c.target, c.source, c.group)
        if equal and args(other.call)[1] == args(c.call)[1]:
            r.swap(c.value, other.value, f"{_name(c)} done once")
            return


def gather_of_scatter(r: Rewriter, c: Collective) -> None:
    """all_gather(reduce_scatter(x)) = all_reduce(x): part r of the sum, joined in order of r."""
    inner = collective_of(c.source, REDUCE_SCATTER)
    if c.target is not ALL_GATHER or inner is None or inner.group != c.group:
        return
    if len(inner.value.users) > 1:
        r.decline(c.value, "the parts of the reduce-scatter below are used elsewhere, too")
    elif r.allows(c):
        with r.graph.inserting_before(c.value):
            new = all_reduce(r.graph, inner.source, inner.op, c.group, c.value)
        r.swap(c.value, new, "all-gather of a reduce-scatter becomes an all-reduce")
        r.drop(inner.value)


def scatter_of_gather(r: Rewriter, c: Collective) -> None:
    """reduce_scatter(all_gather(x)) = n x: all hold the same, of which part r is x_r."""
    inner = collective_of(c.source, ALL_GATHER)
    if c.target is not REDUCE_SCATTER or inner is None or inner.group != c.group:
        return
    n = c.group.size if c.op == "sum" else 1
    if (c.op == "sum" or c.op in _EQUAL_OPS) and r.allows(c, exact=_is_exact(n, c.op)):
        with r.graph.inserting_before(c.value):
            new = r.scaled(inner.source, n, c.value)
        r.swap(c.value, new, "reduce-scatter of an all-gather is each rank's own value")


def reduce_of_replicated(r: Rewriter, c: Collective) -> None:
    """Of n equal values the sum is n v, and the average, the greatest and the least are v."""
    if c.target not in (ALL_REDUCE, REDUCE_SCATTER) or not _is_surely_replicated(r, c):
        return
    n = c.group.size if c.op == "sum" else 1
    if not (c.op == "sum" or c.op in _EQUAL_OPS) or not r.allows(c, exact=_is_exact(n, c.op)):
        return
    with r.graph.inserting_before(c.value):
        v = c.source
        if c.target is REDUCE_SCATTER:
            below = collective_of(c.source, ALL_REDUCE)
            private = below is not None and len(below.value.users) == 1 and below.op == c.op
            if below is not None and private and below.group == c.group and r.may_reassociate:
                # The parts are all that is wanted: sum them where they are wanted.
                v = reduce_scatter(r.graph, below.source, c.op, c.group, c.value)
            else:
                v = call(r.graph, SHARD, v, 0, c.group.size, c.group.name, like=c.value)
        new = r.scaled(v, n, c.value)
    r.swap(c.value, new, f"{_name(c)} of a value that all ranks hold is {n} times that value")


def gather_of_replicated(r: Rewriter, c: Collective) -> None:
    """all_gather of n equal values is n copies, which every rank can make."""
    if c.target is ALL_GATHER and _is_surely_replicated(r, c):
        with r.graph.inserting_before(c.value):
            new = call(r.graph, aten.cat.default, [c.source] * c.group.size, 0, like=c.value)
        r.swap(c.value, new, "all-gather of a value that all ranks hold is copies of it")


def reduce_over_product(r: Rewriter, c: Collective) -> None:
    """Sums over rows, then over columns, of a mesh are one sum over it.

    Where a group of just these ranks exists on every rank: all ranks of the job, or a group that
    the graph names elsewhere (and so, on the other ranks, theirs).
    """
    inner = collective_of(c.source, ALL_REDUCE)
    if c.target is not ALL_REDUCE or inner is None or inner.op != c.op or c.op == "product":
        return
    if inner.group == c.group or (ranks := product_ranks(inner.group, c.group)) is None:
        return
    known = [g for g in (world(), *groups_of(r.graph)) if g is not None]
    group = next((g for g in known if tuple(sorted(g.ranks)) == ranks), None)
    if group is None:
        r.decline(c.value, f"no group of ranks {list(ranks)} is known on every rank")
    elif len(inner.value.users) > 1:
        r.decline(c.value, f"the sum over {inner.group} alone is used elsewhere, too")
    elif r.allows(c, exact=c.op in ("max", "min")):
        with r.graph.inserting_before(c.value):
            new = all_reduce(r.graph, inner.source, c.op, group, c.value)
        r.swap(c.value, new, f"all-reduces over two groups become one over {group}")
        r.drop(inner.value)


Rule = Callable[[Rewriter, Collective], None]
ELISIONS: tuple[Rule, ...] = (
    drop_unused,
    share_equal,
    gather_of_scatter,
    scatter_of_gather,
    reduce_of_replicated,
    gather_of_replicated,
    reduce_over_product,
)

_CALLS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)


def _is_surely_replicated(r: Rewriter, c: Collective) -> bool:
    found = r.placements.of(c.source, c.group)
    return found.is_replicated and found.sure


def _is_exact(n: int, op: str) -> bool:
    """Is the sum, or the average, of n equal values exact however it is added up?"""
    return op in ("max", "min") or (n & (n - 1) == 0 and op == "sum")


def _name(c: Collective) -> str:
    return {
        ALL_REDUCE: "all-reduce",
        ALL_GATHER: "all-gather",
        REDUCE_SCATTER: "reduce-scatter",
    }.get(c.target, str(c.target))


def is_whole(x: Any) -> bool:
    """Could this literal be a rank's index?"""
    return isinstance(x, (bool, int))


def first_dim_of(x: fx.Node, dim: int) -> bool:
    """Are all dims of `x` in front of `dim` of size 1?"""
    return all(isinstance(s, int) and s == 1 for s in val(x).shape[:dim])
