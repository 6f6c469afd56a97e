"""Sums of reduced values: reduce(a) + reduce(b) + c = reduce(a + b) + c.

Summing over ranks is linear, so that it may come after adding up, after multiplying with what is
equal on all ranks, and after views, which move numbers and change none. The routed and the shared
experts of a layer are the common case: two all-reduces become one. What is not reduced is added
once, afterwards, as before: inside it would be counted n times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.passes._collectives import (
    ALL_REDUCE,
    REDUCE_SCATTER,
    Collective,
    all_reduce,
    collective_of,
    look_through_copies,
    reduce_scatter,
)
from moe_compile.passes._elide import Rewriter, is_whole
from moe_compile.passes._graph import RESHAPES, SQUEEZES, args, aten, call, has_val, is_call, val

_VIEWS = (*RESHAPES, *SQUEEZES, aten.permute.default, aten.transpose.int)
_ADDS = (aten.add.Tensor, aten.sub.Tensor)
Steps = tuple[tuple[fx.Node, int], ...]  # nodes between reduced value and sum, and the operand


@dataclass(frozen=True)
class _Term:
    """One summand: a node, its sign, and what it was reduced from, if it was."""

    node: fx.Node
    sign: int
    reduced: Collective | None = None
    steps: Steps = ()


def reduce_sums_once(r: Rewriter, c: Collective) -> None:
    """Merge `c` with the other reductions of the sum that it is part of."""
    if c.target not in (ALL_REDUCE, REDUCE_SCATTER) or c.op not in ("sum", "avg"):
        return
    root = _root_of(c.value)
    if root is None:
        return
    terms = _terms(r, root, root, 1)
    key = (c.target, c.op, c.group)
    mine = [
        t for t in terms if t.reduced and (t.reduced.target, t.reduced.op, t.reduced.group) == key
    ]
    whole = [t for t in mine if t.reduced is not None and _is_used_once(t)]
    if len(mine) > 1 and len(whole) < len(mine):
        r.decline(c.value, "reduced values of one sum are used elsewhere, too")
    several = len({t.reduced.value for t in whole if t.reduced is not None}) > 1
    if not several or not any(t.reduced == c for t in whole) or not r.allows(c):
        return
    rest = [t for t in terms if t not in whole]
    with r.graph.inserting_before(root):
        inner = _added(r.graph, [(t.sign, _replayed(r.graph, t)) for t in whole], root)
        make: Callable[..., fx.Node] = all_reduce if c.target is ALL_REDUCE else reduce_scatter
        new = make(r.graph, inner, c.op, c.group, root)
        total = _added(r.graph, [(1, new), *((t.sign, t.node) for t in rest)], root)
    names = {ALL_REDUCE: "all-reduces", REDUCE_SCATTER: "reduce-scatters"}
    r.outcome.rewrote(root, f"{len(whole)} {names[c.target]} over {c.group} become one")
    r.count += 1
    root.replace_all_uses_with(total)
    r.prune(root)


def _root_of(value: fx.Node) -> fx.Node | None:
    """The last addition of the sum that `value` goes into."""
    root, node = None, value
    while len(node.users) == 1:
        (node,) = node.users
        if is_call(node, *_ADDS):
            root = node
        elif not is_call(node, *_VIEWS, aten.mul.Tensor, aten.div.Tensor, aten.copy.default):
            break
    return root


def _terms(r: Rewriter, node: Any, root: fx.Node, sign: int) -> list[_Term]:
    """The summands of `root`; sums inside of it are private to it."""
    private = node is root or len(node.users) == 1
    if private and is_call(node, *_ADDS) and _is_plain(node, root):
        a, b = args(node)[:2]
        minus = -sign if is_call(node, aten.sub.Tensor) else sign
        return _terms(r, a, root, sign) + _terms(r, b, root, minus)
    found, steps = _reduced(r, node)
    return [_Term(node, sign, found, steps)]


def _is_plain(node: fx.Node, root: fx.Node) -> bool:
    """a + b or a - b of tensors of the sum's own shape and dtype."""
    shape, dtype = val(root).shape, val(root).dtype
    operands = args(node)[:2]
    return not node.kwargs and all(
        has_val(x) and val(x).shape == shape and val(x).dtype == dtype for x in operands
    )


