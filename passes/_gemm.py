"""The GEMMs of experts, in the forms that models write them.

Letters: T tokens, K experts per token, R = T * K rows, E experts, H features in, G features out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._axes import (
    Axes,
    Axis,
    flat,
    follow,
    group,
    highest,
    merge,
    regroup,
    views_of,
)
from moe_compile.passes._dispatch import Dispatch
from moe_compile.passes._gemm_fp8 import Float8, parse_float8
from moe_compile.passes._graph import (
    CASTS,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    has_val,
    is_call,
    is_widening,
    operands,
    same,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Declined


@dataclass(frozen=True)
class Product:
    """The sum over one index of a * b: a `bmm`, or a `mul` and `sum`, which a `bmm` may become.

    For each dim of the result, which dim of a and of b runs along it; None for neither.
    """

    a: fx.Node
    b: fx.Node
    dims: tuple[tuple[int | None, int | None], ...]
    summed: tuple[int, int]

    def flipped(self) -> "Product":
        """b * a."""
        dims = tuple((b, a) for a, b in self.dims)
        return Product(self.b, self.a, dims, (self.summed[1], self.summed[0]))

    def axes(self, a: Axes, b: Axes) -> Axes | None:
        """The axes of the result, or None if a and b do not run through the same indices."""
        summed = a[self.summed[0]], b[self.summed[1]]
        if bool(summed[0]) != bool(summed[1]) or merge(*summed) is None:
            return None
        dims = [merge(() if i is None else a[i], () if j is None else b[j]) for i, j in self.dims]
        return None if None in dims else tuple(dim for dim in dims if dim is not None)


def parse_product(node: Any) -> Product | None:
    """The product that `node` is, if it is one."""
    if is_call(node, aten.bmm.default):
        a, b = args(node)
        return Product(a, b, ((0, 0), (1, None), (None, 2)), (2, 1))
    if not is_call(node, aten.sum.dim_IntList) or not is_call(args(node)[0], aten.mul.Tensor):
        return None
    mul, dims = args(node)[:2]
    a, b = args(mul)
    rank = val(mul).ndim
    if not (has_val(a) and has_val(b) and val(a).ndim == val(b).ndim == rank) or len(dims) != 1:
        return None
    dim, keeps = dims[0] % rank, arg(node, 2, "keepdim", False)
    kept = [(None, None) if i == dim else (i, i) for i in range(rank) if i != dim or keeps]
    return Product(a, b, tuple(kept), (dim, dim))


@dataclass(frozen=True)
class Gemm:
    """y[r] = x[r] @ w[expert of r], as the model calls it."""

    node: fx.Node
    x: fx.Node  # the operand, before views are looked through
    weight: fx.Node  # [E, ., .]
    index: fx.Node  # offsets [E] of the sorted frame, or the ids that gathered the weights
    product: Product | None = None  # x * gathered weights; None if grouped
    float8: Float8 | None = None  # what quantises x, and the scales

    @property
    def grouped(self) -> bool:
        return self.product is None

    @property
    def num_experts(self) -> int:
        return int(val(self.weight).shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """What x and the weights come in, or were quantised from."""
        return val(self.weight if self.float8 is None else self.x).dtype


@dataclass(frozen=True)
class Placed:
    """A GEMM whose rows are proved to be those of a frame, down to y [rows, G] + bias."""

    gemm: Gemm
    result: fx.Node
    source: fx.Node  # what x is a view of: a value with rows, or x [T, H] for each of its K slots
    transpose: bool  # the weight is [E, G, H]
    inside: tuple[fx.Node, ...]  # from the call to the result, views of its rows included
    bias: fx.Node | None = None  # [E, G]

    @property
    def width(self) -> Any:
        return val(self.gemm.weight).shape[1 if self.transpose else 2]


def grouped_targets() -> tuple[Any, ...]:
    """What computes a grouped GEMM: torch's op, and transformers' fallback if it is loaded."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (aten._grouped_mm.default, *([fallback.default] if fallback else []))


