"""Let the attention of one query read the cache where it lies."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._check import FLOATS
from moe_compile.ops.attend import MOST_FEATURES
from moe_compile.passes._eager_attention import closing, parse_eager
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    arg,
    args,
    aten,
    call,
    constant,
    is_call,
    same,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._positions import WHOLE, before_reshapes, is_arange
from moe_compile.passes._window import last_open

_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_ATTENTIONS = (
    _CUDNN,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
)

# What torch adds to scores for cuDNN where a bool mask is False, in float16; for others -inf.
_CLOSED_TO_CUDNN = -65504.0


@exactness("reassociating")
def read_cache(graph: fx.Graph) -> Outcome:
    """On a GPU, let the attention of one query read keys and values that are not repeated.

    Before:
        arg0_1: bf16[2, 4, 6, 8]
        arg1_1: bf16[2, 4, 6, 8]
        arg2_1: b8[2, 1, 1, 6]
        arg3_1: bf16[2, 8, 1, 8]
        full: bf16[] = aten.full([], 0.0, dtype=bf16)
        full_1: bf16[] = aten.full([], -65536.0, dtype=bf16)
        where: bf16[2, 1, 1, 6] = aten.where.self(arg2_1, full, full_1)
        unsqueeze: bf16[2, 4, 1, 6, 8] = aten.unsqueeze(arg0_1, 2)
        expand: bf16[2, 4, 2, 6, 8] = aten.expand(unsqueeze, [2, 4, 2, 6, 8])
        clone: bf16[2, 4, 2, 6, 8] = aten.clone(expand)
        _unsafe_view: bf16[2, 8, 6, 8] = aten._unsafe_view(clone, [2, 8, 6, 8])
        unsqueeze_1: bf16[2, 4, 1, 6, 8] = aten.unsqueeze(arg1_1, 2)
        expand_1: bf16[2, 4, 2, 6, 8] = aten.expand(unsqueeze_1, [2, 4, 2, 6, 8])
        clone_1: bf16[2, 4, 2, 6, 8] = aten.clone(expand_1)
        _unsafe_view_1: bf16[2, 8, 6, 8] = aten._unsafe_view(clone_1, [2, 8, 6, 8])
        _scaled_dot_product_cudnn_attention = aten._scaled_dot_product_cudnn_attention(arg3_1, _unsafe_view, _unsafe_view_1, where, False)
        getitem: bf16[2, 8, 1, 8] = _scaled_dot_product_cudnn_attention[0]
        return [getitem]

    After:
        arg0_1: bf16[2, 4, 6, 8]
        arg1_1: bf16[2, 4, 6, 8]
        arg2_1: b8[2, 1, 1, 6]
        arg3_1: bf16[2, 8, 1, 8]
        attend: bf16[2, 8, 1, 8] = moe_compile.attend(arg3_1, arg0_1, arg1_1, arg2_1)
        return [attend]

    A mask that only says up to which position a sequence is filled, positions <= p or p >= positions
    with a p for each sequence or for all, is not made: `attend` takes p itself, as `last`. So is the
    mask of a window that slides (`_window.py`).

    The repetition is a copy of the whole cache, and its mask is written out once more as numbers.
    On an H200 that and cuDNN's attention take 20 us a layer of Qwen3-30B-A3B (one sequence, 640
    positions), of which reading the cache is 0.3 us.

    Attention that a model wrote out, as products and a softmax, becomes the same, and the column of
    sinks that gpt-oss adds to its scores becomes `sinks`.

    Left alone: other devices, more queries than one or a number of them that is not known, causal
    masks (which kernels align differently), dropout, other outputs that are read, heads of more
    than MOST_FEATURES features.
    Numerics: the same softmax in float32, its sums in another order; what a model wrote out and
    rounded in between is not. A query that may attend to
    nothing gives zeros, where cuDNN, for which torch writes a bool mask as finite numbers, attends to
    all positions, and so does a model that adds such numbers.
    """  # noqa: E501
    outcome = Outcome()
    for target in _ATTENTIONS:
        for node in graph.find_nodes(op="call_function", target=target):
            query = val(args(node)[0])
            if query.device.type == "cuda" and query.ndim == 4 and same(query.shape[2], 1):
                _try(outcome, graph, node, _of_kernel)
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        if val(node).device.type == "cuda" and same(val(node).shape[1], 1):
            _try(outcome, graph, node, _of_products)
    return outcome


def _try(outcome: Outcome, graph: fx.Graph, node: fx.Node, make: Callable[..., Any]) -> None:
    try:
        new = make(graph, node)
    except Declined as reason:
        outcome.decline(node, str(reason))
        return
    if new is not None:
        (_, A, _, _), (_, G, S, _) = val(new).shape, val(args(new)[1]).shape
        outcome.rewrote(new, f"one query over {S} positions, {A} heads over {G}: attend")


def _of_products(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """`attend` in the place of an attention that a model wrote out, if `node` ends one."""
    found = parse_eager(node)
    if found is None:
        return None
    most = -math.inf if found.mask is None else closing(found.mask)
    with graph.inserting_before(node):
        more: dict[str, Any] = {"scale": found.scale}
        if found.sinks is not None:
            shape = [val(found.sinks).shape[0], -1]
            more["sinks"] = call(graph, aten.reshape.default, found.sinks, shape, like=node)
        query, keys, values = found.query, found.keys, found.values
        new = _attend(graph, node, query, keys, values, found.mask, most, **more)
        shape = list(val(node).shape)
        node.replace_all_uses_with(call(graph, aten.reshape.default, new, shape, like=node))
    graph.erase_node(node)
    return new


def _of_kernel(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`attend` in the place of one of torch's attentions."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, args(node), strict=False)), **node.kwargs}
    if given.get("dropout_p") or given.get("dropout_mask") is not None:
        raise Declined("dropout")
    if given.get("is_causal"):
        raise Declined("a causal mask")
    if any(not is_call(u, operator.getitem) or (u.args[1] != 0 and u.users) for u in node.users):
        raise Declined("another output than the attention's is read")
    mask = given.get("attn_bias", given.get("attn_mask"))
    more: dict[str, Any] = {} if given.get("scale") is None else {"scale": given["scale"]}
    most = _CLOSED_TO_CUDNN if node.target == _CUDNN else -math.inf
    with graph.inserting_before(node):
        query, keys, values = args(node)[:3]
        new = _attend(graph, node, query, keys, values, mask, most, **more)
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)  # dead code elimination takes it for random, and keeps it
    return new


def _attend(
    graph: fx.Graph,
    node: fx.Node,
    query: fx.Node,
    keys: fx.Node,
    values: fx.Node,
    mask: Any,
    most: float,
    **more: Any,
) -> fx.Node:
    """`attend` where the graph inserts, like `node`, or why not.

    most: what the mask adds where it is closed, at the most.
    """
    if not val(keys).ndim == val(values).ndim == 4:
        raise Declined("keys and values that broadcast")
    keys, values = _not_repeated(keys, values)
    _fit(query, keys, values)
    mask = None if mask is None else _mask(graph, node, mask, most, (query, keys))
    last = _last(mask, query, keys)
    if last is None and (filled := last_open(mask, val(keys))) is not None:
        mask, last = None, filled.base
        if last is not None and filled.add:
            last = call(graph, aten.add.Tensor, last, filled.add, like=node)
    if last is not None:
        if val(last).ndim != 1:
            last = call(graph, aten.reshape.default, last, [-1], like=node)
        more["last"] = last
    masks = [] if mask is None or last is not None else [mask]
    return call(graph, moe.attend.default, query, keys, values, *masks, like=node, **more)


def _fit(query: fx.Node, keys: fx.Node, values: fx.Node) -> None:
    """Decline what `attend` would refuse."""
    (B, A, _, D), (_, G, S, F) = val(query).shape, val(values).shape
    if not (same_shape(keys, (B, G, S, D)) and same_shape(values, (B, G, S, F))):
        raise Declined("keys and values that broadcast")
    if not (isinstance(A, int) and isinstance(G, int) and A % G == 0):
        raise Declined(f"{A} query heads over {G} heads of keys")
    if not all(isinstance(n, int) and n <= MOST_FEATURES for n in (D, F)):
        raise Declined(f"heads of {D} and {F} features")
    dtypes = {val(x).dtype for x in (query, keys, values)}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        raise Declined(f"dtypes {', '.join(sorted(map(str, dtypes)))}")


def _not_repeated(keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before each head was repeated for its query heads, if both were."""
    before = _before_repetition(keys), _before_repetition(values)
    if before[0] is None or before[1] is None:
        return keys, values
    same_heads = same(val(before[0]).shape[1], val(before[1]).shape[1])
    return before if same_heads else (keys, values)


