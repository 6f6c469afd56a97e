"""How a model adds up the rows of a token: the end of an expert layer, read off the graph.

Letters: T tokens, K experts per token, R = T * K rows, H features.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._axes import Axis, flat, follow, group, highest, regroup, views_of
from moe_compile.passes._dispatch import SORTS, Dispatch, exact, sorted_dispatch
from moe_compile.passes._gemm import Gemm, Product, gemms_above, parse_product
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    call,
    constant,
    has_val,
    is_call,
    is_widening,
    operands,
    prims,
    same,
    same_shape,
    val,
)

Gemms = dict[fx.Node, Gemm]
_FLAT_VIEWS = (*RESHAPES, *SQUEEZES, *COPIES)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Combine:
    """out[t] = base[t] + sum over k of weights[t, k] * y[row of (t, k)]."""

    node: fx.Node  # out, T * H elements
    y: fx.Node  # R * H elements, in the frame of `dispatch`
    inside: tuple[fx.Node, ...]  # the nodes from y to `node`, both left out
    weights: fx.Node  # T * K elements in flat order
    roundings: tuple[torch.dtype, ...]  # what the weights are rounded to, in order
    dispatch: Dispatch
    base: fx.Node | None = None

    @property
    def width(self) -> Any:
        """H."""
        return math.prod(val(self.node).shape[1:])

    def make_weights(self, graph: fx.Graph) -> fx.Node:
        """The weights as [T, K], made at the graph's insertion point where they are not."""
        weights = self.weights
        if val(weights).ndim != 2 or not same(val(weights).shape[1], self.dispatch.top_k):
            shape = [-1, self.dispatch.top_k]
            weights = call(graph, aten.reshape.default, weights, shape, like=self.node)
        for dtype in self.roundings:
            cast = prims.convert_element_type.default
            weights = call(graph, cast, weights, dtype, like=self.node)
        return weights


def parse_combine(node: fx.Node, gemms: Gemms) -> Combine | None:
    """The weighted sum over a token's experts that ends in `node`, if it is one."""
    if is_call(node, aten.sum.dim_IntList):
        return _parse_sum(node, gemms) or _parse_product(node, gemms)
    if is_call(node, aten.bmm.default):
        return _parse_product(node, gemms)
    if is_call(node, aten.scatter_add.default, aten.index_add.default):
        return _parse_scatter(node, gemms)
    if is_call(node, aten.index_put.default) and arg(node, 3, "accumulate", False):
        return _parse_scatter(node, gemms)
    return None


def _parse_sum(node: fx.Node, gemms: Gemms) -> Combine | None:
    """sum over dim 1 of [T, K, H], above it weights and a way back to flat order in any order."""
    terms, dims = args(node)[:2]
    if not has_val(terms) or val(terms).ndim != 3 or arg(node, 2, "keepdim", False):
        return None
    num_tokens, top_k, _ = val(terms).shape
    if [d % 3 for d in dims] != [1] or not isinstance(top_k, int):
        return None
    inside: list[fx.Node] = []
    dispatch = None
    while not is_call(terms, aten.mul.Tensor):
        if is_call(terms, *_FLAT_VIEWS) or _is_float_cast(terms):
            inside.append(terms)
            terms = args(terms)[0]
            continue
        back = None if dispatch else _way_back(terms, num_tokens, top_k)
        if back is None:
            return None
        inside.append(terms)
        terms, dispatch = back
    return _weighted(node, terms, inside, dispatch, num_tokens, top_k, gemms)


def _way_back(node: Any, num_tokens: Any, top_k: int) -> tuple[fx.Node, Dispatch] | None:
    """(y, sorted frame) of y[inverse] or index_put(any, [order], y)."""
    if is_call(node, aten.index_put.default):
        indices, y = args(node)[1:3]
        dispatch = sorted_dispatch(indices[0], num_tokens, top_k)
        if dispatch is None or not dispatch.puts_back(node):
            return None
        return (y, dispatch) if same_shape(y, val(node).shape) else None
    if not is_call(node, aten.index.Tensor) or len(args(node)[1]) != 1:
        return None
    y, (inverse,) = args(node)
    for order in _orders(exact(inverse)):
        dispatch = sorted_dispatch(order, num_tokens, top_k)
        if dispatch is not None and dispatch.is_inverse(inverse):
            return (y, dispatch) if same(val(y).shape[0], dispatch.num_rows) else None
    return None


