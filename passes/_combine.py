"""How a model adds up the rows of a token: the end of an expert layer, read off the graph.

Letters: T tokens, K experts per token, R = T * K rows, H features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._dispatch import SORTS, Dispatch, sorted_dispatch
from moe_compile.passes._gemm import expert_gemms_above
from moe_compile.passes._graph import (
    CASTS,
    RESHAPES,
    SQUEEZES,
    arg,
    aten,
    call,
    constant,
    has_val,
    is_call,
    operands,
    prims,
    same,
    same_shape,
    strip,
    val,
)


@dataclass(frozen=True)
class Combine:
    """out[t] = base[t] + sum over k of weights[t, k] * y[row of (t, k)]."""

    node: fx.Node  # out [T, H]
    y: fx.Node  # [R, H] or [T, K, H], in the frame of `dispatch`
    reader: fx.Node  # the product with the weights, which alone may read y
    factors: fx.Node  # the weights, T * K elements in flat order
    rounding: torch.dtype | None  # a dtype to which the model rounds the weights first
    dispatch: Dispatch
    base: fx.Node | None = None

    @property
    def top_k(self) -> int:
        return self.dispatch.top_k

    @property
    def rows(self) -> tuple[Any, ...]:
        """The leading dims of y."""
        return tuple(val(self.y).shape[:-1])

    def weights(self, graph: fx.Graph) -> fx.Node:
        """The weights as [T, K], made at the graph's insertion point where they are not."""
        weights = self.factors
        if val(weights).ndim != 2 or not same(val(weights).shape[1], self.top_k):
            weights = call(graph, aten.reshape.default, weights, [-1, self.top_k], like=self.node)
        if self.rounding is not None:
            cast = prims.convert_element_type.default
            weights = call(graph, cast, weights, self.rounding, like=self.node)
        return weights


def parse_combine(node: fx.Node) -> Combine | None:
    """The weighted sum over a token's experts that ends in `node`, if it is one."""
    if is_call(node, aten.sum.dim_IntList):
        return _parse_sum(node)
    if is_call(node, aten.scatter_add.default, aten.index_add.default):
        return _parse_scatter(node)
    if is_call(node, aten.bmm.default):
        return _parse_bmm(node)
    return None


def _parse_sum(node: fx.Node) -> Combine | None:
    """sum over dim 1 of [T, K, H], with weights and a way back to flat order above it in any order."""
    terms = node.args[0]
    if not has_val(terms) or val(terms).ndim != 3 or arg(node, 2, "keepdim", False):  # type: ignore[arg-type]
        return None
    top_k = val(terms).shape[1]  # type: ignore[arg-type]
    if [d % 3 for d in node.args[1]] != [1] or not isinstance(top_k, int):  # type: ignore[union-attr]
        return None
    flat, product, sort = _peel(terms, top_k)
    if product is None:
        return None
    return _weighted(node, product, sort, top_k)


def _peel(node: Any, top_k: int) -> tuple[Any, Any, Dispatch | None]:
    """Down to the product with the weights: its node, and the frame it is in."""
    dispatch: Dispatch | None = None
    while True:
        if is_call(node, aten.mul.Tensor):
            return node, node, dispatch
        if is_call(node, *RESHAPES) or _widens(node):
            node = node.args[0]
            continue
        if is_call(node, aten.index.Tensor) and len(node.args[1]) == 1 and dispatch is None:
            dispatch = _inverted(node.args[1][0], top_k)
            if dispatch is not None:
                node = node.args[0]
                continue
        return node, None, None


def _inverted(inverse: Any, top_k: int) -> Dispatch | None:
    """The sorted frame whose inverse order is `inverse`."""
    candidates: list[Any] = []
    if is_call(inverse, aten.index_put.default, aten.index_put_.default):
        candidates = list(inverse.args[1])
    elif is_call(inverse, aten.scatter.src):
        candidates = [inverse.args[2]]
    elif isinstance(inverse, fx.Node) and is_call(inverse.args[0] if inverse.args else None, *SORTS):
        candidates = [inverse.args[0].args[0]]  # type: ignore[union-attr]
    for order in candidates:
        dispatch = sorted_dispatch(order, top_k)
        if dispatch is not None and dispatch.is_inverse(inverse):
            return dispatch
    return None


