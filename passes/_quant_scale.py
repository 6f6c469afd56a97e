"""Recognise the scales of groups in a decomposed graph, from the scale up to the magnitudes."""

import math
import operator
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
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
    strip,
    val,
)
from moe_compile.passes._outcome import Declined

LARGEST = 448.0
FLAT_VIEWS = (*RESHAPES, *SQUEEZES, aten.alias.default)
VIEWS = (*FLAT_VIEWS, aten.expand.default)


def scale_of(node: Any) -> tuple[dict[str, Any], fx.Node]:
    """(options of `quant_fp8`, the largest magnitudes) that make this scale."""
    options: dict[str, Any] = {}
    if is_call(node, aten.exp2.default):
        ceil = args(node)[0]
        log: Any = args(ceil)[0] if is_call(ceil, aten.ceil.default) else None
        if not is_call(log, aten.log2.default):
            raise Declined("a power of two that is not 2 ** ceil(log2(scale))")
        options["power_of_two"], node = True, unviewed(args(log)[0])
    options["scale_floor"], options["scale_eps"], node = _floor_and_epsilon(node)
    if not has_val(node) or val(node).dtype != torch.float32:
        raise Declined("the scale is not float32")
    if is_call(node, aten.exp2.default):
        raise Declined("an epsilon or a floor behind the power of two")
    if is_call(node, aten.div.Tensor) and constant(args(node)[1]) == LARGEST:
        amax = args(node)[0]
    else:
        amax = _times(node, 1 / LARGEST)
        options["scale_by_reciprocal"] = True
    options["amax_floor"], options["amax_eps"], amax = _floor_and_epsilon(amax)
    magnitudes_of(amax)
    return options, amax


def magnitudes_of(node: Any) -> Any:
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


def stored_scale(amax: fx.Node) -> fx.Node:
    """The scale that values multiplied by 448 / amax go with."""
    source = _floor_and_epsilon(amax)[2]
    magnitudes_of(source)
    todo = copies(amax, source)
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


def copies(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """`node` and whatever else computes the same from `source`, as a model that writes it twice."""
    steps: list[Any] = []
    above = unviewed(node)
    while above is not source:
        if not _keeps_values(above):
            steps.insert(0, _step(above))
        above = next(a for a in args(above) if has_val(a) and constant(a) is None)
    todo, found = [(source, 0)], [] if steps else [source]
    while todo:
        made, done = todo.pop()
        for user in made.users:
            if _keeps_values(user):
                todo.append((user, done))
            elif done < len(steps) and _step(user) == steps[done]:
                todo.append((user, done + 1))
                if done + 1 == len(steps) and same(val(user).numel(), val(source).numel()):
                    found.append(user)
    return found


def _keeps_values(node: Any) -> bool:
    return is_call(node, *VIEWS) or is_widening(node)


def _step(node: fx.Node) -> Any:
    """What is done to the one tensor that comes in."""
    if not has_val(node):
        return None
    return node.target, [constant(a) for a in args(node)], node.kwargs, val(node).dtype


def peel(node: Any) -> Any:
    """Up through views and casts that lose nothing."""
    while _keeps_values(node):
        node = args(node)[0]
    return node


def unviewed(node: Any) -> Any:
    """Up through views."""
    return strip(node, *VIEWS)


def bound(node: Any) -> tuple[Any, float, bool] | None:
    """(y, c, is it a lower bound) of max(y, c) and min(y, c), in their spellings."""
    lower = (aten.clamp_min.default, aten.maximum.default, aten.clamp_min.Tensor)
    upper = (aten.clamp_max.default, aten.minimum.default, aten.clamp_max.Tensor)
    if not is_call(node, *lower, *upper):
        return None
    for y, number in operands(node):
        if isinstance(constant(number), (int, float)) and has_val(y):
            # As the op sees it: rounded to the dtype of what it bounds.
            c = torch.tensor(_held_by(number), dtype=val(node).dtype).item()
            return y, c, is_call(node, *lower)
    return None


def _floor_and_epsilon(node: Any) -> tuple[float, float, Any]:
    """(c, e, y) of max(y, c) + e, each 0 where there is none."""
    epsilon, node = _epsilon(_through(node))
    found = bound(node)
    if found is None or not found[2] or found[1] < 0:
        return 0.0, epsilon, node
    node = _through(found[0])
    if is_call(node, aten.add.Tensor):
        raise Declined("an epsilon is added before the floor, not after it")
    return found[1], epsilon, node


def _epsilon(node: Any) -> tuple[float, Any]:
    """(e, y) of y + e in float32."""
    if not is_call(node, aten.add.Tensor):
        return 0.0, node
    if val(node).dtype != torch.float32:
        raise Declined(f"an epsilon is added in {val(node).dtype}")
    for y, number in operands(node):
        is_number = isinstance(constant(number), (int, float))
        if is_number and has_val(y) and arg(node, 2, "alpha", 1) == 1:
            e = _held_by(number)
            if not 0 <= e < math.inf:
                raise Declined(f"an epsilon of {e}")
            return e, _through(y)
    raise Declined("what is added to the scale or the largest magnitude is not a constant")


def _held_by(number: Any) -> float:
    """A constant, as the dtypes of tensors that hold it round it."""
    if not isinstance(number, fx.Node):
        return float(number)
    source = next(iter(number.all_input_nodes), None)
    held = constant(number) if source is None else _held_by(source)
    return float(torch.tensor(held, dtype=val(number).dtype).item())


def _times(node: Any, number: float) -> Any:
    if is_call(node, aten.mul.Tensor):
        for y, c in operands(node):
            if isinstance(found := constant(c), float) and abs(found / number - 1) < 1e-7:
                return y
    raise Declined("the scale is not the largest magnitude / 448")


def _is_times(node: fx.Node, number: float) -> bool:
    return any(
        isinstance(c, float) and abs(c / number - 1) < 1e-7 for c in map(constant, args(node)[:2])
    )


def _through(node: Any) -> Any:
    return peel(node) if has_val(node) else node
