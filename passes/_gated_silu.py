"""Recognise silu(gate) * up in a decomposed graph, and where it rounds."""

from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._gates import (
    alpha_of,
    halves_of,
    limit_of,
    negated_exp_plus_one,
    shift_of,
    uncast,
)
from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    has_val,
    is_call,
    is_widening,
    operands,
    same_shape,
    val,
)
from moe_compile.passes._outcome import Declined

DEFAULTS = {"interleaved": False, "alpha": 1.0, "limit": None, "up_shift": 0.0}


class NoGatedSilu(Declined):
    """There is nothing that looks like silu(gate) * up."""


Inputs = tuple[fx.Node, fx.Node | None]


def gated_silu_of(y: fx.Node) -> tuple[Inputs, dict[str, Any]]:
    """((x, None) or (gate, up), options of `silu_mul_quant`) of which y [.., F] is the activation.

    x is [.., 2F], both halves of one tensor. Raises Declined with the reason.
    """
    if is_call(y, moe.silu_mul.default):
        x, *given = args(y)
        options = dict(zip(DEFAULTS, given, strict=False))
        return (x, None), {**options, **y.kwargs, **_only_true(round_product=_is_half(y))}
    product, round_product = _unrounded(y)
    if not is_call(product, aten.mul.Tensor):
        raise NoGatedSilu("no silu(gate) * up before the quantisation")
    for left, right in operands(product):
        silu, round_silu = _unrounded(_widened(left))
        found = _silu(silu)
        if found is None:
            continue
        gate, alpha, round_sigmoid, scaled = found
        up, shift = shift_of(right)
        terms = [scaled] * (alpha != 1) + [_widened(right)] * (shift != 0)
        if len({_is_half(term) for term in terms}) > 1:
            raise Declined("of alpha * gate and up + shift one is rounded, one not")
        clamped = limit_of(gate, up)
        if clamped is None:
            raise Declined("gate and up are clamped to bounds that the op has not")
        gate, up, limit = clamped
        halves = halves_of(gate, up, ndim=None)
        inputs, interleaved = ((halves[0], None), halves[1]) if halves else ((gate, up), False)
        _check_inputs(y, inputs, limit)
        options = {"interleaved": interleaved, "alpha": alpha, "limit": limit, "up_shift": shift}
        rounds = _only_true(
            round_terms=any(map(_is_half, terms)),
            round_sigmoid=round_sigmoid,
            round_silu=round_silu or _is_half(silu),
            round_product=round_product or _is_half(product),
        )
        return inputs, {**{k: v for k, v in options.items() if v != DEFAULTS[k]}, **rounds}
    raise NoGatedSilu("no silu(gate) * up before the quantisation")


def _check_inputs(y: fx.Node, inputs: Inputs, limit: float | None) -> None:
    """Are they alike, and is all rounding on the way to y to their dtype, and exact in clamps?"""
    x, up = inputs
    dtype = val(x).dtype
    if up is not None and (val(up).dtype != dtype or not same_shape(up, val(x).shape)):
        raise Declined("gate and up have other dtypes or shapes")
    if limit is not None and torch.tensor(limit, dtype=dtype).item() != limit:
        raise Declined(f"a bound of {limit}, which {dtype} rounds")
    seen, todo = {x, y, *([up] if up is not None else [])}, [y]
    while todo:
        node = todo.pop()
        if has_val(node) and val(node).dtype.itemsize < 4 and val(node).dtype != dtype:
            raise Declined(f"{dtype} halves whose activation is rounded to {val(node).dtype}")
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new


def _only_true(**flags: bool) -> dict[str, bool]:
    return {name: True for name, flag in flags.items() if flag}


def _is_half(node: fx.Node) -> bool:
    return val(node).dtype.itemsize == 2


def _widened(node: Any) -> Any:
    while is_widening(node):
        node = args(node)[0]
    return node


def _unrounded(node: Any) -> tuple[Any, bool]:
    """What was rounded to 16 bits by an explicit cast, and whether it was."""
    node = _widened(node)
    if is_call(node, *CASTS) and _is_half(node) and val(args(node)[0]).dtype == torch.float32:
        return args(node)[0], True
    return node, False


def _silu(node: Any) -> tuple[Any, float, bool, Any] | None:
    """(gate, alpha, is the sigmoid rounded, alpha * gate) of gate * sigmoid(alpha * gate)."""
    if is_call(node, aten.div.Tensor) and has_val(node):  # g / (1 + exp(-alpha * g))
        gate, below = args(node)
        scaled = negated_exp_plus_one(below) if has_val(below) else None
        found = alpha_of(scaled, uncast(gate)) if scaled is not None else None
        return (*found, False, scaled) if found is not None else None
    if is_call(node, aten.mul.Tensor):
        for gate, sigmoid in operands(node):
            sigmoid, rounded = _unrounded(sigmoid)
            if is_call(sigmoid, aten.sigmoid.default):
                scaled = uncast(args(sigmoid)[0])
                found = alpha_of(scaled, uncast(gate))
                if found is not None:
                    return (*found, rounded or _is_half(sigmoid), scaled)
    return None