def _weighted(
    node: fx.Node, product: fx.Node, sort: Dispatch | None, top_k: int, base: fx.Node | None = None
) -> Combine | None:
    """Tell y from its weights in `product`; a flat frame takes its ids from the GEMM above y."""
    for y, column in operands(product):
        if not (has_val(y) and has_val(column)) or not same(val(column).shape[-1], 1):
            continue
        y = _unwiden(y)
        dispatch, undo = sort, None
        if dispatch is None and is_call(_unshape(y), aten.index.Tensor):
            undo = _inverted(_unshape(y).args[1][0], top_k)  # weights come after the way back
        if undo is not None:
            y, dispatch = _unshape(y).args[0], undo
        if dispatch is None:
            gemms = expert_gemms_above(y)
            if not gemms or gemms[0].grouped:
                continue
            dispatch = Dispatch(gemms[0].index, top_k)
        factors, rounding = _factors(column, None if undo else sort)
        if factors is None or val(factors).numel() is None:
            continue
        return Combine(node, y, product, factors, rounding, dispatch, base)
    return None


def _unshape(node: Any) -> Any:
    return strip(node, *RESHAPES)


def _factors(column: Any, sort: Dispatch | None) -> tuple[Any, torch.dtype | None]:
    """The weights in flat order behind a column [R, 1] or [T, K, 1], and how they were rounded."""
    rounding = None
    node = column
    through_order = sort is None
    while True:
        if is_call(node, *CASTS):
            if not _widens(node):
                rounding = rounding or val(node).dtype
            node = node.args[0]
        elif is_call(node, *SQUEEZES, *RESHAPES) and not _is_flat_pair(node, through_order):
            node = node.args[0]
        elif is_call(node, aten.index.Tensor) and not through_order:
            base, indices = node.args
            if len(indices) != 1 or not sort.is_order(indices[0]):  # type: ignore[union-attr]
                return None, None
            node, through_order = base, True
        else:
            return (node, rounding) if through_order else (None, None)


def _is_flat_pair(node: fx.Node, through_order: bool) -> bool:
    """Is this already [T, K], past the gather? Then looking through more views gains nothing."""
    return through_order and val(node).ndim == 2 and not same(val(node).shape[1], 1)


def _widens(node: Any) -> bool:
    """Is this a cast that loses nothing?"""
    if not is_call(node, *CASTS):
        return False
    source, target = val(node.args[0]).dtype, val(node).dtype
    return (
        source.is_floating_point
        and target.is_floating_point
        and (source == target or target.itemsize > source.itemsize)
    )


def _unwiden(node: Any) -> Any:
    while _widens(node):
        node = node.args[0]
    return node


def _parse_scatter(node: fx.Node) -> Combine | None:
    """scatter_add(base, 0, token of each row, terms), or index_add."""
    base, dim, index, terms = node.args[:4]
    if dim != 0 or not has_val(terms) or val(terms).ndim != 2:  # type: ignore[arg-type]
        return None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    token = strip(index, *CASTS, *SQUEEZES, *RESHAPES, aten.expand.default)
    if not is_call(token, aten.div.Tensor_mode, aten.floor_divide.default):
        return None
    order, top_k = token.args[:2]
    dispatch = sorted_dispatch(order, top_k) if isinstance(top_k, int) else None
    if dispatch is None or not dispatch.is_token_of_row(token):
        return None
    product = strip(terms, *CASTS)
    if not is_call(product, aten.mul.Tensor):
        return None
    nothing = constant(base) == 0
    return _weighted(node, product, dispatch, top_k, None if nothing else base)  # type: ignore[arg-type]


def _parse_bmm(node: fx.Node) -> Combine | None:
    return None


__all__ = ["Combine", "parse_combine", "same_shape"]
