"""Turn queries and keys by their positions in one kernel."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._check import FLOATS
from moe_compile.passes._graph import (
    CASTS,
    arg,
    args,
    aten,
    call,
    has_val,
    is_call,
    is_widening,
    operands,
    same,
    strip,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rms_norm import RMSNorm, rms_norms_of

_MOST_TOKENS = 8  # of a sequence; beyond, the kernels are as good as those that Inductor makes


@dataclass(frozen=True)
class _Rotation:
    """end [B, H, Q, D] is what `rotate` makes of source [B, Q, H, D]."""

    end: fx.Node
    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    norm: RMSNorm | None


@exactness("reassociating")
def rotate_together(graph: fx.Graph, devices: Collection[str] = ("cuda",)) -> Outcome:
    """On a GPU, norm and turn the queries and keys of few tokens in one kernel.

    Before:
        arg0_1: bf16[2, 1, 4, 8]
        arg1_1: bf16[2, 1, 2, 8]
        arg2_1: bf16[1, 1, 8]
        arg3_1: bf16[1, 1, 8]
        permute: bf16[2, 4, 1, 8] = aten.permute(arg0_1, [0, 2, 1, 3])
        permute_1: bf16[2, 2, 1, 8] = aten.permute(arg1_1, [0, 2, 1, 3])
        unsqueeze: bf16[1, 1, 1, 8] = aten.unsqueeze(arg2_1, 1)
        unsqueeze_1: bf16[1, 1, 1, 8] = aten.unsqueeze(arg3_1, 1)
        mul: bf16[2, 4, 1, 8] = aten.mul.Tensor(permute, unsqueeze)
        slice: bf16[2, 4, 1, 4] = aten.slice.Tensor(permute, 3, 0, 4)
        slice_1: bf16[2, 4, 1, 4] = aten.slice.Tensor(permute, 3, 4, 9223372036854775807)
        neg: bf16[2, 4, 1, 4] = aten.neg(slice_1)
        cat: bf16[2, 4, 1, 8] = aten.cat([neg, slice], -1)
        mul_1: bf16[2, 4, 1, 8] = aten.mul.Tensor(cat, unsqueeze_1)
        add: bf16[2, 4, 1, 8] = aten.add.Tensor(mul, mul_1)
        mul_2: bf16[2, 2, 1, 8] = aten.mul.Tensor(permute_1, unsqueeze)
        slice_2: bf16[2, 2, 1, 4] = aten.slice.Tensor(permute_1, 3, 0, 4)
        slice_3: bf16[2, 2, 1, 4] = aten.slice.Tensor(permute_1, 3, 4, 9223372036854775807)
        neg_1: bf16[2, 2, 1, 4] = aten.neg(slice_3)
        cat_1: bf16[2, 2, 1, 8] = aten.cat([neg_1, slice_2], -1)
        mul_3: bf16[2, 2, 1, 8] = aten.mul.Tensor(cat_1, unsqueeze_1)
        add_1: bf16[2, 2, 1, 8] = aten.add.Tensor(mul_2, mul_3)
        return [add, add_1]

    After:
        arg0_1: bf16[2, 1, 4, 8]
        arg1_1: bf16[2, 1, 2, 8]
        arg2_1: bf16[1, 1, 8]
        arg3_1: bf16[1, 1, 8]
        rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1)
        getitem: bf16[2, 4, 1, 8] = rotate[0]
        getitem_1: bf16[2, 2, 1, 8] = rotate[1]
        return [getitem, getitem_1]

    Inductor makes a kernel of each, and computes cosines and sines in every layer again, which
    takes longer than the heads: 3.3 us a layer of Qwen3-30B-A3B on an H200 for 32 query heads.
    As inputs of an op they are computed once. An RMSNorm of each head before is taken along.
    Left alone: other devices, more than 8 tokens a sequence or a number of them that is not known,
    heads whose partner turned by the same angles is not found, values on the way that anything else
    reads, and cosines in another dtype than the heads.
    Numerics: rounded where PyTorch rounds; the sum of squares of a norm in another order.
    """
    outcome = Outcome()
    waiting: dict[tuple[fx.Node, fx.Node], _Rotation] = {}
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        if val(cat).device.type not in devices or not _is_looked_at(cat):
            continue
        try:
            found = _rotation(cat)
        except Declined as reason:
            outcome.decline(cat, str(reason))
            continue
        key = found.cos, found.sin
        before = waiting.pop(key, None)
        if before is not None and not (apart := _why_apart(before, found)):
            new = _rotate(graph, before, found)
            (_, _, A, D), G = val(before.source).shape, val(found.source).shape[2]
            outcome.rewrote(new, f"{A} and {G} heads of {D} features turned in one kernel")
            continue
        if before is not None:
            outcome.decline(before.end, apart)
        waiting[key] = found
    for alone in waiting.values():
        outcome.decline(alone.end, "no other heads after these that the same angles turn")
    return outcome


def _is_looked_at(cat: fx.Node) -> bool:
    """Does this swap the halves of few tokens' heads, one of them negated?"""
    pieces = args(cat)[0]
    value = val(cat)
    if value.ndim != 4 or len(pieces) != 2:
        return False
    tokens = value.shape[2]
    if not isinstance(tokens, int) or not 1 <= tokens <= _MOST_TOKENS:
        return False
    return any(is_call(x, aten.neg.default) for x in pieces) and _is_last(
        cat, arg(cat, 1, "dim", 0)
    )


