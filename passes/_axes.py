"""What runs along each dim of a view: the named axes of its source, however it was reshaped.

A view is understood if each of its dims is a row-major product of whole axes. Then a permute moves
axes, a reshape regroups them, and two values can be compared index by index. Axes of size 1 carry
no index, so they are left out: a dim of size 1 is the empty product.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    COPIES,
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    is_call,
    is_widening,
    same,
    val,
)

PERMUTES = (aten.permute.default, aten.transpose.int)


@dataclass(frozen=True, eq=False)
class Axis:
    """One index, told from others by identity; `repeated` if an expand made it."""

    size: Any
    repeated: bool = False


Group = tuple[Axis, ...]  # one dim
Axes = tuple[Group, ...]  # all dims of a value


def group(*axes: Axis) -> Group:
    """The dim that is the product of these axes."""
    return tuple(axis for axis in axes if not same(axis.size, 1))


def regroup(axes: Sequence[Axis], shape: Sequence[Any]) -> Axes | None:
    """The dims of `shape` as products of `axes`, all used in their order; None if that fails."""
    rest = list(group(*axes))
    dims = []
    for size in shape:
        taken: list[Axis] = []
        while not same(math.prod(axis.size for axis in taken), size):
            if not rest:
                return None
            taken.append(rest.pop(0))
        dims.append(tuple(taken))
    return None if rest else tuple(dims)


def flat(axes: Axes) -> Group:
    """All axes, outermost first."""
    return tuple(axis for dim in axes for axis in dim)


def merge(a: Group, b: Group) -> Group | None:
    """The one index that dims of two operands run through together, or None if there are two.

    A dim of size 1 goes along with any; a repeated axis with any of its size.
    """
    if not (a and b):
        return a or b
    if len(a) != len(b):
        return None
    pairs = list(zip(a, b, strict=True))
    if any(
        x is not y and not ((x.repeated or y.repeated) and same(x.size, y.size)) for x, y in pairs
    ):
        return None
    return tuple(y if x.repeated else x for x, y in pairs)


def is_view(node: Any) -> bool:
    """Does `node` hold the values of its input, in another shape, order or wider type?"""
    if is_call(node, *RESHAPES, *SQUEEZES, *PERMUTES, *COPIES, aten.expand.default):
        return True
    return is_widening(node)


def views_of(
    node: Any, stop: Callable[[fx.Node], bool] = lambda _: False
) -> tuple[fx.Node, list[fx.Node]]:
    """The source of `node`, and the views that lead from it to `node`, in order."""
    views = []
    while is_view(node) and not stop(node):
        views.append(node)
        node = node.args[0]
    return node, views[::-1]


def highest(
    node: fx.Node, accept: Callable[[fx.Node], bool]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """The highest value accepted of which `node` is a view, and the views that lead to `node`."""
    best, path = None, list[fx.Node]()
    while True:
        if accept(node):
            best = node, path[::-1]
        if not is_view(node):
            return best
        path.append(node)
        node = args(node)[0]


def follow(axes: Axes | None, views: Iterable[fx.Node]) -> Axes | None:
    """The axes of the last of `views`, given those of the first one's input."""
    for view in views:
        axes = axes if axes is None else _step(view, axes)
    return axes


def _step(view: fx.Node, axes: Axes) -> Axes | None:
    if is_call(view, *RESHAPES, *SQUEEZES):
        return regroup(flat(axes), val(view).shape)
    if is_call(view, aten.permute.default):
        return tuple(axes[d] for d in args(view)[1])
    if is_call(view, aten.transpose.int):
        a, b = (d % len(axes) for d in args(view)[1:])
        order = list(axes)
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if is_call(view, aten.expand.default):
        shape = val(view).shape
        old = ((),) * (len(shape) - len(axes)) + axes
        new = zip(old, shape, strict=True)
        return tuple(dim or group(Axis(size, repeated=True)) for dim, size in new)
    return axes
