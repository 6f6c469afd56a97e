"""The parts of gated activations in a decomposed graph: halves, clamps, shifts, sigmoids."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    RESHAPES,
    SQUEEZES,
    aten,
    has_val,
    is_call,
    operands,
    same,
    same_shape,
    strip,
    val,
)


def negated_exp_plus_one(node: Any) -> Any:
    """z of 1 + exp(-z)."""
    shifted, shift = shift_of(node)
    if shift != 1 or not is_call(shifted, aten.exp.default):
        return None
    negated = uncast(shifted.args[0])
    return uncast(negated.args[0]) if is_call(negated, aten.neg.default) else None


def alpha_of(scaled: Any, gate: Any) -> tuple[Any, float] | None:
    """(gate, alpha) if `scaled` is alpha * gate."""
    if scaled is gate:
        return gate, 1.0
    if is_call(scaled, aten.mul.Tensor):
        for factor, alpha in operands(scaled):
            if isinstance(alpha, (int, float)) and uncast(factor) is gate:
                return gate, float(alpha)
    return None


def shift_of(node: Any) -> tuple[Any, float]:
    """(y, c) of y + c, with c = 0 where nothing is added."""
    node = uncast(node)
    if (
        is_call(node, aten.add.Tensor)
        and not node.kwargs
        and isinstance(node.args[1], (int, float))
    ):
        return uncast(node.args[0]), float(node.args[1])
    return node, 0.0


def clamps_of(node: Any) -> tuple[Any, float | None, float | None]:
    """(y, low, high) of clamp(y, low, high), with None for a bound that is not there."""
    low = high = None
    node = uncast(node)
    while is_call(node, aten.clamp_min.default, aten.clamp_max.default):
        bound = node.args[1]
        if is_call(node, aten.clamp_min.default):
            low = bound if low is None else max(low, bound)
        else:
            high = bound if high is None else min(high, bound)
        node = uncast(node.args[0])
    return node, low, high


def limit_of(gate: Any, up: Any) -> tuple[Any, Any, float | None] | None:
    """(gate, up, limit) without their clamps, if gate is below limit and up between +-limit."""
    gate, gate_low, high = clamps_of(gate)
    up, low, limit = clamps_of(up)
    expected = (None, limit, None if limit is None else -limit)
    return (gate, up, limit) if (gate_low, high, low) == expected else None


def halves_of(gate: Any, up: Any, ndim: int | None = 2) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) if gate and up are the two halves of x's columns, gate first."""
    read: Callable[[Any], tuple[Any, Any] | None]
    for read, interleaved in ((_part, False), (_stride, True)):
        first, second = read(gate), read(up)
        if first is None or second is None:
            continue
        (x, place), (other, next_place) = first, second
        x, other = _whole(x), _whole(other)
        if x is other and (place, next_place) == (0, 1) and ndim in (None, val(x).ndim):
            return x, interleaved
    return None


def _part(node: Any) -> tuple[Any, Any] | None:
    """(x, i) if `node` is half i of x's columns."""
    if not has_val(node):
        return None
    width = val(node).shape[-1]
    splits = (aten.split.Tensor, aten.split_with_sizes.default)
    if is_call(node, operator.getitem) and is_call(node.args[0], *splits):
        x, _, *dim = node.args[0].args
        even = dim and _is_last(dim[0], x) and same(val(x).shape[-1], 2 * width)
        return (x, node.args[1]) if even else None
    if is_call(node, aten.slice.Tensor) and len(node.args) == 4 and _is_last(node.args[1], node):
        x, _, start, _ = node.args
        start = start.meta["val"] if isinstance(start, fx.Node) else start
        if same(val(x).shape[-1], 2 * width) and (same(start, 0) or same(start, width)):
            return x, int(same(start, width))
    return None


def _stride(node: Any) -> tuple[Any, Any] | None:
    """(x, i) if `node` is every second column of x, from column i."""
    if is_call(node, aten.slice.Tensor) and len(node.args) == 5 and _is_last(node.args[1], node):
        x, _, start, _, step = node.args
        even = same(val(x).shape[-1], 2 * val(node).shape[-1])
        return (x, start) if step == 2 and start in (0, 1) and even else None
    return None


def _is_last(dim: Any, x: fx.Node) -> bool:
    return bool(dim % val(x).ndim == val(x).ndim - 1)


def _whole(x: fx.Node) -> fx.Node:
    """x without views that give back its own shape (a squeeze of an unsqueeze, say)."""
    source = strip(x, *SQUEEZES, *RESHAPES)
    return source if same_shape(source, val(x).shape) else x


def uncast(node: Any) -> Any:
    """Through casts between float dtypes, which the ops make needless by computing in float32."""
    while is_call(node, *CASTS) and val(node).dtype.is_floating_point:
        if not val(node.args[0]).dtype.is_floating_point:
            return node
        node = node.args[0]
    return node
