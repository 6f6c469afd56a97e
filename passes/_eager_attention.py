"""An attention that a model wrote out: product, scale, mask, softmax, product.

transformers has it where no kernel takes what a model adds to the softmax (the sinks of gpt-oss),
or where it is asked for ("eager").
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.ops._check import FLOATS
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    arg,
    args,
    aten,
    constant,
    is_call,
    operands,
    same,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined
from moe_compile.passes._topk import parse_softmax


@dataclass(frozen=True)
class Eager:
    """softmax of scale * query . keys + mask, and of the sinks, times values."""

    query: fx.Node  # [B, A, 1, D]
    keys: fx.Node  # [B, A, S, D]
    values: fx.Node  # [B, A, S, F]
    scale: float
    mask: fx.Node | None
    sinks: fx.Node | None  # [B or 1, A, 1, 1]


def parse_eager(bmm: fx.Node) -> Eager | None:
    """The attention of one query that ends with `bmm`, or None. Declines what only falls short."""
    weights, values = map(_by_heads, args(bmm)[:2])
    if weights is None or values is None or not same(val(weights).shape[2], 1):
        return None
    B, A, _, S = val(weights).shape
    if not same_shape(values, (B, A, S, val(values).shape[3])):
        return None
    weights = _not_expanded(weights)
    dropped = _before_last(weights)
    softmax = _not_rounded(weights if dropped is None else dropped)
    parsed = parse_softmax(softmax)
    if parsed is None:
        return None
    scores, sinks = _not_shifted(_not_rounded(parsed[0])), None
    if dropped is not None:
        scores, sinks = _parts(scores, (B, A, 1, S))
    scaled, mask = _mask(scores)
    product, scale = _scale(scaled)
    pair = _product(product, (B, A, 1, S))
    if pair is None:
        return None
    if len(softmax.users) > 1:
        raise Declined("the attention's weights are read by others, too")
    return Eager(*pair, values, scale, mask, sinks)


def _by_heads(x: Any) -> Any:
    """The x' [B, A, M, N] of which x [B * A, M, N] is a reshape, or None."""
    x = strip(x, *COPIES)
    if not is_call(x, *RESHAPES):
        return None
    source, (count, M, N) = args(x)[0], val(x).shape
    shape = val(source).shape
    if len(shape) != 4 or not same(shape[0] * shape[1], count):
        return None
    return _not_expanded(source) if same(shape[2], M) and same(shape[3], N) else None


def _not_expanded(x: Any) -> Any:
    """Before copies, and expansions to the shape that it has."""
    while is_call(x, *COPIES) or (
        is_call(x, aten.expand.default) and same_shape(args(x)[0], val(x).shape)
    ):
        x = args(x)[0]
    return x


def _not_rounded(x: Any) -> Any:
    """Before casts from one float to another."""
    while is_call(x, *CASTS) and {val(x).dtype, val(args(x)[0]).dtype} <= set(FLOATS):
        x = args(x)[0]
    return x


def _before_last(weights: Any) -> Any:
    """Of what `weights` are all but the last along the last dim, or None."""
    if not is_call(weights, aten.slice.Tensor):
        return None
    source, dim, start = args(weights)[0], arg(weights, 1, "dim", 0), arg(weights, 2, "start")
    is_last = dim in (-1, 3) and start in (None, 0) and arg(weights, 4, "step", 1) == 1
    return source if is_last and same(val(source).shape[3], val(weights).shape[3] + 1) else None


def _not_shifted(x: Any) -> Any:
    """Before the highest of a row was subtracted, which a softmax does not see."""
    if not is_call(x, aten.sub.Tensor) or x.kwargs:
        return x
    source, peak = args(x)
    if is_call(peak, operator.getitem) and peak.args[1] == 0:
        peak = peak.args[0]
    if not is_call(peak, aten.max.dim, aten.amax.default) or args(peak)[0] is not source:
        return x
    over_last = arg(peak, 1, "dim") in (-1, 3, [-1], [3]) and arg(peak, 2, "keepdim", False)
    return _not_rounded(source) if over_last else x


def _parts(x: Any, shape: tuple[Any, ...]) -> tuple[Any, Any]:
    """The scores and sinks, [B or 1, A, 1, 1], that x has in a row, or (None, None)."""
    if not is_call(x, aten.cat.default) or arg(x, 1, "dim", 0) not in (-1, 3):
        return None, None
    parts = args(x)[0]
    if len(parts) != 2 or not same_shape(parts[0], shape):
        return None, None
    B, A = shape[:2]
    sinks = _not_expanded(parts[1])
    if is_call(sinks, aten.expand.default) and same_shape(args(sinks)[0], (1, A, 1, 1)):
        sinks = args(sinks)[0]
    fits = same_shape(sinks, (B, A, 1, 1)) or same_shape(sinks, (1, A, 1, 1))
    return (_not_rounded(parts[0]), sinks) if fits else (None, None)


def _mask(scores: Any) -> tuple[Any, Any]:
    """Scores before a mask was added, and the mask; or the scores themselves, and None."""
    if is_call(scores, aten.add.Tensor) and not scores.kwargs:
        for x, mask in operands(scores):
            if isinstance(mask, fx.Node) and _scale(_not_rounded(x))[0] is not None:
                return _not_rounded(x), mask
    return scores, None


def _scale(x: Any) -> tuple[Any, float]:
    """A product reshaped to heads that x is a multiple of, and the factor; or (None, 1.0)."""
    factor = 1.0
    if is_call(x, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and not x.kwargs:
        number = constant(args(x)[1])
        if type(number) not in (int, float) or number == 0:
            return None, 1.0
        divides = is_call(x, aten.div.Tensor)
        x, factor = _not_rounded(args(x)[0]), 1.0 / number if divides else float(number)
    is_product = is_call(x, *RESHAPES) and is_call(args(x)[0], aten.bmm.default)
    return (x, factor) if is_product else (None, 1.0)


def _product(x: Any, shape: tuple[Any, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The query [B, A, 1, D] and keys [B, A, S, D] that x [B, A, 1, S] is the product of."""
    if x is None or not same_shape(x, shape):
        return None
    query, turned = map(_by_heads, args(args(x)[0])[:2])
    if query is None or turned is None or not is_call(turned, aten.permute.default):
        return None
    B, A, _, S = shape
    keys, D = args(turned)[0], val(query).shape[3]
    fits = same_shape(query, (B, A, 1, D)) and same_shape(keys, (B, A, S, D))
    return (query, keys) if fits and args(turned)[1] == [0, 1, 3, 2] else None


def closing(mask: fx.Node) -> float:
    """From which number down a model's own mask closes: nothing is left of a weight."""
    return float(torch.finfo(val(mask).dtype).min)
