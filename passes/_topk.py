"""What the parts of a router have in common: top-k, softmax, sums, casts that change nothing."""

from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import CASTS, arg, args, aten, is_call, val
from moe_compile.passes._outcome import Declined

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_topk(topk: fx.Node) -> tuple[fx.Node, int]:
    """The input and the k of a top-k of the largest over the last dim."""
    x, k = args(topk)[:2]
    if arg(topk, 2, "dim", -1) not in (-1, val(x).ndim - 1):
        raise Declined("top-k over another dim than the last")
    if not arg(topk, 3, "largest", True):
        raise Declined("top-k of the smallest")
    if not (isinstance(k, int) and isinstance(val(x).shape[-1], int)):
        raise Declined("the number of experts is not known when compiling")
    return x, k


def over_last_dim(node: fx.Node, keepdim: bool) -> bool:
    """Does this reduction reduce its last dim only, keeping it or not?"""
    dims = arg(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    last = val(args(node)[0]).ndim - 1
    return dims in ([-1], [last]) and bool(arg(node, 2, "keepdim", False)) is keepdim


def widened(node: Any) -> Any:
    """`node` before it was converted to a wider type, which changes no value."""
    while is_call(node, *CASTS) and is_widening(node):
        node = node.args[0]
    return node


def is_widening(cast: fx.Node) -> bool:
    """Does this cast give float32 for a float that is no wider?"""
    return val(args(cast)[0]).dtype in FLOATS and val(cast).dtype == torch.float32


def parse_softmax(node: Any) -> tuple[fx.Node, set[fx.Node]] | None:
    """x and the nodes between, where `node` is a float32 softmax of x over its last dim."""
    if is_call(node, aten._softmax.default) and val(node).dtype == torch.float32:
        x, dim = args(node)[:2]
        return (x, set()) if dim in (-1, val(x).ndim - 1) else None
    if not is_call(node, aten.div.Tensor):
        return None
    exp, total = args(node)
    if not (is_row_sum(total, exp) and is_call(exp, aten.exp.default)):
        return None
    (shifted,) = args(exp)
    if not is_call(shifted, aten.sub.Tensor) or shifted.kwargs:
        return None
    if val(shifted).dtype != torch.float32 or val(node).dtype != torch.float32:
        return None
    x, peak = args(shifted)
    if not (is_call(peak, aten.amax.default) and peak.args[0] is x and over_last_dim(peak, True)):
        return None
    return x, {exp, total, shifted, peak}


def is_row_sum(node: Any, of: Any) -> bool:
    """Is `node` the sum of `of` over its last dim, keeping it?"""
    return is_call(node, aten.sum.dim_IntList) and node.args[0] is of and over_last_dim(node, True)


def dtype_name(node: fx.Node) -> str:
    """As in "bfloat16"."""
    return str(val(node).dtype).removeprefix("torch.")
