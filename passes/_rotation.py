"""A rotation of heads by the angles of their positions, as models write it."""

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.ops._check import FLOATS
from moe_compile.passes._graph import (
    CASTS,
    arg,
    args,
    aten,
    has_val,
    is_call,
    is_widening,
    operands,
    same,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined
from moe_compile.passes._rms_norm import RMSNorm, rms_norms_of


@dataclass(frozen=True)
class Rotation:
    """end [B, H, Q, D] is what `rotate` makes of source [B, Q, H, D]."""

    end: fx.Node
    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    are_halves: bool  # cos and sin are those of one half, which the other has too
    norm: RMSNorm | None


def is_last(node: fx.Node, dim: int) -> bool:
    return dim % val(node).ndim == val(node).ndim - 1


def parse_rotation(cat: fx.Node) -> Rotation:
    """The rotation whose halves are put together here, or why it is none."""
    are_halves = is_call(args(cat)[0][0], aten.sub.Tensor)
    end, x, cos, sin = _turned_halves(cat) if are_halves else _turned(cat)
    for factor in cos, sin:
        _check_factor(factor, x, 2 if are_halves else 1)
    end, whole = _with_rest(end, x)
    if not is_call(whole, aten.permute.default) or list(args(whole)[1]) != [0, 2, 1, 3]:
        raise Declined("heads that were not beside each other")
    value = args(whole)[0]
    norm, source = _norm(value)
    _check_sizes(source)
    weight = norm.weight if norm else None
    _check_private(end, {source, cos, sin, weight})
    return Rotation(end, source, _angles(cos), _angles(sin), are_halves, norm)


def _turned(cat: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """What x * cos + cat * sin is, with x, cos and sin, where x's halves are swapped in `cat`."""
    x = _with_swapped_halves(cat)
    by_sin = _only_user(cat)
    end = _only_user(by_sin)
    if not is_call(by_sin, aten.mul.Tensor) or not is_call(end, aten.add.Tensor) or end.kwargs:
        raise Declined("swapped halves that are not multiplied and added")
    sin = _other(by_sin, cat)
    by_cos = _other(end, by_sin)
    if not is_call(by_cos, aten.mul.Tensor) or x not in args(by_cos):
        raise Declined("the heads are not multiplied by cosines")
    return end, x, _other(by_cos, x), sin


def _turned_halves(cat: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """`cat` of low * cos - high * sin and high * cos + low * sin, the halves of x; x, cos, sin."""
    lower, upper = args(cat)[0]
    products = [*args(lower), *args(upper)]
    if lower.kwargs or upper.kwargs or not all(is_call(p, aten.mul.Tensor) for p in products):
        raise Declined("halves that are not sums of products")
    for low, cos in operands(products[0]):
        for high, sin in operands(products[1]):
            others = {frozenset(args(p)) for p in products[2:]}
            if others == {frozenset((high, cos)), frozenset((low, sin))}:
                x = _with_halves(low, high)
                if x is not None and has_val(cos) and has_val(sin):
                    return cat, x, cos, sin
    raise Declined("halves that are not turned by the same angles")


def _with_halves(low: Any, high: Any) -> fx.Node | None:
    """The x of which these are the lower and the upper half, or None."""
    cuts = _cut(low), _cut(high)
    if cuts[0] is None or cuts[1] is None:
        return None
    (x, *lower_part), (other, *upper_part) = cuts[0], cuts[1]
    R = val(x).shape[-1]
    is_whole = R % 2 == 0 and (lower_part, upper_part) == ([0, R // 2], [R // 2, R])
    return x if x is other and is_whole else None


def _with_swapped_halves(cat: fx.Node) -> fx.Node:
    """The x of cat([-x[R / 2 :], x[: R / 2]], -1)."""
    upper, lower = args(cat)[0]
    negated = args(upper)[0] if is_call(upper, aten.neg.default) else None
    x = _with_halves(lower, negated)
    if x is None:
        raise Declined("not the upper half negated before the lower")
    return x


def _cut(piece: Any) -> tuple[fx.Node, int, int] | None:
    """What `piece` is a slice of in its last dim, from where to where."""
    if is_call(piece, operator.getitem):
        return _cut_of_split(*args(piece))
    if not is_call(piece, aten.slice.Tensor) or not is_last(piece, arg(piece, 1, "dim", 0)):
        return None
    source = args(piece)[0]
    size, start, end = val(source).shape[-1], arg(piece, 2, "start"), arg(piece, 3, "end")
    if arg(piece, 4, "step", 1) != 1 or not isinstance(size, int):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(size)
    return source, first, last


def _cut_of_split(split: fx.Node, index: int) -> tuple[fx.Node, int, int] | None:
    if not is_call(split, aten.split.Tensor) or arg(split, 2, "dim", 0) not in (-1, 3):
        return None
    source, size = args(split)[:2]
    features = val(source).shape[-1]
    if val(source).ndim != 4 or not all(isinstance(n, int) for n in (size, features)):
        return None
    return source, index * size, min((index + 1) * size, features)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise Declined("a value on the way is read elsewhere")
    return next(iter(node.users))


def _other(node: fx.Node, known: fx.Node) -> fx.Node:
    """The other operand of a product or sum, a tensor."""
    found = next((b for a, b in operands(node) if a is known), None)
    if not isinstance(found, fx.Node) or not has_val(found) or found is known:
        raise Declined("swapped halves that are not multiplied and added")
    return found


def _check_factor(factor: fx.Node, x: fx.Node, parts: int) -> None:
    """parts: of x's features, each multiplied by all of the factor."""
    B, _, Q, R = val(x).shape
    if val(factor).dtype != val(x).dtype:
        raise Declined(f"cosines in {val(factor).dtype}, heads in {val(x).dtype}")
    shape = val(factor).shape
    is_one_or_all = len(shape) == 4 and (same(shape[0], 1) or same(shape[0], B))
    if not is_one_or_all or not all(map(same, shape[1:], (1, Q, R // parts))):
        raise Declined(f"cosines or sines of {list(shape)}")


def _with_rest(end: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The same with the features that are not turned, if x is cut from whole heads."""
    cut = _cut(x)
    if cut is None:
        return end, x
    whole, R = cut[0], val(x).shape[-1]
    cat = _only_user(end)
    if cut[1] != 0 or not is_call(cat, aten.cat.default) or len(args(cat)[0]) != 2:
        raise Declined("a part of the features, not put together with the others")
    turned, rest = args(cat)[0]
    is_rest = _cut(rest) == (whole, R, val(whole).shape[-1])
    if turned is not end or not is_rest or not is_last(cat, arg(cat, 1, "dim", 0)):
        raise Declined("a part of the features, not put together with the others")
    return cat, whole


def _norm(value: fx.Node) -> tuple[RMSNorm | None, fx.Node]:
    """The RMSNorm over D that made `value`, and what it was made of; or None and `value`."""
    product = strip(value, *CASTS)
    for normed, _ in operands(product) if is_call(product, aten.mul.Tensor) else ():
        scaled = strip(normed, *CASTS)
        for wide, _ in operands(scaled) if is_call(scaled, aten.mul.Tensor) else ():
            for x in (args(wide)[0] if is_widening(wide) else wide, wide):
                norms = rms_norms_of(x) if has_val(x) else []
                norm = next((n for n in norms if n.value is value), None)
                if norm is None or val(x).dtype != val(value).dtype:
                    continue
                if val(x).dtype.itemsize < 4 and not norm.round_first:
                    raise Declined("a norm that is rounded after its weight")
                return norm, x
    return None, value


def _check_sizes(source: fx.Node) -> None:
    value = val(source)
    if value.dtype not in FLOATS:
        raise Declined(f"heads in {value.dtype}")
    if not all(isinstance(n, int) for n in value.shape[1:]):
        raise Declined(f"heads of {list(value.shape)}")


def _check_private(end: fx.Node, outside: set[fx.Node | None]) -> None:
    """Decline if anything else reads what is computed between `outside` and `end`."""
    inside, todo = {end}, [end]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in outside and n not in inside]
        inside.update(new)
        todo += new
    if any(not inside.issuperset(n.users) for n in inside if n is not end):
        raise Declined("a value on the way is read elsewhere")


def _angles(factor: fx.Node) -> fx.Node:
    """cos [B or 1, Q, R] of [B or 1, 1, Q, R], where the graph has it; else that."""
    if is_call(factor, aten.unsqueeze.default) and args(factor)[1] in (1, -3):
        return args(factor)[0]  # type: ignore[no-any-return]
    return factor
