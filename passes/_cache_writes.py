"""How a static cache is written: new positions put in place, or all moved up and one put last."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from moe_compile.passes._graph import (
    RESHAPES,
    args,
    aten,
    constant,
    is_call,
    same,
    same_shape,
    val,
)
from moe_compile.passes._positions import is_arange

COPY = aten.copy_.default  # to an input, at the end of a graph


@dataclass(frozen=True)
class Write:
    """node holds the cache, an input that nothing else reads or writes, with `value` in it.

    pushed: a window's: each position holds what the next one held, and the last one the value.
    """

    node: fx.Node
    cache: fx.Node
    value: fx.Node  # [B, G, Q, D]
    position: fx.Node
    pushed: bool


def parse_write(node: Any) -> Write | None:
    """The write that `node` is, or None."""
    if not is_call(node, aten.index_put.default) or node.kwargs or len(args(node)) != 3:
        return None
    base, indices, value = args(node)
    if len(indices) != 3 or indices[:2] != [None, None] or indices[2] is None:
        return None
    position = indices[2]
    moved = is_call(base, aten.index.Tensor)
    cache = args(base)[0] if moved else base
    if moved:
        value = _with_batch(value)
        if not _moves_up(base) or list(base.users) != [node] or not _is_last(position, cache):
            return None
    reader = base if moved else node
    copies = [u for u in cache.users if is_call(u, COPY)]
    if cache.op != "placeholder" or len(copies) != 1 or set(cache.users) != {reader, *copies}:
        return None
    if args(copies[0]) != (cache, node) or copies[0].users:
        return None
    return Write(node, cache, value, position, moved)


def write_of(value: fx.Node) -> Write | None:
    """The write of `value`, if nothing else reads that."""
    reader = next(iter(value.users), None)
    if reader is not None and is_call(reader, *RESHAPES) and len(reader.users) == 1:
        write = parse_write(next(iter(reader.users)))
    else:
        write = parse_write(reader)
    return write if write is not None and write.value is value and len(value.users) == 1 else None


def _with_batch(value: fx.Node) -> fx.Node:
    """A single sequence's [1, G, Q, D], of which an assignment drops the first dim."""
    if not is_call(value, *RESHAPES):
        return value
    source: fx.Node = args(value)[0]
    return source if same_shape(source, (1, *val(value).shape)) else value


def _moves_up(index: fx.Node) -> bool:
    """Is this what a cache [B, G, S, D] is when each position holds what the next one held?"""
    cache, indices = args(index)[:2]
    if val(cache).ndim != 4 or len(indices) != 3 or indices[:2] != [None, None]:
        return False
    S, places = val(cache).shape[2], indices[2]
    if not is_call(places, aten.fmod.Scalar, aten.remainder.Scalar):
        return False
    following, size = args(places)[:2]
    is_next = is_call(following, aten.add.Tensor) and args(following)[1] == 1
    if not isinstance(size, int) or not same(size, S) or not is_next or following.kwargs:
        return False
    return same_shape(following, (S,)) and is_arange(args(following)[0], S)


def _is_last(position: fx.Node, cache: fx.Node) -> bool:
    """Is this the last position of the cache, and no other?"""
    number = constant(position)
    last = type(number) is int and (number == -1 or same(number, val(cache).shape[2] - 1))
    return last and same_shape(position, (1,))
