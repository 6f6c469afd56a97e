"""Let few queries attend to latents, instead of to keys and values that are made of all of them."""

import operator
from typing import Any, NamedTuple

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops.attend import MOST_FEATURES, MOST_LATENTS
from moe_compile.passes._graph import (
    COPIES,
    RESHAPES,
    arg,
    args,
    aten,
    call,
    is_call,
    same,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness

_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)
_FORMS: tuple[Any, ...] = (
    *(*RESHAPES, *COPIES, *_SPLITS, operator.getitem, aten.permute.default, aten.cat.default),
    *(aten.slice.Tensor, aten.slice_scatter.default, aten.copy.default),
)


class _Part(NamedTuple):
    """The features from start on, so many, of each head of a product."""

    product: fx.Node  # [B, A, S, W]
    start: int
    size: int


class _Latents(NamedTuple):
    """What keys and values are made of."""

    latents: fx.Node  # [B * S, L]
    weight: fx.Node  # [L, A * W]
    keys: _Part
    values: _Part
    k_rot: fx.Node  # [B, 1, S, U]


@exactness("reassociating")
def absorb_latents(graph: fx.Graph) -> Outcome:
    """Attend to latents (MLA) with queries and sums multiplied by the weight of keys and values.

    Before:
        arg0_1: f32[2, 1, 12, 16]
        arg1_1: f32[48, 16]
        arg2_1: f32[2, 1, 12, 2]
        arg3_1: f32[2, 4, 1, 4]
        arg4_1: f32[2, 4, 1, 2]
        reshape: f32[24, 16] = aten.reshape(arg0_1, [24, 16])
        permute: f32[16, 48] = aten.permute(arg1_1, [1, 0])
        mm: f32[24, 48] = aten.mm(reshape, permute)
        reshape_1: f32[2, 1, 12, 48] = aten.reshape(mm, [2, 1, 12, 48])
        reshape_2: f32[2, 12, 4, 12] = aten.reshape(reshape_1, [2, -1, 4, 12])
        permute_1: f32[2, 4, 12, 12] = aten.permute(reshape_2, [0, 2, 1, 3])
        split_with_sizes = aten.split_with_sizes(permute_1, [4, 8], -1)
        getitem: f32[2, 4, 12, 4] = split_with_sizes[0]
        getitem_1: f32[2, 4, 12, 8] = split_with_sizes[1]
        cat: f32[2, 4, 1, 6] = aten.cat([arg3_1, arg4_1], -1)
        expand: f32[2, 4, 12, 2] = aten.expand(arg2_1, [-1, 4, -1, -1])
        cat_1: f32[2, 4, 12, 6] = aten.cat([getitem, expand], -1)
        attend: f32[2, 4, 1, 8] = moe_compile.attend(cat, cat_1, getitem_1)
        return [attend]

    After:
        arg0_1: f32[2, 1, 12, 16]
        arg1_1: f32[48, 16]
        arg2_1: f32[2, 1, 12, 2]
        arg3_1: f32[2, 4, 1, 4]
        arg4_1: f32[2, 4, 1, 2]
        reshape: f32[4, 12, 16] = aten.reshape(arg1_1, [4, 12, 16])
        permute: f32[4, 2, 1, 4] = aten.permute(arg3_1, [1, 0, 2, 3])
        reshape_1: f32[4, 2, 4] = aten.reshape(permute, [4, -1, 4])
        slice: f32[4, 4, 16] = aten.slice.Tensor(reshape, 1, 0, 4)
        bmm: f32[4, 2, 16] = aten.bmm(reshape_1, slice)
        reshape_2: f32[4, 2, 1, 16] = aten.reshape(bmm, [4, -1, 1, 16])
        permute_1: f32[2, 4, 1, 16] = aten.permute(reshape_2, [1, 0, 2, 3])
        attend: f32[2, 4, 1, 16] = moe_compile.attend(permute_1, arg0_1, None, scale=0.408248290463863, q_rot=arg4_1, k_rot=arg2_1)
        slice_1: f32[4, 8, 16] = aten.slice.Tensor(reshape, 1, 4, 12)
        permute_2: f32[4, 16, 8] = aten.permute(slice_1, [0, 2, 1])
        permute_3: f32[4, 2, 1, 16] = aten.permute(attend, [1, 0, 2, 3])
        reshape_3: f32[4, 2, 16] = aten.reshape(permute_3, [4, -1, 16])
        bmm_1: f32[4, 2, 8] = aten.bmm(reshape_3, permute_2)
        reshape_4: f32[4, 2, 1, 8] = aten.reshape(bmm_1, [4, -1, 1, 8])
        permute_4: f32[2, 4, 1, 8] = aten.permute(reshape_4, [1, 0, 2, 3])
        return [permute_4]

    Keys and values are the product of the latents of all positions with a weight, in every step:
    (q W_k) . c is q . (W_k c), and the same weights' sum of W_v c is W_v of their sum of c. So the
    weight multiplies a few rows for each head instead, by a `bmm` that reads it once, and `attend`
    reads the cache as it lies, once for all heads. The rotary part of the keys, which has no weight
    and is one for all heads, is their second part.

    Left alone: keys and values of different products, of other products than a plain one of two
    matrices, or that others read; keys that heads share; positions whose number is not known;
    so many queries that keys and values are cheaper; more than MOST_LATENTS features of a latent.
    Numerics: queries and sums are rounded after the weight, and keys and values are not.
    """  # noqa: E501
    outcome = Outcome()
    for node in graph.find_nodes(op="call_function", target=moe.attend.default):
        parts = _parts(args(node)[1])
        k_rot = None if parts is None else _one_head(parts[1])
        if args(node)[2] is None or parts is None or k_rot is None:
            continue
        try:
            found = _parse(node, parts[0], k_rot)
        except Declined as reason:
            outcome.decline(node, str(reason))
            continue
        new = _rewrite(graph, node, found)
        A, S = val(new).shape[1], val(found.k_rot).shape[2]
        outcome.rewrote(new, f"{A} heads over {S} latents of {val(found.latents).shape[1]}")
    return outcome


