"""Recognise the quantisation of groups to float8 in a decomposed graph, from its cast upwards."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    constant,
    has_val,
    is_call,
    is_widening,
    operands,
    same,
    val,
)
from moe_compile.passes._outcome import Declined

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
VIEWS = (*RESHAPES, *SQUEEZES, aten.expand.default, aten.alias.default)


@dataclass
class QuantGroup:
    """q = y / scale in float8, scale = amax of y's groups / 448.

    y: [.., F]; q: the cast's result; scale: the node that holds what y was divided by, whatever its
    views; options: those of `quant_fp8` that differ from its defaults, the floors always given.
    """

    y: fx.Node
    q: fx.Node
    scale: fx.Node
    options: dict[str, Any] = field(default_factory=dict)


def quant_group_of(cast: fx.Node) -> QuantGroup:
    """The quantisation that ends in this cast to float8. Raises Declined with the reason."""
    value: Any = _unclamped(args(cast)[0])
    if not has_val(value) or val(value).dtype != torch.float32:
        raise Declined("values are not divided by their scale in float32")
    options: dict[str, Any] = {}
    y, scale, options["quant_by_reciprocal"] = _quotient(value)
    group = val(value).shape[-1]
    if group not in (64, 128):
        raise Declined(f"groups of {group}, not of 64 or 128")
    base = peel(y)
    F = val(base).shape[-1]
    if not isinstance(F, int) or F % group:
        raise Declined(f"{F} columns are no multiple of the group of {group}")
    if not same(val(value).numel(), val(base).numel()):
        raise Declined("what is divided is repeated, or has another shape")
    options["group"] = group
    amax = _scale(scale, options)
    if peel(_amax(amax)) is not base:
        raise Declined("the scale is of other values than those divided by it")
    if not same(val(scale).numel() * group, val(base).numel()):
        raise Declined("the scale is not one for each group")
    return QuantGroup(base, cast, scale, options)


def peel(node: Any) -> Any:
    """Up through views and casts that lose nothing."""
    while is_call(node, *VIEWS) or is_widening(node):
        node = args(node)[0]
    return node


def _unclamped(node: Any) -> Any:
    """Without the clamp to +-448, which an amax scale makes needless but for infinities."""
    while True:
        found = _bound(node)
        if found is None or found[1] != (-LARGEST if found[2] else LARGEST):
            return node
        node = found[0]


def _bound(node: Any) -> tuple[Any, float, bool] | None:
    """(y, c, is it a lower bound) of max(y, c) and min(y, c), in their spellings."""
    lower = (aten.clamp_min.default, aten.maximum.default, aten.clamp_min.Tensor)
    upper = (aten.clamp_max.default, aten.minimum.default, aten.clamp_max.Tensor)
    if not is_call(node, *lower, *upper):
        return None
    for y, number in operands(node):
        c = constant(number)
        if c is not None and has_val(y):
            # As the op sees it: rounded to the dtype of what it bounds.
            c = torch.tensor(float(c), dtype=val(node).dtype).item()
            return y, c, is_call(node, *lower)
    return None


def _quotient(node: Any) -> tuple[Any, fx.Node, bool]:
    """(y, scale, by reciprocal) of y / scale, y * (1 / scale) and y * (448 / amax)."""
    if is_call(node, aten.div.Tensor) and has_val(args(node)[1]):
        return args(node)[0], _unviewed(args(node)[1]), False
    if is_call(node, aten.mul.Tensor):
        for y, inverse in operands(node):
            inverse = _times_one(_unviewed(inverse))
            if is_call(inverse, aten.reciprocal.default):
                return y, _unviewed(args(inverse)[0]), True
            amax = _inverted_and_times_448(inverse)
            if amax is not None:
                return y, _stored_scale(amax), True
    raise Declined("values are neither divided by a scale nor multiplied by its reciprocal")


def _times_one(node: Any) -> Any:
    """y of y * 1, which `1.0 / scale` decomposes into."""
    if is_call(node, aten.mul.Tensor):
        for y, one in operands(node):
            if constant(one) == 1:
                return y
    return node


def _inverted_and_times_448(node: Any) -> Any:
    """amax of 448 / amax, which decomposes into (1 / amax) * 448, or None."""
    for inverse, number in operands(node) if is_call(node, aten.mul.Tensor) else ():
        inverse = _unviewed(inverse)
        if constant(number) == LARGEST and is_call(inverse, aten.reciprocal.default):
            return _unviewed(args(inverse)[0])
    return None


def _stored_scale(amax: fx.Node) -> fx.Node:
    """The scale that values multiplied by 448 / amax go with."""
    todo = [amax]
    while todo:
        node = todo.pop()
        for user in node.users:
            if is_call(user, *VIEWS):
                todo.append(user)
            elif is_call(user, aten.div.Tensor) and args(user)[0] is node:
                if constant(args(user)[1]) == LARGEST:
                    return user
            elif is_call(user, aten.mul.Tensor) and _is_times(user, 1 / LARGEST):
                return user
    raise Declined("values are multiplied by 448 / amax, and amax / 448 is stored nowhere")


def _is_times(node: fx.Node, number: float) -> bool:
    return any(
        isinstance(c, float) and abs(c / number - 1) < 1e-7 for c in map(constant, args(node)[:2])
    )


def _unviewed(node: Any) -> Any:
    """Up through views."""
    while is_call(node, *VIEWS):
        node = args(node)[0]
    return node


def _scale(node: Any, options: dict[str, Any]) -> Any:
    """What is divided by 448 to give the scale; notes how."""
    if is_call(node, aten.exp2.default):
        ceil = args(node)[0]
        log: Any = args(ceil)[0] if is_call(ceil, aten.ceil.default) else None
        if not is_call(log, aten.log2.default):
            raise Declined("a power of two that is not 2 ** ceil(log2(scale))")
        options["power_of_two"], node = True, _unviewed(args(log)[0])
    options["scale_floor"], node = _floor(node)
    if not has_val(node) or val(node).dtype != torch.float32:
        raise Declined("the scale is not float32")
    if is_call(node, aten.div.Tensor) and constant(args(node)[1]) == LARGEST:
        amax = args(node)[0]
    else:
        amax = _times(node, 1 / LARGEST)
        options["scale_by_reciprocal"] = True
    amax = _through(amax)
    options["amax_floor"], amax = _floor(amax)
    return amax


def _times(node: Any, number: float) -> Any:
    if is_call(node, aten.mul.Tensor):
        for y, c in operands(node):
            if isinstance(found := constant(c), float) and abs(found / number - 1) < 1e-7:
                return y
    raise Declined("the scale is not the largest magnitude / 448")


def _floor(node: Any) -> tuple[float, Any]:
    """(c, y) of max(y, c), with c = 0 where there is no such bound."""
    node = _through(node)
    found = _bound(node)
    if found is not None and found[2] and found[1] >= 0:
        return found[1], _through(found[0])
    return 0.0, node


def _through(node: Any) -> Any:
    return peel(node) if has_val(node) else node


def _amax(node: Any) -> Any:
    """y of the largest |y| over the last dim."""
    made, index = args(node) if is_call(node, operator.getitem) else (node, 0)
    is_max = is_call(made, aten.max.dim) and index == 0
    if not is_max and not is_call(made, aten.amax.default):
        raise Declined("the scale is not of a largest magnitude")
    source, dims = args(made)[0], arg(made, 1, "dim", [])
    last = val(source).ndim - 1
    if [d % (last + 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])] != [last]:
        raise Declined("the largest magnitude is not over the last dim")
    magnitude = _through(source)
    if not is_call(magnitude, aten.abs.default):
        raise Declined("the scale is of the largest value, not of the largest magnitude")
    return args(magnitude)[0]


def casts_to_fp8(graph: fx.Graph) -> list[fx.Node]:
    """Every cast of floats to e4m3."""
    return [
        n
        for n in graph.nodes
        if is_call(n, *CASTS)
        and has_val(n)
        and val(n).dtype == FP8
        and val(args(n)[0]).dtype != FP8
    ]
