"""Recognise columns that are filled up with zeros to a group, and cut off again."""

from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    COPIES,
    arg,
    args,
    aten,
    constant,
    is_call,
    same,
    same_shape,
    val,
)
from moe_compile.passes._outcome import Declined
from moe_compile.passes._quant_scale import FLAT_VIEWS, peel


def without_padding(node: Any) -> Any:
    """What `node` fills up with columns of zeros, or `node` itself where it fills nothing up."""
    x = _of_pad(node) or _of_cat(node) or _of_zeros(node)
    if x is None:
        return node
    y = peel(x)
    if not same(val(y).shape[-1], val(x).shape[-1]):
        raise Declined("the rows that are padded are not those of the activation")
    return y


def _of_pad(node: Any) -> Any:
    """x of F.pad(x, (0, n))."""
    if not is_call(node, aten.constant_pad_nd.default):
        return None
    before, after, *others = args(node)[1]
    if isinstance(after, fx.Node):
        raise Declined("padded by a number of columns that is not known")
    if any(n != 0 for n in (before, *others)):
        raise Declined("padded elsewhere than behind the last column")
    if (value := arg(node, 2, "value", 0)) != 0:
        raise Declined(f"padded with {value}, not with zeros")
    return args(node)[0]


def _of_cat(node: Any) -> Any:
    """x of cat([x, zeros], -1)."""
    if not is_call(node, aten.cat.default) or len(args(node)[0]) != 2:
        return None
    (x, zeros), dim = args(node)[0], arg(node, 1, "dim", 0)
    if constant(zeros) != 0 or dim % val(node).ndim != val(node).ndim - 1:
        return None
    return x if _is_not_rounded(x, node) else None


def _of_zeros(node: Any) -> Any:
    """x of y[..., :F] = x where y was zeros."""
    if not is_call(node, aten.slice_scatter.default) or constant(args(node)[0]) != 0:
        return None
    x = args(node)[1]
    if not _is_slice_to(node, val(x).shape[-1], first=2):
        raise Declined("padded elsewhere than behind the last column")
    if is_call(x, aten.copy.default) and same_shape(args(x)[1], val(x).shape):
        x = args(x)[1]
    return x if _is_not_rounded(x, node) else None


def _is_not_rounded(x: fx.Node, node: fx.Node) -> bool:
    return torch.promote_types(val(x).dtype, val(node).dtype) == val(node).dtype


def cuts_of(q: fx.Node, F: int, padded: int) -> list[fx.Node]:
    """The nodes that hold just the first F columns of q, whose rows have `padded` of them."""
    cuts, todo = [], [q]
    while todo:
        for user in todo.pop().users:
            if is_call(user, *FLAT_VIEWS):
                todo.append(user)
                continue
            check_cut(user, F, padded)
            cuts.append(user)
    users = [user for cut in cuts for user in cut.users]
    if len(users) == 1 and is_call(users[0], *COPIES) and val(users[0]).is_contiguous():
        return cuts + users  # a copy, made because the columns did not lie together
    return cuts


def check_cut(node: fx.Node, F: int, padded: int) -> None:
    """Does `node` take the first F of `padded` columns?"""
    if not is_call(node, aten.slice.Tensor) or not same(val(args(node)[0]).shape[-1], padded):
        raise Declined("columns of the padding are read, too")
    if not _is_slice_to(node, F, first=1):
        raise Declined("what is cut off is not just the padding")


def _is_slice_to(node: fx.Node, F: int, first: int) -> bool:
    """Are a slice's dim, start, end and step, from argument `first` on, those of [..., :F]?"""
    names = zip(("dim", "start", "end", "step"), (0, None, None, 1), strict=True)
    dim, start, end, step = (arg(node, first + i, *name) for i, name in enumerate(names))
    last = val(node).ndim - 1
    return dim % (last + 1) == last and start in (0, None) and same(end, F) and step == 1