def _orders(inverse: Any) -> list[Any]:
    """What `inverse` may be the inverse of."""
    if is_call(inverse, aten.index_put.default):
        return list(args(inverse)[1])
    if is_call(inverse, aten.scatter.src):
        return [args(inverse)[2]]
    if is_call(inverse, operator.getitem) and is_call(args(inverse)[0], *SORTS):
        return [args(args(inverse)[0])[0]]
    return []


def _weighted(
    node: fx.Node,
    product: fx.Node,
    inside: list[fx.Node],
    dispatch: Dispatch | None,
    num_tokens: Any,
    top_k: int,
    gemms: Gemms,
    base: fx.Node | None = None,
) -> Combine | None:
    """Tell y from its weights in `product`; a flat frame takes its ids from the GEMM above y."""
    shape = val(product).shape
    rows = same(math.prod(shape[:-1]), num_tokens * top_k) and same(shape[-1], val(node).shape[-1])
    for y, column in operands(product) if rows else ():
        if not (has_val(y) and has_val(column) and same_shape(y, shape)):
            continue
        if not same_shape(column, (*shape[:-1], 1)):
            continue
        found = _find_frame(y, dispatch, num_tokens, top_k, gemms)
        if found is None:
            continue
        y, frame, between = found
        weights, roundings = _factors(column, dispatch, num_tokens * top_k)
        if weights is not None:
            path = (*between, product, *inside)
            return Combine(node, y, path, weights, roundings, frame, base)
    return None


def _find_frame(
    y: fx.Node, dispatch: Dispatch | None, num_tokens: Any, top_k: int, gemms: Gemms
) -> tuple[fx.Node, Dispatch, list[fx.Node]] | None:
    """(y before it was widened and brought back to flat order, its frame, the nodes between)."""
    between = []
    while is_widening(y):
        between.append(y)
        y = args(y)[0]
    if dispatch is not None:
        return y, dispatch, between
    above, views = y, []
    while is_call(above, *_FLAT_VIEWS):
        views.append(above)
        above = args(above)[0]
    back = _way_back(above, num_tokens, top_k)
    if back is not None:
        return *back, [*between, *views, above]
    nearest = gemms_above(y, gemms)
    if not nearest or nearest[0].grouped:
        return None
    ids = nearest[0].index
    if not same(val(ids).numel(), num_tokens * top_k):
        return None
    return y, Dispatch(ids, num_tokens, top_k), between


def _factors(
    column: Any, sort: Dispatch | None, num_rows: Any
) -> tuple[fx.Node | None, tuple[torch.dtype, ...]]:
    """The weights in flat order behind a column, one for each row, and how they were rounded.

    Every step is a reshape, a cast, or the one gather by the order of the sort: it keeps all
    weights and, that gather apart, their flat order.
    """
    roundings: list[torch.dtype] = []
    node, gathered = column, sort is None
    while True:
        matrix = val(node).ndim == 2 and not same(val(node).shape[1], 1)
        if gathered and matrix:
            break
        if is_call(node, *_FLAT_VIEWS):
            node = args(node)[0]
        elif _is_float_cast(node):
            roundings += [] if is_widening(node) else [val(node).dtype]
            node = args(node)[0]
        elif not gathered and is_call(node, aten.index.Tensor):
            base, indices = args(node)
            in_order = sort is not None and len(indices) == 1 and sort.is_order(indices[0])
            if not in_order or not same(val(base).shape[0], num_rows):
                return None, ()
            node, gathered = base, True
        else:
            break
    fits = gathered and same(val(node).numel(), num_rows) and val(node).dtype in _FLOATS
    return (node if fits else None), tuple(reversed(roundings))