def _before_repetition(x: fx.Node) -> Any:
    """The x' [B, G, S, D] of which x [B, A, S, D] holds each head A / G times in a row, or None."""
    B, A, S, D = val(x).shape
    expanded = strip(x, *COPIES, *RESHAPES)
    if not is_call(expanded, aten.expand.default):
        return None
    one = args(expanded)[0]
    if same_shape(expanded, (B, A, S, D)) and same_shape(one, (B, 1, S, D)):
        return one
    G, repeats = val(one).shape[1], val(expanded).shape[2]
    if not (same_shape(one, (B, G, 1, S, D)) and same_shape(expanded, (B, G, repeats, S, D))):
        return None
    source = strip(one, *RESHAPES, aten.unsqueeze.default)
    return source if same_shape(source, (B, G, S, D)) else None


def _mask(graph: fx.Graph, node: fx.Node, mask: Any, most: float, of: tuple[Any, Any]) -> Any:
    """The mask as it was before torch expanded, padded or wrote it as numbers to be added."""
    mask = _not_expanded(mask)
    written = strip(mask, *CASTS)
    if is_call(written, aten.where.self):
        condition, yes, no = args(written)
        if constant(yes) == 0 and _closes(no, most):
            mask = _not_expanded(condition)
        elif constant(no) == 0 and _closes(yes, most):
            mask = call(graph, aten.logical_not.default, _not_expanded(condition), like=node)
    (B, A, Q, _), positions = val(of[0]).shape, val(of[1]).shape[2]
    shape = val(mask).shape
    fits = len(shape) == 4 and same(shape[3], positions)
    if not fits or not all(
        same(n, 1) or same(n, m) for n, m in zip(shape, (B, A, Q), strict=False)
    ):
        raise Declined(f"a mask of {list(shape)}")
    if val(mask).dtype not in (torch.bool, *FLOATS):
        raise Declined(f"a mask in {val(mask).dtype}")
    return mask


