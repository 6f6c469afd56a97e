"""What a live constant in the place of a node is worth: bytes less to move in every forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moe_compile.passes._constants import storage_bytes
from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    has_val,
    is_call,
    is_widening,
    strip_views,
    val,
    view_source,
)
from moe_compile.passes._pure import MADE, tensors_of

_MOVES = (
    aten.clone.default,
    aten.cat.default,
    aten.stack.default,
    aten.constant_pad_nd.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
)
_LOOKUPS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)
_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
)


@dataclass(frozen=True)
class Candidate:
    """A node computed from parameters alone, and what a constant in its place is worth."""

    node: fx.Node
    saved: int  # bytes less to move in every forward
    is_exact: bool  # moved and cast only, so that nothing rounds in another way
    unpacks: bool  # larger than its sources, of which one is in a dtype of one byte

    @property
    def size(self) -> int:
        return storage_bytes(val(self.node))


def candidates(graph: fx.Graph, constant: dict[fx.Node, bool]) -> list[Candidate]:
    """Where constants end: made in memory of its own, and read by something that is no constant."""
    found: dict[fx.Node, None] = {}
    for node, from_parameters in constant.items():
        if from_parameters and any(user not in constant for user in node.users):
            root = strip_views(node)
            if root.op == "call_function" and has_val(root):
                found[root] = None
    return [_value(root, constant) for root in found]


def _value(root: fx.Node, constant: dict[fx.Node, bool]) -> Candidate:
    readers = [r for r in _readers(root) if r[1] not in constant]
    looked_up = any(_is_lookup(source, reader) for source, reader in readers)
    fused = all(_is_fused(reader) for _, reader in readers)
    size, read = storage_bytes(val(root)), _bytes_read(root)
    saved = -size if looked_up else read - size if fused else read + size
    chain = [n for n in _chain(root) if n.op == "call_function" and view_source(n) is None]
    is_exact = all(
        is_call(n, *_MOVES, *MADE) or is_widening(n) or (is_call(n, *CASTS) and not fused)
        for n in chain
    )
    packed = any(val(n).element_size() == 1 for n in _chain(root) if n.op == "placeholder")
    return Candidate(root, saved, is_exact, packed and size > read)


def _readers(root: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Those that read `root` or a view of it, each with what it reads."""
    for user in root.users:
        if user.op == "call_function" and view_source(user) is root:
            yield from _readers(user)
        else:
            yield root, user


def _is_lookup(source: fx.Node, reader: fx.Node) -> bool:
    return is_call(reader, *_LOOKUPS) and args(reader)[0] is source


def _is_fused(reader: fx.Node) -> bool:
    """Does Inductor compute this inside a kernel that it writes?"""
    pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
    return pointwise or is_call(reader, *_REDUCTIONS, *_MOVES, *_LOOKUPS, *CASTS)


def _chain(root: fx.Node) -> set[fx.Node]:
    """All nodes that `root` is computed from, and itself."""
    found, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _bytes_read(root: fx.Node) -> int:
    """Bytes of the parameters, or of the parts of them, that computing `root` reads."""
    inner = [n for n in _chain(root) if n.op == "call_function" and view_source(n) is None]
    parts = {i for n in inner for i in n.all_input_nodes if strip_views(i).op == "placeholder"}
    return sum(
        min(storage_bytes(v), storage_bytes(val(strip_views(p))))
        for p in parts
        for v in tensors_of(p)
    )