def _is_float_cast(node: Any) -> bool:
    """Is `node` a cast between floats that the ops take? What it rounds is stated or kept."""
    return (
        is_call(node, *CASTS) and val(args(node)[0]).dtype in _FLOATS and val(node).dtype in _FLOATS
    )


def _parse_scatter(node: fx.Node, gemms: Gemms) -> Combine | None:
    """scatter_add(base, 0, token of each row, terms), index_add, or an accumulating index_put."""
    if is_call(node, aten.index_put.default):
        base, indices, terms = args(node)[:3]
        dim, index = 0, indices[0] if len(indices) == 1 else None
    else:
        base, dim, index, terms = args(node)[:4]
    if dim != 0 or index is None or not has_val(terms) or node.kwargs.get("alpha", 1) != 1:
        return None
    token, expanded = views_of(index)
    if not is_call(token, aten.div.Tensor_mode, aten.floor_divide.default) or val(terms).ndim != 2:
        return None
    order, top_k = args(token)[:2]
    num_tokens, features = val(node).shape[0], val(node).shape[-1]
    dispatch = sorted_dispatch(order, num_tokens, top_k) if isinstance(top_k, int) else None
    if dispatch is None or not dispatch.is_token_of_row(token) or val(node).ndim != 2:
        return None
    # entry [r, h] of the index, or entry r, is the token of row r
    axes = follow((dispatch.rows,), expanded)
    across = is_call(node, aten.scatter_add.default)
    shape = [dispatch.num_rows, features] if across else [dispatch.num_rows]
    if axes is None or not same_shape(index, shape) or axes[0] != dispatch.rows:
        return None
    if not same_shape(terms, [dispatch.num_rows, features]):
        return None
    inside: list[fx.Node] = []
    while _is_float_cast(terms):
        inside.append(terms)
        terms = args(terms)[0]
    if not is_call(terms, aten.mul.Tensor):
        return None
    into = None if constant(base) == 0 else base
    return _weighted(node, terms, inside, dispatch, num_tokens, top_k, gemms, into)


def _parse_product(node: fx.Node, gemms: Gemms) -> Combine | None:
    """y [T, K, H] times weights [T, K] summed over K, by a `bmm` or what stands for one."""
    product = parse_product(node)
    if product is None or val(node).ndim < 2:
        return None
    num_tokens, top_k = val(node).shape[0], val(product.a).shape[product.summed[0]]
    if not isinstance(top_k, int):
        return None
    forms = (product, product.flipped())
    found = (_weighted_product(node, form, num_tokens, top_k, gemms) for form in forms)
    return next((combine for combine in found if combine is not None), None)


def _weighted_product(
    node: fx.Node, product: Product, num_tokens: Any, top_k: int, gemms: Gemms
) -> Combine | None:
    """The same, with y the first operand."""
    token, slot, column = Axis(num_tokens), Axis(top_k), Axis(math.prod(val(node).shape[1:]))

    def is_matrix(view: fx.Node) -> bool:
        return same_shape(view, [num_tokens, top_k])

    def has_rows(view: fx.Node) -> bool:
        dims = regroup((token, slot, column), val(view).shape)
        return dims is not None and dims[-1:] == (group(column),)

    read = highest(product.a, has_rows)
    weights, weight_views = views_of(product.b, stop=is_matrix)
    if read is None or val(weights).dtype not in _FLOATS:
        return None
    y, views = read
    ys = follow(regroup((token, slot, column), val(y).shape), views)
    factors = follow(regroup((token, slot), val(weights).shape), weight_views)
    if ys is None or factors is None or ys[product.summed[0]] != group(slot):
        return None
    result = product.axes(ys, factors)
    if result is None or flat(result) != group(token, column):
        return None
    found = _find_frame(y, None, num_tokens, top_k, gemms)
    if found is None:
        return None
    y, frame, between = found
    path = (*between, *views, *([] if is_call(node, aten.bmm.default) else [args(node)[0]]))
    return Combine(node, y, path, weights, (), frame)