def _parts(keys: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two that keys have side by side, or None."""
    keys = strip(keys, *COPIES)
    if is_call(keys, aten.cat.default) and arg(keys, 1, "dim", 0) in (-1, 3):
        parts = args(keys)[0]
        return tuple(parts) if len(parts) == 2 else None
    first, inner = _written(keys), None
    if first is not None and first[1] > 0 and first[2] >= val(keys).shape[3]:
        inner = _written(args(keys)[0])
    if first is None or inner is None or (inner[1], inner[2]) != (0, first[1]):
        return None
    return inner[0], first[0]


def _written(x: Any) -> tuple[fx.Node, int, int] | None:
    """What was last written to features of x, and to which: from and up to."""
    if not is_call(x, aten.slice_scatter.default) or arg(x, 2, "dim", 0) not in (-1, 3):
        return None
    piece, start, end = args(x)[1], arg(x, 3, "start"), arg(x, 4, "end")
    if arg(x, 5, "step", 1) != 1 or not all(isinstance(n, int) for n in (start, end)):
        return None
    if is_call(piece, aten.copy.default):
        source = args(piece)[1]
        fits = val(source).dtype == val(piece).dtype and val(source).ndim == 4
        piece = source if fits else piece
    return piece, start, end


def _one_head(x: fx.Node) -> Any:
    """The x' [B, 1, S, U] that x holds for each of several heads, or None."""
    if not same(val(x).shape[1], 1) and is_call(x, aten.expand.default):
        x = strip(x, aten.expand.default)
    shape = val(x).shape
    return x if len(shape) == 4 and same(shape[1], 1) else None


def _parse(node: fx.Node, nope: fx.Node, k_rot: fx.Node) -> _Latents:
    """What the keys and values of an attention are made of, or why they don't fit."""
    query, all_keys, all_values = args(node)[:3]
    (B, A, Q, D), S = val(query).shape, val(all_keys).shape[2]
    keys, values = _part(nope), _part(all_values)
    if values.product is not keys.product:
        raise Declined("values of another product than the keys")
    rows = _rows(keys.product)
    W, U = val(keys.product).shape[3], val(k_rot).shape[3]
    if not is_call(rows, aten.mm.default):
        raise Declined("keys that are no plain product of latents and a weight")
    latents, weight = args(rows)
    L = val(latents).shape[1]
    if not (
        same_shape(all_keys, (B, A, S, D))
        and same_shape(k_rot, (B, 1, S, U))
        and same_shape(keys.product, (B, A, S, W))
        and same(keys.size + U, D)
    ):
        raise Declined("keys that query heads or sequences share")
    if not all(isinstance(n, int) for n in (A, Q, S, W, L)):
        raise Declined(f"{S} positions, which are not known")
    if L > MOST_LATENTS or U > MOST_FEATURES:
        raise Declined(f"latents of {L} and {U} features")
    made, size = L * (keys.size + values.size), 2 * L + U
    if Q * (made + S * size) >= S * (made + Q * (D + values.size)):
        raise Declined(f"{Q} queries of {S} positions: keys and values are cheaper")
    if not _is_only_for(rows, node):
        raise Declined("keys or values that others read")
    return _Latents(latents, weight, keys, values, k_rot)


def _part(x: Any) -> _Part:
    """Of which product x [B, A, S, N] has which features of each head; all of it, if it is none."""
    x = strip(x, *COPIES)
    if is_call(x, aten.slice.Tensor) and arg(x, 1, "dim", 0) in (-1, 3):
        start, whole = arg(x, 2, "start") or 0, args(x)[0]
        if arg(x, 4, "step", 1) == 1 and isinstance(start, int) and start >= 0:
            return _Part(whole, start, val(x).shape[3])
    if is_call(x, operator.getitem) and is_call(x.args[0], *_SPLITS):
        split, index = x.args
        if arg(split, 2, "dim", 0) in (-1, 3):
            before = split.meta["val"][:index]
            return _Part(args(split)[0], sum(piece.shape[3] for piece in before), val(x).shape[3])
    return _Part(x, 0, val(x).shape[3])


def _rows(product: fx.Node) -> Any:
    """The [B * S, A * W] that product [B, A, S, W] shows by heads, or what is there instead."""
    product = strip(product, *COPIES)
    if not is_call(product, aten.permute.default) or args(product)[1] != [0, 2, 1, 3]:
        return product
    (B, A, S, W), rows = val(product).shape, strip(args(product)[0], *COPIES, *RESHAPES)
    is_flat = val(rows).ndim == 2 and same_shape(rows, (B * S, A * W))
    return rows if is_flat else product


def _is_only_for(source: fx.Node, reader: fx.Node) -> bool:
    """Does all that is made of `source`, in another form, end in `reader`?"""
    todo, seen = [source], {source}
    while todo:
        for user in todo.pop().users:
            if user is not reader and user.target not in _FORMS:
                return False
            if user is not reader and user not in seen:
                seen.add(user)
                todo.append(user)
    return True


def _rewrite(graph: fx.Graph, node: fx.Node, found: _Latents) -> fx.Node:
    """`attend` to the latents in the place of `node`, between products for each head."""
    (B, A, Q, _), S = val(args(node)[0]).shape, val(found.k_rot).shape[2]
    L, W, F = val(found.latents).shape[1], val(found.keys.product).shape[3], found.values.size

    def op(target: Any, *arguments: Any) -> fx.Node:
        return call(graph, target, *arguments, like=node)

    def by_heads(x: fx.Node) -> fx.Node:
        """x [B, A, Q, N] as [A, B * Q, N]."""
        x = op(aten.permute.default, x, [1, 0, 2, 3])
        return op(aten.reshape.default, x, [A, -1, val(x).shape[3]])

    def by_sequences(x: fx.Node, size: int) -> fx.Node:
        """x [A, B * Q, N] as [B, A, Q, N]."""
        x = op(aten.reshape.default, x, [A, -1, Q, size])
        return op(aten.permute.default, x, [1, 0, 2, 3])

    def weight_of(part: _Part) -> fx.Node:
        """The rows [A, N, L] of the weight that make a part of each head: a view."""
        return op(aten.slice.Tensor, weight, 1, part.start, part.start + part.size)

    with graph.inserting_before(node):
        weight = op(aten.reshape.default, _turned(graph, node, found.weight), [A, W, L])
        nope, q_rot = _parts_of_query(graph, node, found.keys.size)
        query = by_sequences(op(aten.bmm.default, by_heads(nope), weight_of(found.keys)), L)
        latents = _unreshaped(found.latents, (B, 1, S, L))
        if latents is None:
            latents = op(aten.reshape.default, found.latents, [-1, 1, S, L])
        given: dict[str, Any] = {"scale": arg(node, 4, "scale"), "last": arg(node, 5, "last")}
        given |= {"sinks": arg(node, 6, "sinks"), "q_rot": q_rot, "k_rot": found.k_rot}
        if given["scale"] is None:
            given["scale"] = (found.keys.size + val(q_rot).shape[3]) ** -0.5
        given = {name: value for name, value in given.items() if value is not None}
        masks = [] if arg(node, 3, "mask") is None else [arg(node, 3, "mask")]
        new = call(graph, moe.attend.default, query, latents, None, *masks, like=node, **given)
        turned = op(aten.permute.default, weight_of(found.values), [0, 2, 1])
        out = by_sequences(op(aten.bmm.default, by_heads(new), turned), F)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return new


def _turned(graph: fx.Graph, node: fx.Node, weight: fx.Node) -> Any:
    """The transpose of a weight, which often is one itself."""
    if is_call(weight, aten.permute.default) and args(weight)[1] == [1, 0]:
        return args(weight)[0]
    return call(graph, aten.permute.default, weight, [1, 0], like=node)


def _parts_of_query(graph: fx.Graph, node: fx.Node, size: int) -> tuple[Any, Any]:
    """So many features of the query and the others: what it was put together of, if they are."""
    query = args(node)[0]
    parts = _parts(query)
    if parts is not None and same(val(parts[0]).shape[3], size):
        return parts
    D = val(query).shape[3]
    first = call(graph, aten.slice.Tensor, query, 3, 0, size, like=node)
    return first, call(graph, aten.slice.Tensor, query, 3, size, D, like=node)


def _unreshaped(x: fx.Node, shape: tuple[Any, ...]) -> Any:
    """What x was reshaped from, if that has this shape, or None."""
    while not same_shape(x, shape):
        if not is_call(x, *RESHAPES):
            return None
        x = args(x)[0]
    return x
