"""Whole numbers in a graph: any could be a rank's index, which tracing leaves as a literal.

So an integer tensor that one goes into is equal on all ranks only as far as it is a position: it
may become a rotary embedding or a causal mask, and is unknown wherever else it is compared.
"""

from dataclasses import replace
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    constant,
    has_val,
    is_call,
    prims,
    strip,
    val,
)
from moe_compile.passes._here import INTEGER, Here, all_replicated, joined, whole_literals
from moe_compile.passes._placement import Placement, replicated, unknown


def with_whole_numbers(here: Here, found: list[Placement]) -> Placement:
    """Positions stay what they are until they become floats; a rank's index must not pass."""
    node, like = here.node, joined(here, found).unsure()
    if all_replicated(found):
        if is_call(node, *CASTS) and val(node).is_floating_point():
            return like
        if is_call(node, *INTEGER, *RESHAPES, *COPIES, *SQUEEZES, aten.expand.default):
            return replace(like, whole=True)
        if like.table and is_call(node, aten.slice.Tensor, aten.cat.default):
            return replace(like, whole=True)
        if like.table and is_call(node, aten.index.Tensor):
            return replace(like, whole=found[0].whole)
        if is_distance(node) or (like.table and _is_order(node)):
            return like
    return unknown("an integer with a whole number in it, which could be a rank's")


def is_distance(node: fx.Node) -> bool:
    """Is this a comparison of how far positions are apart, as in a causal mask?

    A rank's offset drops out where both come from the same positions (`p[1:] - p[:-1] != 1`); in an
    order of two different ones it is no mask of a rank.
    """
    source: Any = args(node)[0] if node.args else None
    if not is_call(source, aten.sub.Tensor) or not all(map(has_val, args(source)[:2])):
        return False
    a, b = (strip(x, aten.slice.Tensor) for x in args(source)[:2])
    same_base = a is b and is_call(node, aten.eq.Scalar, aten.ne.Scalar)
    ordered = is_call(node, aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.gt.Scalar)
    return same_base or (ordered and val(source).ndim > 1)


def _is_order(node: fx.Node) -> bool:
    """Are two tables of positions compared, each with each?"""
    ordered = is_call(node, aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor)
    return ordered and val(node).ndim > 1


def made_from_nothing(node: fx.Node) -> Placement:
    return replace(_constant(node), table=True)


def _constant(node: fx.Node) -> Placement:
    if is_call(node, prims.iota.default):
        start = node.kwargs.get("start", 0)
        return replace(replicated(sure=False), whole=bool(start != 0))
    if is_call(node, aten.full.default, aten.scalar_tensor.default):
        value = constant(node)
        if isinstance(value, float) and not value.is_integer():
            return replicated()
        if isinstance(value, float) or val(node).is_floating_point() or value is True:
            return replicated(sure=False)
        return unknown("a whole number, which could be a rank's")
    if is_call(node, aten.empty.memory_format):
        return replicated(sure=False)
    return unknown(f"nothing says how {node.name} lies on the ranks")


def is_suspicious(node: fx.Node) -> bool:
    if not (whole := whole_literals(node)) or is_call(node, *CASTS, aten.pow.Tensor_Scalar):
        return False
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar) and any(a in (0, 1) for a in whole):
        return not all(isinstance(a, float) for a in whole)
    source = args(node)[0]
    return has_val(source) and not val(source).is_floating_point()
