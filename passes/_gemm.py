"""The GEMMs of experts, in the forms that models write them.

Letters: R rows, E experts, H features in, G features out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._dispatch import Dispatch
from moe_compile.passes._graph import (
    RESHAPES,
    SQUEEZES,
    arg,
    aten,
    has_val,
    is_call,
    operands,
    same,
    strip,
    val,
)

PERMUTES = (aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class Gemm:
    """y[r] = x[r] @ w[expert of r] (+ bias[expert of r]), still in the model's own ops."""

    node: fx.Node  # the call
    result: fx.Node  # y [R, G], after views and bias
    x: fx.Node  # what the call reads, before views
    weight: fx.Node  # [E, H, G], or [E, G, H] if `transpose`
    transpose: bool
    index: fx.Node  # offsets [E] of the sorted frame, or the ids [R] or [T, K] that gathered weights
    grouped: bool
    bias: fx.Node | None = None  # [E, G]

    @property
    def num_experts(self) -> int:
        return int(val(self.weight).shape[0])


def grouped_targets() -> tuple[Any, ...]:
    """What computes a grouped GEMM: torch's op, and the fallback of transformers if it is loaded."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (aten._grouped_mm.default, *([fallback.default] if fallback else []))


def is_expert_gemm(node: fx.Node) -> bool:
    """Does the node itself multiply rows by experts' weights?"""
    return _parse_call(node) is not None


def parse_gemm(result: fx.Node, dispatch: Dispatch) -> Gemm | None:
    """The expert GEMM that ends in `result`, looking through its views and its bias."""
    node, bias = result, None
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        for y, gathered in operands(node):
            table = _bias_table(gathered, dispatch)
            if table is not None and isinstance(y, fx.Node):
                node, bias = y, table
                break
    node = strip(node, *RESHAPES, *SQUEEZES)
    gemm = _parse_call(node)
    if gemm is None or not same(val(result).shape[-1], _width(gemm)):
        return None
    if bias is not None and not same(val(bias).shape[-1], _width(gemm)):
        return None
    return Gemm(**{**vars(gemm), "result": result, "bias": bias})


def _width(gemm: Gemm) -> Any:
    return val(gemm.weight).shape[1 if gemm.transpose else 2]


def _bias_table(node: Any, dispatch: Dispatch) -> fx.Node | None:
    """b [E, G] of index(b, [expert of each row])."""
    node = strip(node, *SQUEEZES, *RESHAPES)
    if not is_call(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    table, (index,) = node.args
    return table if val(table).ndim == 2 and dispatch.is_expert_of_row(index) else None


def _parse_call(node: Any) -> Gemm | None:
    if is_call(node, *grouped_targets()):
        x, weight, offsets = (arg(node, i, n) for i, n in enumerate(("input", "mat2", "offs")))
        plain = len(node.args) <= 3 and not set(node.kwargs) - {"offs"}
        if plain and has_val(offsets) and val(weight).ndim == 3 and val(x).ndim == 2:
            return Gemm(node, node, x, weight, False, offsets, True)
        return None
    for a, b in _factors(node):
        # gathered [R, G, H] @ x [R, H, 1], or x [R, 1, H] @ gathered [R, H, G]
        for weights, x, transpose, one in ((a, b, True, -1), (b, a, False, -2)):
            found = _gathered(weights)
            if found is None or not same(val(x).shape[one], 1):
                continue
            table, index, flipped = found
            return Gemm(node, node, x, table, transpose ^ flipped, index, False)
    return None


def _factors(node: Any) -> list[tuple[Any, Any]]:
    """(a, b) of a @ b [R, ., .] as bmm, or as the multiply and sum that bmm decomposes into."""
    if is_call(node, aten.bmm.default):
        return [node.args]
    if not is_call(node, aten.sum.dim_IntList) or list(node.args[1]) not in ([2], [-2]):
        return []
    product = node.args[0]
    if not is_call(product, aten.mul.Tensor) or val(product).ndim != 4:
        return []
    a, b = product.args
    if not all(is_call(n, aten.unsqueeze.default) for n in (a, b)):
        return []
    left, right = (a.args[1] % 4, b.args[1] % 4)
    return [(a.args[0], b.args[0])] if (left, right) == (3, 1) else []


def _gathered(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """(table, index, flipped) of index(table, [index]) with the last two dims flipped or not."""
    flipped = False
    while is_call(node, *PERMUTES):
        if not _flips_last_two(node):
            return None
        node, flipped = node.args[0], not flipped
    if not is_call(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    table, (index,) = node.args
    if index is None or val(table).ndim != 3 or val(index).ndim != 1:
        return None
    if val(index).dtype == torch.bool:
        return None
    while is_call(table, *PERMUTES) and _flips_last_two(table):
        table, flipped = table.args[0], not flipped
    return table, index, flipped


def _flips_last_two(node: fx.Node) -> bool:
    if is_call(node, aten.permute.default):
        return [d % 3 for d in node.args[1]] == [0, 2, 1]  # type: ignore[union-attr]
    return {d % 3 for d in node.args[1:]} == {1, 2}  # type: ignore[operator]


def expert_gemms_above(node: fx.Node, limit: int = 200) -> list[Gemm]:
    """The nearest expert GEMMs among the ancestors of `node`, nearest first."""
    found, seen, todo = [], {node}, [node]
    while todo and len(seen) < limit:
        here = todo.pop(0)
        gemm = _parse_call(here)
        if gemm is not None:
            found.append(gemm)
            continue
        new = [n for n in here.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return found
