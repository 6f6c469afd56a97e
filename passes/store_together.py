"""Write the keys and values of few tokens to their cache in the kernel that turns the keys."""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from moe_compile.ops import moe
from moe_compile.ops.rotate_and_push import MOST_ELEMENTS
from moe_compile.passes._cache_writes import COPY, Write, parse_write, write_of
from moe_compile.passes._graph import (
    args,
    aten,
    call,
    is_call,
    readers_before,
    same_shape,
    storage,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._positions import before_reshapes


@exactness("bitwise")
def store_together(graph: fx.Graph, devices: Collection[str] = ("cuda",)) -> Outcome:
    """On a GPU, let `rotate` write its keys, and the values beside them, to a static cache.

    Before:
        arg0_1: bf16[2, 1, 4, 8]
        arg1_1: bf16[2, 1, 2, 8]
        arg2_1: bf16[2, 1, 2, 8]
        arg3_1: bf16[1, 1, 8]
        arg4_1: bf16[1, 1, 8]
        arg5_1: bf16[2, 2, 6, 8]
        arg6_1: bf16[2, 2, 6, 8]
        arg7_1: i64[1]
        rotate = moe_compile.rotate(arg0_1, arg1_1, arg3_1, arg4_1)
        getitem: bf16[2, 4, 1, 8] = rotate[0]
        getitem_1: bf16[2, 2, 1, 8] = rotate[1]
        index_put: bf16[2, 2, 6, 8] = aten.index_put(arg5_1, [None, None, arg7_1], getitem_1)
        permute: bf16[2, 2, 1, 8] = aten.permute(arg2_1, [0, 2, 1, 3])
        index_put_1: bf16[2, 2, 6, 8] = aten.index_put(arg6_1, [None, None, arg7_1], permute)
        attend: bf16[2, 4, 1, 8] = moe_compile.attend(getitem, index_put, index_put_1)
        copy_: bf16[2, 2, 6, 8] = aten.copy_(arg5_1, index_put)
        copy__1: bf16[2, 2, 6, 8] = aten.copy_(arg6_1, index_put_1)
        return [attend]

    After:
        arg0_1: bf16[2, 1, 4, 8]
        arg1_1: bf16[2, 1, 2, 8]
        arg2_1: bf16[2, 1, 2, 8]
        arg3_1: bf16[1, 1, 8]
        arg4_1: bf16[1, 1, 8]
        arg5_1: bf16[2, 2, 6, 8]
        arg6_1: bf16[2, 2, 6, 8]
        arg7_1: i64[1]
        auto_functionalized = auto_functionalized(moe_compile.rotate_and_store.default, q=arg0_1, k=arg1_1, v=arg2_1, cos=arg3_1, sin=arg4_1, k_cache=arg5_1, v_cache=arg6_1, position=arg7_1)
        getitem: bf16[2, 4, 1, 8] = auto_functionalized[0]
        getitem_1: bf16[2, 2, 6, 8] = auto_functionalized[1]
        getitem_2: bf16[2, 2, 6, 8] = auto_functionalized[2]
        attend: bf16[2, 4, 1, 8] = moe_compile.attend(getitem, getitem_1, getitem_2)
        copy_: bf16[2, 2, 6, 8] = aten.copy_(arg5_1, getitem_1)
        copy__1: bf16[2, 2, 6, 8] = aten.copy_(arg6_1, getitem_2)
        return [attend]

    The graph stays functional. Inductor writes to the caches in place, as it does for an index_put,
    where nothing reads what they held before and they are written back, and each is a memory of its
    own: all three are proved here, since else it would copy whole caches. The position of one token
    is its cache's counter, read by the kernel itself.

    A full window that slides, all of which a model moves up by one position for each token (a roll,
    a write at -1, a copy back: six kernels for keys and values), becomes `rotate_and_push`.
    Left alone: other devices, caches that are no inputs, that anything else reads or writes, or that
    are returned, keys that anything else reads, values that are not permuted heads, and windows of
    more than MOST_ELEMENTS a head. What reads queries or keys before the values are there moves
    behind the op, if it is pure.
    Numerics: equal. A position outside of the cache is an assertion of index_put; here nothing is
    stored.
    """  # noqa: E501
    outcome = Outcome()
    for node in graph.find_nodes(op="call_function", target=moe.rotate.default):
        if val(args(node)[0]).device.type not in devices:
            continue
        try:
            _store(graph, node)
        except Declined as reason:
            outcome.decline(node, str(reason))
            continue
        outcome.rewrote(node, "keys and values written to the cache by the same kernel")
    return outcome


def _store(graph: fx.Graph, node: fx.Node) -> None:
    q, k = (_result(node, i) for i in (0, 1))
    keys = write_of(k)
    if keys is None:
        raise Declined("keys that are not just written to a static cache")
    values = _write_of_values(keys)
    value = args(values.value)[0]
    _check_sizes(node, value, keys, values)
    k_write, v_write = keys.node, values.node
    returned = {storage(x) for x in graph.output_node().all_input_nodes}
    if not returned.isdisjoint(map(storage, (k_write, v_write))):
        raise Declined("a cache that is returned as it was in this step")
    last = max(k_write, v_write)
    if any(copy < last for copy in graph.find_nodes(op="call_function", target=COPY)):
        raise Declined("an input is written before the keys and values are there")
    early = readers_before(last, {q, k, args(k_write)[2], k_write, v_write})
    if not {value, keys.position}.isdisjoint(early) or any(reader.is_impure() for reader in early):
        raise Declined("queries or keys that are read before the values are there")
    given: dict[str, Any] = dict(zip(("q", "k"), args(node), strict=False))
    given |= {"v": value, "cos": args(node)[2], "sin": args(node)[3]}
    given |= {"k_cache": keys.cache, "v_cache": values.cache}
    more = zip(("q_weight", "k_weight", "eps"), args(node)[4:], strict=False)
    with graph.inserting_before(last):
        op = moe.rotate_and_push.default
        if not keys.pushed:
            op = moe.rotate_and_store.default
            given["position"] = _position(graph, keys.position)
        given |= {**dict(more), **node.kwargs}
        new = call(graph, auto_functionalized, op, like=node, **given)
        parts = unpack(graph, new, 3)
    for reader in reversed(early):
        parts[-1].append(reader)
    for old, part in zip((q, k_write, v_write), parts, strict=True):
        old.replace_all_uses_with(part)


def _result(node: fx.Node, index: int) -> fx.Node:
    found = [u for u in node.users if is_call(u, operator.getitem) and u.args[1] == index]
    if len(found) != 1 or len(node.users) != 2:
        raise Declined("queries or keys that nothing reads")
    return found[0]


def _write_of_values(keys: Write) -> Write:
    """The write beside that of the keys, at the same position."""
    found = []
    for reader in keys.position.users:
        write = parse_write(reader)
        if write is None or write.node is keys.node or write.pushed != keys.pushed:
            continue
        x = write.value
        if is_call(x, aten.permute.default) and list(args(x)[1]) == [0, 2, 1, 3]:
            found.append(write)
    if len(found) != 1:
        raise Declined("no values written to a static cache at the position of the keys")
    return found[0]


def _position(graph: fx.Graph, position: fx.Node) -> fx.Node:
    """The counter itself where a lone position is 0 + a counter: the sum would be a kernel."""
    counter = before_reshapes(position)
    value, mine = val(counter), val(position)
    if not same_shape(position, (1,)) or (value.dtype, value.device) != (mine.dtype, mine.device):
        return position
    if same_shape(counter, (1,)):
        return counter
    return call(graph, aten.reshape.default, counter, [1], like=position)


def _check_sizes(node: fx.Node, value: fx.Node, keys: Write, values: Write) -> None:
    """Decline what the op would refuse."""
    k_cache, v_cache, position = keys.cache, values.cache, keys.position
    (B, Q, G, D), F, S = val(args(node)[1]).shape, val(value).shape[3], val(k_cache).shape[2]
    fits = same_shape(value, (B, Q, G, F)) and same_shape(k_cache, (B, G, S, D))
    if not fits or not same_shape(v_cache, (B, G, S, F)) or not same_shape(position, (Q,)):
        raise Declined("keys or values that are repeated in the cache")
    tensors = [val(x) for x in (args(node)[0], value, k_cache, v_cache)]
    if len({x.dtype for x in tensors}) > 1 or val(position).dtype != torch.int64:
        raise Declined("a cache in another dtype")
    if len({x.device for x in (*tensors, val(position))}) > 1:
        raise Declined("a cache on another device")
    if any(x.stride(3) != 1 for x in tensors[2:]):
        raise Declined("a cache whose features are not beside each other")
    if storage(k_cache) == storage(v_cache):
        raise Declined("keys and values in one memory, of which Inductor would copy one")
    if keys.pushed and not (isinstance(S, int) and S * max(D, F) <= MOST_ELEMENTS):
        raise Declined(f"a window of {S} positions, which a program a head would move too slowly")
