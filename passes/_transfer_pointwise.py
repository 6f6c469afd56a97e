"""Placements through pointwise ops: sums and multiples of partial sums, and all others."""

import math
import operator
from dataclasses import replace

from torch import fx

from moe_compile.passes._graph import CASTS, COPIES, RESHAPES, args, aten, constant, is_call
from moe_compile.passes._here import (
    SUMS,
    UNARY,
    Here,
    aligned,
    all_replicated,
    first,
    first_unknown,
    joined,
)
from moe_compile.passes._placement import Placement, unknown
from moe_compile.passes._whole_numbers import is_distance, is_suspicious, with_whole_numbers


def pointwise(here: Here) -> Placement:
    node = here.node
    found = [here.of(n) for n in here.inputs]
    if is_suspicious(node) and not (is_distance(node) and all_replicated(found)):
        return with_whole_numbers(here, found)
    if (p := first(found, "partial")) is not None:
        return _linear(here, p)
    if why := first_unknown(found):
        return why
    if shards := [(n, p) for n, p in zip(here.inputs, found, strict=True) if p.is_shard]:
        dims = {aligned(n, p.dim, node) for n, p in shards}
        return shards[0][1].moved(dims.pop()) if len(dims) == 1 else unknown("shards of two dims")
    return _nth_part(here, joined(here, found))


def _linear(here: Here, p: Placement) -> Placement:
    """Pointwise ops with a partial sum: sums and multiples of it are partial sums too."""
    node, values = here.node, args(here.node)
    others = [v for v in values if not (isinstance(v, fx.Node) and here.of(v).is_partial)]
    known = [here.of(v) for v in others if isinstance(v, fx.Node)]
    if is_call(node, *SUMS):
        for v in others:
            if isinstance(v, fx.Node) and constant(v) != 0:
                if here.of(v).is_replicated and not here.of(v).nth:
                    here.counted_often(here.of(v))
            elif isinstance(v, (int, float)) and v != 0:
                here.counted_often(p)
        partials = [here.of(v) for v in values if isinstance(v, fx.Node) and here.of(v).is_partial]
        if any(q.inner != p.inner for q in partials):
            return unknown("partial sums that are reduced over different ranks")
        return (
            p
            if all(k.is_replicated for k in known)
            else first_unknown(known) or unknown("a mixed sum")
        )
    if is_call(node, *UNARY):
        return p
    products = is_call(node, aten.mul.Tensor, aten.mul.Scalar) and len(known) + 1 == len(
        here.inputs
    )
    quotients = is_call(node, aten.div.Tensor, aten.div.Scalar) and here.of(values[0]) is p
    if (products or quotients) and not any(k.is_partial for k in known):
        both = len(here.inputs) == 2 and values[0] is values[1]
        if not both:
            return (
                p
                if all(k.is_replicated for k in known)
                else first_unknown(known) or unknown("a product")
            )
    if is_call(node, aten.where.self):
        condition, *branches = values
        zero_or_p = [b for b in branches if constant(b) == 0 or here.of(b).is_partial]
        if here.of(condition).is_replicated and len(zero_or_p) == 2:
            return p
        return unknown("a choice between partial sums and others")
    return here.missing_reduce(p)


def _nth_part(here: Here, p: Placement) -> Placement:
    """v / n, or v * (1 / n), of a group of n ranks: meant to be added on each of them."""
    node, values = here.node, args(here.node)
    n = here.group.size
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and constant(values[1]) == n:
        return replace(p, nth=True)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        factors = [constant(v) for v in values]
        if any(isinstance(f, float) and f > 0 and math.isclose(f * n, 1) for f in factors):
            return replace(p, nth=True)
    kept = is_call(node, *UNARY) and here.of(values[0]).nth
    return replace(p, nth=kept)


def is_divided(node: fx.Node, n: int) -> bool:
    """Is `node` used for nothing but its quotient by n, or by a multiple of n?"""
    users = list(node.users)
    return bool(users) and all(_divides(u, node, n) for u in users)


def _divides(user: fx.Node, node: fx.Node, n: int) -> bool:
    values = args(user)
    if is_call(user, aten.div.Tensor, aten.div.Scalar) and values[0] is node:
        d = constant(values[1])
        return isinstance(d, (int, float)) and d != 0 and d % n == 0
    if is_call(user, aten.mul.Tensor, aten.mul.Scalar):
        factors = [c for v in values if (c := constant(v)) is not None]
        return any(f > 0 and math.isclose((1 / f) % n, 0, abs_tol=1e-6) for f in factors)
    if is_call(user, *RESHAPES, *CASTS, *COPIES, aten.copy.default, operator.getitem) or str(
        user.target
    ).startswith("_c10d_functional.wait_tensor"):
        return is_divided(user, n)
    return False