def scaled_targets() -> tuple[Any, ...]:
    """Grouped GEMMs of float8 rows with a scale each, which torchao's tensors call on a GPU."""
    names = ("_scaled_grouped_mm", "_scaled_grouped_mm_v2")
    return tuple(getattr(aten, name).default for name in names if hasattr(aten, name))


def find_gemms(graph: fx.Graph) -> dict[fx.Node, Gemm]:
    """All expert GEMMs of a graph, by node."""
    targets = grouped_targets()
    candidates = (*targets, aten.bmm.default, aten.sum.dim_IntList, *CASTS)
    found = {}
    for node in graph.nodes:
        if is_call(node, *candidates):
            gemm = _parse_grouped(node) if node.target in targets else _parse_batched(node)
        else:
            gemm = _parse_float8(node) if is_call(node, moe.grouped_mm_fp8.default) else None
        if gemm is not None:
            found[node] = gemm
    for gemm in list(found.values()):  # a sum that is rounded right away is one call with its cast
        if not gemm.grouped and is_call(gemm.node, *CASTS):
            found.pop(args(gemm.node)[0], None)
    return found


def _parse_grouped(node: fx.Node) -> Gemm | None:
    x, weight, offsets = (arg(node, i, n) for i, n in enumerate(("input", "mat2", "offs")))
    plain = arg(node, 3, "bias") is None and arg(node, 4, "out_dtype") in (None, val(x).dtype)
    if plain and has_val(offsets) and val(weight).ndim == 3 and val(x).ndim == 2:
        return Gemm(node, x, weight, offsets)
    return None


def _parse_batched(node: fx.Node) -> Gemm | None:
    """x * w[ids] summed. With operands in a wider type, the sum is to be cast back to theirs."""
    call = args(node)[0] if is_call(node, *CASTS) and not is_widening(node) else node
    product = parse_product(call)
    for form in (product, product.flipped()) if product is not None else ():
        weights, _ = views_of(form.b)
        if not is_call(weights, aten.index.Tensor) or len(args(weights)[1]) != 1:
            continue
        table, (index,) = args(weights)
        if val(table).ndim != 3 or val(index).dtype not in (torch.int32, torch.int64):
            continue
        if val(node).dtype == val(weights).dtype:
            return Gemm(node, form.a, table, index, form)
    return None


def _parse_float8(node: fx.Node) -> Gemm | None:
    found = parse_float8(node)
    if found is None:
        return None
    if found.ids is None:
        return Gemm(node, found.x, found.weight, args(node)[4], None, found)
    product = Product(found.x, args(node)[2], ((0, 0), (None, 2)), (1, 1))
    return Gemm(node, found.x, found.weight, found.ids, product, found)


def place(
    result: fx.Node, gemms: dict[fx.Node, Gemm], dispatch: Dispatch, reads_rows: bool
) -> Placed | None:
    """The expert GEMM that ends in `result`, looking through its views and its bias.

    `reads_rows` says whether its x has one row for each pair, or one for each token.
    """
    node, bias = result, None
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        for y, gathered in operands(node):
            bias = _bias_table(gathered, dispatch, node)
            if bias is not None:
                node = y
                break
    call, views = views_of(node, stop=gemms.__contains__)
    if call not in gemms or any(is_call(view, *CASTS) for view in views):
        return None
    gemm = gemms[call]
    if gemm.grouped:
        axes, source, reads, transpose = _place_grouped(gemm, dispatch)
    else:
        axes, source, reads, transpose = _place_batched(gemm, dispatch, reads_rows)
    found = Placed(
        gemm,
        result,
        source,
        transpose,
        tuple(dict.fromkeys((*reads, *_calls(gemm), *views, node, result))),
        bias,
    )
    axes = follow(axes, views)
    if (
        axes is None
        or flat(axes[:-1]) != dispatch.rows
        or not same(val(result).shape[-1], found.width)
    ):
        return None
    return found if bias is None or same(val(bias).shape[1], found.width) else None


