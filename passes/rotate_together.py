"""Turn queries and keys by their positions in one kernel."""

from collections.abc import Collection

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import (
    arg,
    args,
    aten,
    call,
    is_call,
    readers_before,
    same,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rotation import Rotation, is_last, parse_rotation

_MOST_TOKENS = 8  # of a sequence; beyond, the kernels are as good as those that Inductor makes


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
    A model may turn the halves each by itself, with cosines and sines of one half (gpt-oss): these
    are put side by side, once for all layers.
    Left alone: other devices, more than 8 tokens a sequence or a number of them that is not known,
    heads whose partner turned by the same angles is not found, values on the way that anything else
    reads, and cosines in another dtype than the heads.
    Numerics: rounded where PyTorch rounds; the sum of squares of a norm in another order.
    """
    outcome = Outcome()
    waiting: dict[tuple[fx.Node, fx.Node, bool], Rotation] = {}
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        if val(cat).device.type not in devices or not _is_looked_at(cat):
            continue
        try:
            found = parse_rotation(cat)
        except Declined as reason:
            outcome.decline(cat, str(reason))
            continue
        key = found.cos, found.sin, found.are_halves
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
    """Does this put the halves of few tokens' heads together, swapped or each turned by itself?"""
    pieces = args(cat)[0]
    value = val(cat)
    if value.ndim != 4 or len(pieces) != 2:
        return False
    tokens = value.shape[2]
    if not isinstance(tokens, int) or not 1 <= tokens <= _MOST_TOKENS:
        return False
    swapped = any(is_call(x, aten.neg.default) for x in pieces)
    turned = [is_call(x, op.Tensor) for x, op in zip(pieces, (aten.sub, aten.add), strict=True)]
    return (swapped or all(turned)) and is_last(cat, arg(cat, 1, "dim", 0))


def _why_apart(first: Rotation, second: Rotation) -> str:
    """Why two rotations can't be one op at the place of the second, or ""."""
    (B, Q, _, D), other = val(first.source).shape, val(second.source)
    if first.end is second.end or _early(first, second) is None:
        return "read before the other heads of the same angles are there"
    if not all(map(same, (B, Q, D), (other.shape[0], other.shape[1], other.shape[3]))):
        return f"heads of {list(val(first.source).shape)} beside those of {list(other.shape)}"
    if val(first.source).dtype != other.dtype:
        return f"heads in {val(first.source).dtype} beside those in {other.dtype}"
    if first.norm and second.norm and first.norm.eps != second.norm.eps:
        return f"norms with {first.norm.eps} and {second.norm.eps}"
    return ""


def _early(first: Rotation, second: Rotation) -> list[fx.Node] | None:
    """What reads the first heads before the second are turned, and may come after; or None."""
    early = readers_before(second.end, {first.end})
    is_needed = second.end in early or any(reader.is_impure() for reader in early)
    return None if is_needed or (early and _is_anything_written(early[0], second.end)) else early


def _is_anything_written(node: fx.Node, end: fx.Node) -> bool:
    while node is not end and not node.is_impure():
        node = node.next
    return node is not end


def _rotate(graph: fx.Graph, first: Rotation, second: Rotation) -> fx.Node:
    """Both as one op where the second was, which all that both need comes before."""
    norms = [r.norm for r in (first, second)]
    weights = [norm.weight if norm else None for norm in norms]
    while weights and weights[-1] is None:
        weights.pop()
    eps = next(({"eps": norm.eps} for norm in norms if norm), {})
    sources = first.source, second.source
    early = _early(first, second) or []
    factors = [_both_halves(graph, x) if first.are_halves else x for x in (first.cos, first.sin)]
    with graph.inserting_before(second.end):
        angles = [
            x if val(x).ndim == 3 else call(graph, aten.squeeze.dim, x, 1, like=second.end)
            for x in factors
        ]
        op = moe.rotate.default
        new = call(graph, op, *sources, *angles, *weights, like=second.end, **eps)
        parts = unpack(graph, new, 2)
    for reader in reversed(early):
        parts[-1].append(reader)
    for old, part in zip((first.end, second.end), parts, strict=True):
        old.replace_all_uses_with(part)
    return new


def _both_halves(graph: fx.Graph, angles: fx.Node) -> fx.Node:
    """These angles twice, side by side, where they are known: so that all layers share them."""
    target = aten.cat.default
    for user in angles.users:
        if is_call(user, target) and args(user) == ([angles, angles], -1):
            return user
    place = angles.next
    while place.op == "placeholder":
        place = place.next
    with graph.inserting_before(place):
        return call(graph, target, [angles, angles], -1, like=angles)