def _is_last(node: fx.Node, dim: int) -> bool:
    return dim % val(node).ndim == val(node).ndim - 1


def _rotation(cat: fx.Node) -> _Rotation:
    """The rotation whose halves are swapped here, or why it is none."""
    x = _with_swapped_halves(cat)
    by_sin = _only_user(cat)
    end = _only_user(by_sin)
    if not is_call(by_sin, aten.mul.Tensor) or not is_call(end, aten.add.Tensor) or end.kwargs:
        raise Declined("swapped halves that are not multiplied and added")
    sin = _other(by_sin, cat)
    by_cos = _other(end, by_sin)
    if not is_call(by_cos, aten.mul.Tensor) or x not in args(by_cos):
        raise Declined("the heads are not multiplied by cosines")
    cos = _other(by_cos, x)
    for factor in cos, sin:
        _check_factor(factor, x)
    end, whole = _with_rest(end, x)
    if not is_call(whole, aten.permute.default) or list(args(whole)[1]) != [0, 2, 1, 3]:
        raise Declined("heads that were not beside each other")
    value = args(whole)[0]
    norm, source = _norm(value)
    _check_sizes(source)
    weight = norm.weight if norm else None
    _check_private(end, {source, cos, sin, weight})
    return _Rotation(end, source, _angles(cos), _angles(sin), norm)


def _with_swapped_halves(cat: fx.Node) -> fx.Node:
    """The x of cat([-x[R / 2 :], x[: R / 2]], -1)."""
    upper, lower = args(cat)[0]
    cuts = [_cut(args(upper)[0]), _cut(lower)] if is_call(upper, aten.neg.default) else []
    R = val(cat).shape[-1]
    if not isinstance(R, int) or R % 2 or None in cuts or not cuts:
        raise Declined("not the upper half negated before the lower")
    (x, *upper_part), (other, *lower_part) = cuts  # type: ignore[misc]
    if x is not other or upper_part != [R // 2, R] or lower_part != [0, R // 2]:
        raise Declined("not the upper half negated before the lower")
    if not same(val(x).shape[-1], R):
        raise Declined("halves of another number of features than is turned")
    return x


def _cut(piece: Any) -> tuple[fx.Node, int, int] | None:
    """What `piece` is a slice of in its last dim, from where to where."""
    if not is_call(piece, aten.slice.Tensor) or not _is_last(piece, arg(piece, 1, "dim", 0)):
        return None
    source = args(piece)[0]
    size, start, end = val(source).shape[-1], arg(piece, 2, "start"), arg(piece, 3, "end")
    if arg(piece, 4, "step", 1) != 1 or not isinstance(size, int):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(size)
    return source, first, last


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise Declined("a value on the way is read elsewhere")
    return next(iter(node.users))


def _other(node: fx.Node, known: fx.Node) -> fx.Node:
    """The other operand of a product or sum, a tensor."""
    found = next((b for a, b in operands(node) if a is known), None)
    if not has_val(found) or found is known:
        raise Declined("swapped halves that are not multiplied and added")
    return found  # type: ignore[return-value]


def _check_factor(factor: fx.Node, x: fx.Node) -> None:
    B, _, Q, R = val(x).shape
    if val(factor).dtype != val(x).dtype:
        raise Declined(f"cosines in {val(factor).dtype}, heads in {val(x).dtype}")
    shape = val(factor).shape
    is_one_or_all = len(shape) == 4 and (same(shape[0], 1) or same(shape[0], B))
    if not is_one_or_all or not all(map(same, shape[1:], (1, Q, R))):
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
    if turned is not end or not is_rest or not _is_last(cat, arg(cat, 1, "dim", 0)):
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


def _why_apart(first: _Rotation, second: _Rotation) -> str:
    """Why two rotations can't be one op at the place of the second, or ""."""
    (B, Q, _, D), other = val(first.source).shape, val(second.source)
    if first.end is second.end or any(not second.end < user for user in first.end.users):
        return "read before the other heads of the same angles are there"
    if not all(map(same, (B, Q, D), (other.shape[0], other.shape[1], other.shape[3]))):
        return f"heads of {list(val(first.source).shape)} beside those of {list(other.shape)}"
    if val(first.source).dtype != other.dtype:
        return f"heads in {val(first.source).dtype} beside those in {other.dtype}"
    if first.norm and second.norm and first.norm.eps != second.norm.eps:
        return f"norms with {first.norm.eps} and {second.norm.eps}"
    return ""


def _rotate(graph: fx.Graph, first: _Rotation, second: _Rotation) -> fx.Node:
    """Both as one op where the second was, which all that both need comes before."""
    norms = [r.norm for r in (first, second)]
    weights = [norm.weight if norm else None for norm in norms]
    while weights and weights[-1] is None:
        weights.pop()
    eps = next(({"eps": norm.eps} for norm in norms if norm), {})
    sources = first.source, second.source
    with graph.inserting_before(second.end):
        angles = [
            x if val(x).ndim == 3 else call(graph, aten.squeeze.dim, x, 1, like=second.end)
            for x in (first.cos, first.sin)
        ]
        op = moe.rotate.default
        new = call(graph, op, *sources, *angles, *weights, like=second.end, **eps)
        parts = unpack(graph, new, 2)
    for old, part in zip((first.end, second.end), parts, strict=True):
        old.replace_all_uses_with(part)
    return new