def _calls(gemm: Gemm) -> list[fx.Node]:
    """The nodes that the call consists of."""
    if gemm.float8 is not None:
        return [gemm.float8.quant, *gemm.float8.rows, gemm.node]
    if gemm.grouped:
        return [gemm.node]
    call = args(gemm.node)[0] if is_call(gemm.node, *CASTS) else gemm.node
    mul = [] if is_call(call, aten.bmm.default) else [args(call)[0]]
    return [*mul, call, gemm.node]


Place = tuple[
    Axes | None, fx.Node, list[fx.Node], bool
]  # axes of the call, source of x, views, transpose


def _place_grouped(gemm: Gemm, dispatch: Dispatch) -> Place:
    """Rows in the order of the sort."""
    if dispatch.sort is None:
        raise Declined("the rows of a grouped GEMM are not brought back from a sort")
    if not dispatch.counts_rows(gemm.index, gemm.num_experts):
        raise Declined("the offsets are not proved to be the running counts of the sorted ids")
    if not same(val(gemm.x).shape[0], dispatch.num_rows):
        raise Declined("the GEMM has another number of rows than the sort")
    return (dispatch.rows, group(Axis(val(gemm.weight).shape[2]))), gemm.x, [], False


def _place_batched(gemm: Gemm, dispatch: Dispatch, reads_rows: bool) -> Place:
    """Rows in flat order: w[ids[t, k]] times x[t, k] or x[t], summed over the same index."""
    product = gemm.product
    assert product is not None
    if dispatch.sort is not None:
        raise Declined("weights gathered for rows in sorted order")
    if not dispatch.is_expert_of_row(gemm.index, gemm.num_experts):
        raise Declined("the GEMMs gather weights by different ids")
    _, views = views_of(product.b)
    first, second = (Axis(size) for size in val(gemm.weight).shape[1:])
    rows = regroup(dispatch.rows, val(gemm.index).shape)
    weights = follow(rows and (*rows, group(first), group(second)), views)
    if weights is None:
        raise Declined("views of the gathered weights that are not understood")
    summed = weights[product.summed[1]]
    transpose = summed != group(first)
    features = second if transpose else first
    if summed != group(features):
        raise Declined("the gathered weights are not summed over one of their dims")
    axes = (dispatch.token, *([dispatch.slot] if reads_rows else []), features)

    def accept(view: fx.Node) -> bool:
        dims = regroup(axes, val(view).shape)
        known = dims is not None and val(view).dtype == gemm.dtype
        if reads_rows:
            return known and dims is not None and dims[-1] == group(features)
        return known and dims == tuple(map(group, axes))

    read = highest(product.a, accept)
    if read is None:
        raise Declined(
            f"{gemm.node.name} reads neither one row for each pair nor one for each token"
        )
    source, views = read
    operand = follow(regroup(axes, val(source).shape), views)
    result = None if operand is None else product.axes(operand, weights)
    if result is None:
        raise Declined(f"{gemm.node.name} does not multiply row by row")
    return result, source, views if reads_rows else [], transpose


def _bias_table(node: Any, dispatch: Dispatch, total: fx.Node) -> fx.Node | None:
    """b [E, G] of index(b, [expert of each row]), one row of it for each row of `total`."""
    if not has_val(node) or not same_shape(node, val(total).shape):
        return None
    node = strip(node, *SQUEEZES, *RESHAPES)
    if not is_call(node, aten.index.Tensor) or len(args(node)[1]) != 1:
        return None
    table, (index,) = args(node)
    if val(table).ndim != 2 or not same(val(index).numel(), dispatch.num_rows):
        return None
    return table if dispatch.is_expert_of_row(index, int(val(table).shape[0])) else None


def gemms_above(node: fx.Node, gemms: dict[fx.Node, Gemm], through: bool = False) -> list[Gemm]:
    """The expert GEMMs above `node`, nearest first; with `through`, those above them too."""
    found, seen, todo = [], {node}, [node]
    while todo and len(seen) < 200:
        here = todo.pop(0)
        if here in gemms:
            found.append(gemms[here])
            if not through:
                continue
        new = [n for n in here.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return found
