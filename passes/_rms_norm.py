"""Recognise RMSNorm in a decomposed graph."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    arg,
    args,
    aten,
    has_val,
    is_call,
    is_widening,
    operands,
    same_shape,
    strip,
    val,
)


@dataclass(frozen=True)
class RMSNorm:
    """x * rsqrt(mean(x ** 2) + eps) * weight over the last dim, computed in float32.

    round_first: is the normalised row rounded to x's dtype before it meets the weight?
    """

    value: fx.Node
    weight: fx.Node
    eps: float
    round_first: bool


def rms_norms_of(x: fx.Node) -> list[RMSNorm]:
    """Every RMSNorm that reads `x`."""
    wide = [x, *(n for n in x.users if is_widening(n) and val(n).dtype.itemsize == 4)]
    found = []
    for source in wide:
        if val(source).dtype.itemsize != 4:
            continue
        for node in list(source.users):
            if is_call(node, aten.mul.Tensor) and (eps := _scale_of(node, source)) is not None:
                found += _weighted(node, x, eps)
    return found


def rms_norm_behind(value: Any) -> tuple[fx.Node, RMSNorm] | None:
    """What `value` is the RMSNorm of, and how."""
    for scaled in _factors(value):
        for wide in _factors(scaled):
            for x in (args(wide)[0] if is_widening(wide) else wide, wide):
                norm = next((n for n in rms_norms_of(x) if n.value is value), None)
                if norm is not None and val(x).dtype == val(value).dtype:
                    return x, norm
    return None


def is_weight_of_norm(x: fx.Node) -> bool:
    """Do rows that were normalised, and nothing else, meet `x`?"""
    return len(x.users) > 0 and all(map(_is_weighted, x.users))


def _is_weighted(product: fx.Node) -> bool:
    return any(
        is_call(scaled, aten.mul.Tensor)
        and any(has_val(x) and _scale_of(scaled, x) is not None for x in args(scaled))
        for scaled in _factors(product)
    )


def _factors(node: Any) -> list[fx.Node]:
    """The tensors of which `node` is the product, cast or not."""
    product = strip(node, *CASTS)
    return [a for a in args(product) if has_val(a)] if is_call(product, aten.mul.Tensor) else []


def _scale_of(node: fx.Node, source: fx.Node) -> float | None:
    """eps, if `node` is source * rsqrt(mean(source ** 2) + eps)."""
    for left, right in operands(node):
        if left is not source or not is_call(right, aten.rsqrt.default):
            continue
        below = args(right)[0]
        if not is_call(below, aten.add.Tensor, aten.add.Scalar) or below.kwargs:
            continue
        mean, eps = args(below)
        if isinstance(eps, (int, float)) and _is_mean_square(mean, source):
            return float(eps)
    return None


def _is_mean_square(mean: Any, source: fx.Node) -> bool:
    if not is_call(mean, aten.mean.dim) or not arg(mean, 2, "keepdim", False):
        return False
    square, dims = args(mean)[:2]
    last = val(source).ndim - 1
    if arg(mean, 3, "dtype") is not None or [d % (last + 1) for d in dims] != [last]:
        return False
    if is_call(square, aten.pow.Tensor_Scalar):
        return args(square) == (source, 2)
    return is_call(square, aten.mul.Tensor) and args(square) == (source, source)


def _weighted(node: fx.Node, x: fx.Node, eps: float) -> list[RMSNorm]:
    """The products of a normalised row and a weight, both in x's dtype in the end."""
    found = []
    rounded = [n for n in node.users if _is_cast_to(n, x)]
    for source in (node, *(rounded if val(node).dtype != val(x).dtype else [])):
        for product in source.users:
            if not is_call(product, aten.mul.Tensor):
                continue
            weight: Any = next((b for a, b in operands(product) if a is source), None)
            if is_widening(weight) and val(weight).dtype == val(source).dtype:
                weight = args(weight)[0]
            if not has_val(weight) or val(weight).dtype != val(x).dtype:
                continue
            if not same_shape(weight, val(x).shape[-1:]):
                continue
            ends = [product] if val(product).dtype == val(x).dtype else []
            ends += [n for n in product.users if not ends and _is_cast_to(n, x)]
            found += [RMSNorm(e, weight, eps, source is not node) for e in ends]
    return found


def _is_cast_to(node: fx.Node, x: fx.Node) -> bool:
    return is_call(node, *CASTS) and val(node).dtype == val(x).dtype
