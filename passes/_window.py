"""Which positions of a window a model's mask leaves open, where it compares numbers.

transformers numbers the positions of a window that slides: position s of the cache is token
s + max(n - W + 1, 0), with n tokens before this one, and open where that is above n - W and at most
n. The first holds for every s, and the second says s <= min(n, W - 1): what is filled is open.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from moe_compile.passes._graph import (
    RESHAPES,
    SQUEEZES,
    args,
    aten,
    constant,
    has_val,
    is_call,
    operands,
    same,
    val,
)
from moe_compile.passes._positions import WHOLE, before_reshapes, is_0, is_arange

_VIEWS = (aten.expand.default, *RESHAPES, *SQUEEZES)
_ANDS = (aten.bitwise_and.Tensor, aten.logical_and.default)
# Are positions at most a number, or above it, and how much is to be added to that?
_COMPARISONS = {
    aten.le.Tensor: (True, 0),
    aten.lt.Tensor: (True, -1),
    aten.gt.Tensor: (False, 0),
    aten.ge.Tensor: (False, -1),
}
_TURNED = {
    aten.le.Tensor: aten.ge.Tensor,
    aten.lt.Tensor: aten.gt.Tensor,
    aten.gt.Tensor: aten.lt.Tensor,
    aten.ge.Tensor: aten.le.Tensor,
}


@dataclass(frozen=True)
class Number:
    """max(base + add, floor); without a base add alone, without a floor the sum."""

    base: fx.Node | None
    add: int
    floor: int | None = None


def last_open(mask: Any, keys: Tensor) -> Number | None:
    """The n for which exactly the positions s <= n of keys [B, G, S, D] are open: without a base
    S - 1, all of them. None where that is not proved."""
    S = keys.shape[2]
    if not isinstance(S, int) or not has_val(mask):
        return None
    some = set()
    for term in _terms(mask, S):
        last = _last_of(term, S)
        if last is None or (last.base is not None and val(last.base).device != keys.device):
            return None
        if last.base is not None:
            some.add(last)
    return Number(None, S - 1) if not some else some.pop() if len(some) == 1 else None


def _terms(mask: Any, S: int) -> Iterator[Any]:
    """What has to hold all together; None for what is not along the positions alone."""
    while is_call(mask, *_VIEWS) and _is_along(mask, S) and _is_along(args(mask)[0], S):
        mask = args(mask)[0]
    if is_call(mask, *_ANDS) and _is_along(mask, S):
        for part in args(mask):
            yield from _terms(part, S)
    elif constant(mask) is not True:
        yield mask


def _is_along(x: fx.Node, S: int) -> bool:
    """Has x S elements, all along its last dim?"""
    shape = val(x).shape
    return len(shape) > 0 and same(shape[-1], S) and same(val(x).numel(), S)


def _last_of(term: Any, S: int) -> Number | None:
    """Up to where a comparison of positions with a number leaves them open, if it is from 0 on."""
    if not is_call(term, *_COMPARISONS) or term.kwargs or not _is_along(term, S):
        return None
    for pair, target in zip(operands(term), (term.target, _TURNED[term.target]), strict=True):
        first, bound = _first(pair[0], S), _number(pair[1])
        if first is not None and bound is not None and bound.floor is None:
            is_upper, more = _COMPARISONS[target]
            bound = Number(bound.base, bound.add + more)
            return _at_most(first, bound, S) if is_upper else _above(first, bound, S)
    return None


def _at_most(first: Number, bound: Number, S: int) -> Number | None:
    """Where s + first <= bound."""
    if bound.base is not None and first.base is None:
        return Number(bound.base, bound.add - first.add)
    if first.base is not bound.base or bound.add - first.add < S - 1:
        return None
    if first.floor is None:
        return Number(None, S - 1)
    return Number(bound.base, bound.add - first.floor)


def _above(first: Number, bound: Number, S: int) -> Number | None:
    """Where s + first > bound, if that is everywhere."""
    is_everywhere = first.base is bound.base and first.add > bound.add
    return Number(None, S - 1) if is_everywhere else None


def _first(x: Any, S: int) -> Number | None:
    """The number of position 0, where x counts S positions up from it along its last dim."""
    if not has_val(x):
        return None
    while is_call(x, *_VIEWS) and _is_along(x, S) and _is_along(args(x)[0], S):
        x = args(x)[0]
    if not _is_along(x, S) or is_arange(x, S):
        return Number(None, 0) if is_arange(x, S) else None
    if is_call(x, aten.add.Tensor) and not x.kwargs:
        for count, offset in operands(x):
            if has_val(count) and is_arange(count, S):
                return _number(offset)
    return None


def _number(x: Any) -> Number | None:
    """A single whole number, as far as it is sums with numbers that are known."""
    add, floor = 0, None
    while not is_0(x) and not isinstance(x, int):
        if not has_val(x) or val(x).dtype not in WHOLE or not same(val(x).numel(), 1):
            return None
        x = before_reshapes(x)
        known = args(x)[1] if len(args(x)) > 1 else None
        if not isinstance(known, int) or x.kwargs:
            return Number(x, add, floor)
        if is_call(x, aten.clamp_min.default):
            floor = known + add if floor is None else max(floor, known + add)
        elif is_call(x, aten.add.Tensor, aten.sub.Tensor):
            add += known if is_call(x, aten.add.Tensor) else -known
        else:
            return Number(x, add, floor)
        x = args(x)[0]
    total = add + (x if isinstance(x, int) else 0)
    return Number(None, total if floor is None else max(total, floor))
