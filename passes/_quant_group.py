"""Recognise the quantisation of groups to float8 in a decomposed graph, from its cast upwards."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    constant,
    has_val,
    is_call,
    operands,
    same,
    val,
)
from moe_compile.passes._outcome import Declined
from moe_compile.passes._quant_padding import check_cut, cuts_of, without_padding
from moe_compile.passes._quant_scale import (
    FLAT_VIEWS,
    LARGEST,
    bound,
    copies,
    magnitudes_of,
    peel,
    scale_of,
    stored_scale,
    unviewed,
)

FP8 = torch.float8_e4m3fn


@dataclass
class QuantGroup:
    """q = y / scale in float8, scale = amax of y's groups / 448.

    y: [.., F]; cast: gives q; parts: the nodes that hold q's F columns, the cast or cuts of it;
    amax: the largest magnitudes; scales: the nodes that hold what y was divided by, whatever their
    views; options: those of `quant_fp8`.
    """

    y: fx.Node
    cast: fx.Node
    parts: list[fx.Node]
    amax: fx.Node
    scales: list[fx.Node]
    options: dict[str, Any]


def quant_group_of(cast: fx.Node) -> QuantGroup:
    """The quantisation that ends in this cast to float8. Raises Declined with the reason."""
    value, cut = _above_clamps(args(cast)[0])
    if not has_val(value) or val(value).dtype != torch.float32:
        raise Declined("values are not divided by their scale in float32")
    divided, scale, by_reciprocal = _quotient(value)
    group = val(value).shape[-1]
    if group not in (64, 128):
        raise Declined(f"groups of {group}, not of 64 or 128")
    padded = peel(divided)
    y = without_padding(padded)
    F = _columns(y, padded, group)
    if not same(val(value).numel(), val(padded).numel()):
        raise Declined("what is divided is repeated, or has another shape")
    options, amax = scale_of(scale)
    if peel(magnitudes_of(amax)) is not padded:
        raise Declined("the scale is of other values than those divided by it")
    if not same(val(scale).numel() * group, val(padded).numel()):
        raise Declined("the scale is not one for each group")
    parts = [cast]
    if cut is not None:
        check_cut(cut, F, val(padded).shape[-1])
    elif val(padded).shape[-1] != F:
        parts = cuts_of(cast, F, val(padded).shape[-1])
    options |= {"group": group, "quant_by_reciprocal": by_reciprocal}
    return QuantGroup(y, cast, parts, amax, copies(scale, amax), options)


def _columns(y: fx.Node, padded: fx.Node, group: int) -> int:
    """The columns of y, which are padded to the next multiple of the group and no further."""
    F, filled = val(y).shape[-1], val(padded).shape[-1]
    if not isinstance(F, int) or not isinstance(filled, int) or filled % group:
        raise Declined(f"{filled} columns are no multiple of the group of {group}")
    if not 0 <= filled - F < group:
        raise Declined(f"{F} columns are padded to {filled}, not to the next group of {group}")
    return F


def _above_clamps(node: Any) -> tuple[Any, fx.Node | None]:
    """(y, cut) of what is cast: without views, the slice where columns are cut off before the cast,
    and the clamp to +-448, which an amax scale makes needless but for infinities.
    """
    cut = None
    while True:
        found = bound(node)
        if found is not None and found[1] == (-LARGEST if found[2] else LARGEST):
            node = found[0]
        elif is_call(node, *FLAT_VIEWS):
            node = args(node)[0]
        elif is_call(node, aten.slice.Tensor) and cut is None:
            cut, node = node, args(node)[0]
        else:
            return node, cut


def _quotient(node: Any) -> tuple[Any, fx.Node, bool]:
    """(y, scale, by reciprocal) of y / scale, y * (1 / scale) and y * (448 / amax)."""
    if is_call(node, aten.div.Tensor) and has_val(args(node)[1]):
        return args(node)[0], unviewed(args(node)[1]), False
    if is_call(node, aten.mul.Tensor):
        for y, inverse in operands(node):
            inverse = _times_one(unviewed(inverse))
            if is_call(inverse, aten.reciprocal.default):
                return y, unviewed(args(inverse)[0]), True
            amax = _inverted_and_times_448(inverse)
            if amax is not None:
                return y, stored_scale(amax), True
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
        inverse = unviewed(inverse)
        if constant(number) == LARGEST and is_call(inverse, aten.reciprocal.default):
            return unviewed(args(inverse)[0])
    return None


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
