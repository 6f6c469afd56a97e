"""Dense layers in float8 of few tokens on a GPU, which `choose_linear` puts together."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS, MOST_WEIGHTS
from moe_compile.ops.quant_fp8 import AMAX_FLOOR
from moe_compile.passes._graph import RESHAPES, call, is_input, move_before, strip, unpack, val
from moe_compile.passes._outcome import Declined, Outcome
from moe_compile.passes._quantised import Quantised, arguments_of, quantised


class _Product(NamedTuple):
    """A call of `linear_fp8`, and what its rows were before they were quantised."""

    node: fx.Node
    rows: Quantised
    w: fx.Node
    w_scale: fx.Node
    bias: fx.Node | None
    dtype: torch.dtype


def multiply_unquantised(graph: fx.Graph, outcome: Outcome) -> None:
    """`quant_fp8` and the `linear_fp8` of all that is quantised alike become `skinny_mms_fp8`."""
    groups = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=moe.linear_fp8.default):
        try:
            if _has_few_rows(node):
                product = _product(node)
                groups[_group(product)].append(product)
        except Declined as reason:
            outcome.decline(node, str(reason))
    for products in groups.values():
        products.sort(key=lambda product: product.node)
        for start in range(0, len(products), MOST_WEIGHTS):
            _rewrite(graph, products[start : start + MOST_WEIGHTS], outcome)


def _has_few_rows(node: fx.Node) -> bool:
    rows = val(node).shape[0]
    if val(node).device.type != "cuda":
        return False
    if not isinstance(rows, int):
        raise Declined("a number of rows that is not known before the call")
    return 0 < rows <= MOST_ROWS


def _product(node: fx.Node) -> _Product:
    how = arguments_of(node)
    rows = quantised(how["x"], how["x_scale"])
    return _Product(node, rows, how["w"], how["w_scale"], how["bias"], val(node).dtype)


def _group(product: _Product) -> Any:
    """What products that go together have in common: x, how it is quantised, their dtype."""
    x, *how = product.rows
    if not all(map(is_input, (product.w, product.w_scale, product.bias))):
        return product.node
    return strip(x, *RESHAPES), val(x).shape, val(x).dtype, *how, product.dtype


def _rewrite(graph: fx.Graph, products: list[_Product], outcome: Outcome) -> None:
    """All that `products` compute, where the first of them is."""
    first, (x, power_of_two, amax_floor) = products[0].node, products[0].rows
    weights = [[p.w, p.w_scale, p.bias] for p in products]
    how = {"power_of_two": power_of_two, "amax_floor": amax_floor, "dtype": products[0].dtype}
    plain = {"power_of_two": False, "amax_floor": AMAX_FLOOR, "dtype": torch.bfloat16}
    unusual = {name: value for name, value in how.items() if value != plain[name]}
    with graph.inserting_before(first):
        for node in (node for weight in weights for node in weight):
            move_before(first, node)
        lists = [list(each) for each in zip(*weights, strict=True)]
        new = call(graph, moe.skinny_mms_fp8.default, x, *lists, like=first, **unusual)
        for product, y in zip(products, unpack(graph, new, len(products)), strict=True):
            product.node.replace_all_uses_with(y)
    (M, K), columns = val(x).shape, ", ".join(str(val(p.w).shape[0]) for p in products)
    outcome.rewrote(first, f"skinny_mms_fp8: {M} rows times weights of {K} x {columns}")
