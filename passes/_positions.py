"""Positions of a cache, as models write them: counts from 0, and what a number was before it was
reshaped, expanded or added to 0."""

from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    COPIES,
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    has_val,
    is_call,
    operands,
    prims,
    same,
    val,
)

WHOLE = (torch.int64, torch.int32)


def is_arange(x: Any, S: Any) -> bool:
    """Is x 0, 1, .., S - 1 along its last dim, and the same along all others?"""
    while is_call(x, aten.expand.default) and _ends_in(args(x)[0], S):
        x = args(x)[0]
    if not _ends_in(x, S) or not same(val(x).numel(), S):
        return False
    x = before_reshapes(x)
    return same(val(x).numel(), S) and _counts_from_0(x)


def _ends_in(x: fx.Node, size: Any) -> bool:
    return val(x).ndim > 0 and same(val(x).shape[-1], size)


def _counts_from_0(x: fx.Node) -> bool:
    if val(x).dtype not in WHOLE:
        return False
    if is_call(x, prims.iota.default):
        return bool(x.kwargs.get("start") == 0 and x.kwargs.get("step") == 1)
    return is_call(x, aten.arange.default)


def before_reshapes(x: fx.Node) -> fx.Node:
    """The same numbers in the same order, or the one that all of them are, before reshapes,
    expansions and sums with 0."""
    while True:
        source = None
        if is_call(x, *RESHAPES, *SQUEEZES, *COPIES):
            source = args(x)[0]
        elif is_call(x, aten.expand.default):
            source = args(x)[0]
            if not same(val(source).numel(), 1) and not _as_many(source, x):
                return x
        elif is_call(x, aten.add.Tensor) and not x.kwargs:
            found = (a for a, zero in operands(x) if is_0(zero) and _as_many(a, x))
            source = next((a for a in found if val(a).dtype in WHOLE), None)
        if source is None:
            return x
        x = source


def _as_many(a: Any, b: fx.Node) -> bool:
    return has_val(a) and same(val(a).numel(), val(b).numel())


def is_0(x: Any) -> bool:
    """Is x a whole 0, also if it is the only element of an arange?"""
    if not isinstance(x, fx.Node):
        return type(x) is int and x == 0
    return has_val(x) and same(val(x).numel(), 1) and _counts_from_0(x)
