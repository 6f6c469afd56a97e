"""Values that have one row for each (token, expert) pair, and the proof that a region works row by row.

A rewrite may put the rows of an expert layer in another order only if nothing between its GEMMs
looks at more than one row at a time, and nobody outside sees the rows. `Region` proves both.
"""

import operator
from collections.abc import Callable
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
    aten,
    has_val,
    is_call,
    same,
    val,
)
from moe_compile.passes._outcome import Declined

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
)


@dataclass
class Region:
    """The nodes between a sink and the leaves that it is computed from, row by row.

    `leading` is how many leading dims number the rows: 1 for [R, ...], 2 for [T, K, ...].
    `leaf` says whether a node ends the region (an expert GEMM); `masks` whether a `where` only
    zeroes rows that no expert owns.
    """

    rows: tuple[Any, ...]  # the sizes of the leading dims
    leaf: Callable[[fx.Node], bool]
    masks: Callable[[fx.Node], bool] = lambda _: False
    leaves: list[fx.Node] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)

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
            self.inside.add(node)
            todo += self._row_inputs(node)

    def _row_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of `node` that have rows, given that `node` treats each row alone."""
        if node.op != "call_function":
            raise Declined(f"{node.name} feeds the rows from outside the layer")
        if is_call(node, operator.getitem) and is_call(node.args[0], *_SPLITS):
            node = node.args[0]  # type: ignore[assignment]
            self.inside.add(node)
        elif not self._has_rows(node):
            raise Declined(f"{node.name} does not keep one row per token and expert")
        if self.masks(node):
            return [node.args[2]]  # type: ignore[list-item]
        if is_call(node, *_SPLITS, aten.slice.Tensor, aten.cat.default):
            default = 0
            dim = arg(node, 2 if is_call(node, *_SPLITS) else 1, "dim", default)
            if dim % _rank(node) < len(self.rows):
                raise Declined(f"{node.name} takes the rows apart")
            return [n for n in node.all_input_nodes if has_val(n)]
        if is_call(node, *_REDUCTIONS):
            (x,) = node.all_input_nodes
            dims = arg(node, 1, "dim", None)
            if not dims or any(d % val(x).ndim < len(self.rows) for d in dims):
                raise Declined(f"{node.name} sums over the rows")
            return [x]
        if is_call(node, *RESHAPES, *SQUEEZES, *CASTS, *COPIES):
            (x,) = [n for n in node.all_input_nodes if has_val(n)]
            return [x]
        if _pointwise(node):
            return [n for n in node.all_input_nodes if has_val(n) and self._varies(n, node)]
        raise Declined(f"{node.name} ({node.target}) is not known to treat each row alone")

    def _has_rows(self, node: fx.Node) -> bool:
        if not has_val(node):
            return False
        shape = val(node).shape
        return len(shape) >= len(self.rows) and all(map(same, shape, self.rows))

    def _varies(self, operand: fx.Node, node: fx.Node) -> bool:
        """Does the operand of a pointwise op differ from row to row?"""
        missing = val(node).ndim - val(operand).ndim
        sizes = val(operand).shape[: max(0, len(self.rows) - missing)]
        return any(not same(size, 1) for size in sizes)

    def check_private(self, *consumers: fx.Node) -> None:
        """Nobody but `consumers` reads the region's rows from outside."""
        members = self.inside | set(self.leaves)
        for node in members:
            for user in node.users:
                if user not in members and user not in consumers:
                    raise Declined(f"{node.name} is also read by {user.name}")


def _rank(node: fx.Node) -> int:
    x = node.args[0]
    first = x[0] if isinstance(x, (list, tuple)) else x
    assert isinstance(first, fx.Node)
    return val(first).ndim


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or is_call(node, aten.where.self)
    )