def _reduced(r: Rewriter, node: fx.Node) -> tuple[Collective | None, Steps]:
    """What was reduced below `node`, and the linear steps from there, the last one first."""
    steps: list[tuple[fx.Node, int]] = []
    while True:
        node = look_through_copies(node)
        if (found := collective_of(node, ALL_REDUCE, REDUCE_SCATTER)) is not None:
            # A view would change which part of the sum a rank keeps.
            fits = found.target is ALL_REDUCE or not any(is_call(s, *_VIEWS) for s, _ in steps)
            return (found, tuple(steps)) if fits else (None, ())
        operand = _linear_operand(r, node)
        if operand is None or len(node.users) > 1:
            return None, ()
        steps.append((node, operand))
        node = args(node)[operand]


def _linear_operand(r: Rewriter, node: fx.Node) -> int | None:
    """The operand in which `node` is linear, its other one being equal on all ranks."""
    if is_call(node, *_VIEWS):
        return 0
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    a, b = args(node)[:2]
    tries = ((0, a, b),) if is_call(node, aten.div.Tensor) else ((0, a, b), (1, b, a))
    for index, inner, other in tries:
        if not has_val(inner) or val(inner).dtype != val(node).dtype:
            continue
        if _reaches_reduction(inner) and _is_equal_on(r, inner, other):
            return index
    return None


def _reaches_reduction(node: Any) -> bool:
    while is_call(node, *_VIEWS, aten.mul.Tensor, aten.div.Tensor, aten.copy.default):
        if collective_of(node) is not None:
            return True
        node = args(node)[1] if is_call(node, aten.copy.default) else args(node)[0]
    return collective_of(node, ALL_REDUCE, REDUCE_SCATTER) is not None


def _is_equal_on(r: Rewriter, inner: fx.Node, factor: Any) -> bool:
    if not isinstance(factor, fx.Node):
        return not is_whole(factor)  # which could be a rank's index
    below = inner
    while collective_of(below) is None:
        below = args(below)[0]
    c = collective_of(below)
    if c is None or c.target is not ALL_REDUCE:
        return False
    found = r.placements.of(factor, c.group)
    return found.is_replicated and found.sure


def _is_used_once(t: _Term) -> bool:
    """Is the reduced value used for this sum alone?"""
    assert t.reduced is not None
    node = t.node
    while node is not t.reduced.value:
        if len(node.users) != 1:
            return False
        node = args(node)[1] if is_call(node, aten.copy.default) else _next(t, node)
    return len(node.users) == 1


def _next(t: _Term, node: fx.Node) -> fx.Node:
    operand = dict(t.steps)[node]
    below: fx.Node = args(node)[operand]
    return below


def _replayed(graph: fx.Graph, t: _Term) -> fx.Node:
    """The term, with what each rank holds in the place of what they hold together."""
    assert t.reduced is not None
    value = t.reduced.source
    for node, operand in reversed(t.steps):
        given = list(args(node))
        given[operand] = value
        target: Any = node.target
        value = call(graph, target, *given, like=node, **node.kwargs)
    return value


def _added(graph: fx.Graph, terms: list[tuple[int, fx.Node]], like: fx.Node) -> fx.Node:
    terms = sorted(terms, key=lambda t: -t[0])  # what is added first, then what is taken away
    (sign, total), *others = terms
    if sign < 0:
        total = call(graph, aten.neg.default, total, like=like)
    for sign, x in others:
        target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
        total = call(graph, target, total, x, like=like)
    return total
