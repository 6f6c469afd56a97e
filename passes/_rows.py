"""Values with one row for each (token, expert) pair, and the proof that a region works row by row.

A rewrite may put the rows of an expert layer in another order only if nothing between its GEMMs
looks at more than one row at a time, and nobody outside sees the rows. `Region` proves the first;
`check_private` the second.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    has_val,
    is_call,
    same,
    val,
)
from moe_compile.passes._outcome import Declined

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
)
# Where each op that works along one dim has that dim among its arguments.
_ALONG = {
    **dict.fromkeys(_SPLITS, 2),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int, aten.cat.default), 1),
}


@dataclass
class Region:
    """The nodes between a sink and the leaves that it is computed from, row by row.

    A value has rows if the product of its first dims is `num_rows`: its row r is entry r of these
    dims in flat order, which every reshape keeps. `leaf` says whether a node ends the region (an
    expert GEMM); `masks` whether it only zeroes rows that no expert owns.
    """

    num_rows: Any
    leaf: Callable[[fx.Node], bool]
    masks: Callable[[fx.Node], bool] = lambda _: False
    leaves: list[fx.Node] = field(default_factory=list)
    inside: dict[fx.Node, None] = field(default_factory=dict)  # in the order they were found

    def walk(self, sink: fx.Node) -> None:
        """Collect `inside` and `leaves` above `sink`; raise Declined where a node mixes rows."""
        todo = [sink]
        while todo:
            node = todo.pop()
            if node in self.inside or node in self.leaves:
                continue
            if self.leaf(node):
                self.leaves.append(node)
                continue
            self.inside[node] = None
            todo += self._row_inputs(node)

    def _row_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of `node` that have rows, given that `node` treats each row alone."""
        if node.op != "call_function":
            raise Declined(f"{node.name} feeds the rows from outside the layer")
        if is_call(node, operator.getitem) and is_call(args(node)[0], *_SPLITS, *_REDUCTIONS):
            return [args(node)[0]]
        if self.masks(node):
            return [args(node)[2]]
        tensors = [n for n in node.all_input_nodes if has_val(n)]
        if node.target in _ALONG:
            dim = arg(node, _ALONG[node.target], "dim", 0)
            if any(dim % val(n).ndim < self._lead(n) for n in tensors):
                raise Declined(f"{node.name} takes the rows apart")
            return tensors
        if is_call(node, *_REDUCTIONS):
            dims = arg(node, 1, "dim", None)
            if not dims or any(d % val(n).ndim < self._lead(n) for d in dims for n in tensors):
                raise Declined(f"{node.name} reduces over the rows")
            return tensors
        lead = self._lead(node)
        if is_call(node, *RESHAPES, *SQUEEZES, *CASTS, *COPIES):
            return tensors
        if _is_pointwise(node):
            return [n for n in tensors if self._varies(n, node, lead)]
        raise Declined(f"{node.name} ({node.target}) is not known to treat each row alone")

    def _lead(self, node: fx.Node) -> int:
        """How many first dims of a value number its rows."""
        if has_val(node):
            shape = val(node).shape
            for lead in range(len(shape) + 1):
                if same(math.prod(shape[:lead]), self.num_rows):
                    return lead
        raise Declined(f"{node.name} does not keep one row per token and expert")

    def _varies(self, operand: fx.Node, node: fx.Node, lead: int) -> bool:
        """Does an operand of the pointwise `node` have rows (or else the same values for each)?"""
        shape = val(node).shape
        first = len(shape) - val(operand).ndim  # the dim of `node` that the operand's first meets
        sizes = val(operand).shape[: max(0, lead - first)]
        if first == 0 and all(map(same, sizes, shape[:lead])):
            return lead > 0 or self._reaches_leaf(operand)
        if all(same(size, 1) for size in sizes):
            return False
        if (
            first > 0
            and all(same(size, 1) for size in shape[:first])
            and all(map(same, sizes, shape[first:lead]))
        ):
            return True  # only leading ones are missing
        raise Declined(f"{operand.name} varies with part of the row index only")

    def _reaches_leaf(self, operand: fx.Node) -> bool:
        """With one row in all, shapes do not tell what has it: does this come from a leaf?"""
        part = Region(self.num_rows, self.leaf, self.masks)
        try:
            part.walk(operand)
        except Declined:
            return False
        return True


def check_private(members: Iterable[fx.Node], consumers: Iterable[fx.Node]) -> None:
    """Nobody outside reads a member, save the consumers."""
    known = {*members, *consumers}
    for node in members:
        for user in node.users:
            if user not in known:
                raise Declined(f"{node.name} is also read by {user.name}")


def _is_pointwise(node: fx.Node) -> bool:
    """Does each element of the output depend on that element of each input and nothing else?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = node.target.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