def _last(mask: Any, query: fx.Node, keys: fx.Node) -> Any:
    """The last open position of each sequence or of all, if that is all that a mask says, or None.

    In any shape, with as many elements as there are sequences, or one.
    """
    if is_call(mask, aten.le.Tensor):
        positions, last = args(mask)
    elif is_call(mask, aten.ge.Tensor):
        last, positions = args(mask)
    else:
        return None
    if not is_arange(positions, val(keys).shape[2]):
        return None
    shape = val(last).shape  # sequences in the first of four dims, if there are several
    if not all(same(n, 1) for n in (shape[1:] if len(shape) == 4 else shape)):
        return None
    last = before_reshapes(last)
    B = shape[0] if len(shape) == 4 else 1
    fits = same(val(last).numel(), 1) or same(B, val(query).shape[0])
    is_whole = val(last).dtype in WHOLE
    return last if fits and is_whole and val(last).device == val(query).device else None


def _closes(number: Any, most: float) -> bool:
    """Is this what is added to the scores of an attention where a bool mask is False?"""
    value = constant(number)
    return isinstance(value, (int, float)) and value <= most


def _not_expanded(mask: Any) -> Any:
    """The mask before expansion of its first dims, and padding of its last for alignment."""
    while True:
        source = _source_of_slice(mask) if is_call(mask, aten.slice.Tensor) else None
        if is_call(mask, aten.expand.default):
            source = args(mask)[0]
        if source is None or val(source).ndim != 4:
            return mask
        if not same(val(source).shape[3], val(mask).shape[3]):
            return mask
        mask = source


def _source_of_slice(piece: fx.Node) -> Any:
    """What was padded at its end, if `piece` cuts off that padding again."""
    padded, dim, start = args(piece)[0], arg(piece, 1, "dim", 0), arg(piece, 2, "start")
    if dim not in (-1, 3) or start not in (None, 0) or arg(piece, 4, "step", 1) != 1:
        return None
    if not is_call(padded, aten.constant_pad_nd.default):
        return None
    source, (before, *_) = args(padded)[:2]
    return source if before == 0 and len(args(padded)[1]) == 2 else None
