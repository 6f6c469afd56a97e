"""Find the experts of an MoE layer and give each stage its op."""

from dataclasses import dataclass

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._combine import Combine, parse_combine
from moe_compile.passes._dispatch import (
    Dispatch,
    exact,
    in_range,
    never_negative,
    reads_tokens,
    simplest_ids,
)
from moe_compile.passes._gemm import Gemm, Placed, find_gemms, gemms_above, place, scaled_targets
from moe_compile.passes._graph import (
    RESHAPES,
    args,
    aten,
    call,
    has_val,
    is_call,
    prims,
    same_shape,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rows import Region, check_private
from moe_compile.passes._stages import grouped_mm, replace, shaped

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Experts:
    """One matched layer."""

    combine: Combine
    x: fx.Node  # [T, H]
    ups: tuple[Placed, ...]
    down: Placed
    masks: tuple[fx.Node, ...]  # where(unowned, 0, .), which the ops make needless

    @property
    def dispatch(self) -> Dispatch:
        return self.combine.dispatch

    @property
    def num_experts(self) -> int:
        return self.down.gemm.num_experts


@exactness("reassociating")
def find_experts(graph: fx.Graph) -> Outcome:
    """Replace the GEMMs of experts, and what sorts and adds up their rows, by ops.

    Before:
        arg0_1: i64[6, 2]
        arg1_1: bf16[6, 16]
        arg2_1: bf16[4, 32, 16]
        arg3_1: bf16[4, 16, 32]
        arg4_1: bf16[6, 2]
        reshape: i64[12] = aten.reshape(arg0_1, [12])
        sort = aten.sort.stable(reshape, stable=True)
        getitem: i64[12] = sort[0]
        getitem_1: i64[12] = sort[1]
        unsqueeze: bf16[6, 1, 2] = aten.unsqueeze(arg4_1, 1)
        full: bf16[12, 16] = aten.full([12, 16], 0, dtype=bf16)
        div: i64[12] = aten.div.Tensor_mode(getitem_1, 2, rounding_mode='floor')
        index: bf16[12, 16] = aten.index.Tensor(arg1_1, [div])
        permute: bf16[4, 16, 32] = aten.permute(arg2_1, [0, 2, 1])
        iota: i64[4] = prims.iota(4, start=0, step=1, dtype=i64)
        searchsorted: i64[4] = aten.searchsorted.Tensor(getitem, iota, right=True)
        convert_element_type: i32[4] = prims.convert_element_type(searchsorted, i32)
        _grouped_mm: bf16[12, 32] = aten._grouped_mm(index, permute, convert_element_type)
        relu: bf16[12, 32] = aten.relu(_grouped_mm)
        pow: bf16[12, 32] = aten.pow.Tensor_Scalar(relu, 2)
        permute_1: bf16[4, 32, 16] = aten.permute(arg3_1, [0, 2, 1])
        _grouped_mm_1: bf16[12, 16] = aten._grouped_mm(pow, permute_1, convert_element_type)
        index_put: bf16[12, 16] = aten.index_put(full, [getitem_1], _grouped_mm_1)
        reshape_1: bf16[6, 2, 16] = aten.reshape(index_put, [6, 2, 16])
        bmm: bf16[6, 1, 16] = aten.bmm(unsqueeze, reshape_1)
        squeeze: bf16[6, 16] = aten.squeeze.dim(bmm, 1)
        return [squeeze]

    After:
        arg0_1: i64[6, 2]
        arg1_1: bf16[6, 16]
        arg2_1: bf16[4, 32, 16]
        arg3_1: bf16[4, 16, 32]
        arg4_1: bf16[6, 2]
        permute: bf16[4, 16, 32] = aten.permute(arg2_1, [0, 2, 1])
        sort_tokens = moe_compile.sort_tokens(arg0_1, 4)
        getitem: i32[12] = sort_tokens[0]
        getitem_1: i32[4] = sort_tokens[1]
        getitem_2: i32[6, 2] = sort_tokens[2]
        grouped_mm: bf16[12, 32] = moe_compile.grouped_mm(arg1_1, permute, getitem_1, getitem, 2)
        relu: bf16[12, 32] = aten.relu(grouped_mm)
        pow: bf16[12, 32] = aten.pow.Tensor_Scalar(relu, 2)
        permute_1: bf16[4, 32, 16] = aten.permute(arg3_1, [0, 2, 1])
        grouped_mm_1: bf16[12, 16] = moe_compile.grouped_mm(pow, permute_1, getitem_1)
        combine: bf16[6, 16] = moe_compile.combine(grouped_mm_1, getitem_2, arg4_1, dtype=bf16)
        reshape: bf16[6, 1, 16] = aten.reshape(combine, [6, 1, 16])
        squeeze: bf16[6, 16] = aten.squeeze.dim(reshape, 1)
        return [squeeze]

    The activation between the GEMMs stays as it is: it is proved to work row by row, which is all
    that the new order of rows asks of it.

    Forms: rows sorted by expert and `_grouped_mm` (transformers' grouped_mm, torchtitan), or
    weights gathered for each row and `bmm` (transformers' batched_mm, gpt-fast), also where that
    became a multiply and a sum; one GEMM for gate and up or two; weights [E, G, H] or [E, H, G];
    with and without biases; any activation. In float8 both as `quantize` makes them of a model:
    `quant_fp8` of rows and `grouped_mm_fp8`. There each token is quantised once, before its rows
    are gathered, which is bitwise the same: a group lies within a row.
    Left alone: rows read by somebody else (saved for backward, say), functions that mix rows,
    offsets that are not proved to be the counts of the ids. Each is reported; a `_grouped_mm` in
    there becomes `grouped_mm` by itself, with the model's own order and sum (Megatron-Core).
    Numerics: biases are added, and products with routing weights are summed, in float32 and rounded
    once. Everything between the GEMMs, and the rounding of their results, stays as written.
    Ids: rows of ids >= E, which a sorted form leaves undefined or masks, add nothing. A gather
    counts ids below 0 from the end, and so does the result; a sorted form gives them no meaning.
    """
    outcome = Outcome()
    gemms = find_gemms(graph)
    reasons: dict[fx.Node, str] = {}
    for node in list(graph.nodes) if gemms else []:
        combine = parse_combine(node, gemms)
        if combine is None:
            continue
        try:
            experts = _match(combine, gemms)
        except Declined as declined:
            for gemm in gemms_above(combine.y, gemms, through=True):
                reasons.setdefault(gemm.node, str(declined))
            continue
        _rewrite(graph, experts)
        outcome.rewrote(experts.down.gemm.node, _describe(experts))
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node in gemms]:
        reason = reasons.get(node, "no weighted sum over the experts of each token was found below")
        if gemms[node].grouped and _rewrite_alone(graph, gemms[node]):
            reason += "; the GEMM alone became grouped_mm"
        outcome.decline(node, reason)
    for node in graph.nodes:
        if is_call(node, *scaled_targets()):
            outcome.decline(
                node, "float8 rows with a scale each, not in groups: moe_compile.quantize"
            )
    graph.eliminate_dead_code()
    return outcome


def _describe(experts: Experts) -> str:
    form = "grouped" if experts.down.gemm.grouped else "batched"
    form += ", float8" if experts.down.gemm.float8 else ""
    bias = ", bias" if experts.down.bias is not None else ""
    E, K = experts.num_experts, experts.dispatch.top_k
    return f"{form}{bias}: {E} experts, top-{K}, {len(experts.ups)} GEMM up, 1 down"


def _match(combine: Combine, gemms: dict[fx.Node, Gemm]) -> Experts:
    tail, downs = _walk(combine, combine.y, gemms, reads_rows=True)
    if len(downs) != 1:
        raise Declined(f"expected 1 GEMM above the weights, got {len(downs)}")
    (down,) = downs
    middle, ups = _walk(combine, down.source, gemms, reads_rows=False)
    if not 1 <= len(ups) <= 2:
        raise Declined(f"expected 1 or 2 GEMMs above the down GEMM, got {len(ups)}")
    xs = {_tokens(up, combine.dispatch) for up in ups}
    if len(xs) != 1:
        raise Declined("the up GEMMs read different inputs")
    experts = {placed.gemm.num_experts for placed in (*ups, down)}
    if len(experts) != 1:
        raise Declined(f"the GEMMs have different numbers of experts: {sorted(experts)}")
    for placed in (*ups, down):
        _check_dtypes(placed)
    _check_dtypes_of_sum(combine)
    parts = (tail.inside, middle.inside, combine.inside, *(p.inside for p in (*ups, down)))
    check_private(dict.fromkeys(n for part in parts for n in part), [combine.node])
    masks = tuple(n for n in (*tail.inside, *middle.inside) if tail.masks(n))
    return Experts(combine, xs.pop(), tuple(ups), down, masks)


def _walk(
    combine: Combine, sink: fx.Node, gemms: dict[fx.Node, Gemm], reads_rows: bool
) -> tuple[Region, list[Placed]]:
    """The region above `sink` and the GEMMs that end it."""
    dispatch = combine.dispatch
    found: dict[fx.Node, Placed | None] = {}

    def leaf(node: fx.Node) -> bool:
        if node not in found:
            found[node] = place(node, gemms, dispatch, reads_rows) if has_val(node) else None
        return found[node] is not None

    experts = {gemm.num_experts for gemm in gemms_above(combine.y, gemms)}

    def masks(node: fx.Node) -> bool:
        return any(dispatch.zeroes_unowned(node, num_experts) for num_experts in experts)

    region = Region(dispatch.num_rows, leaf, masks)
    region.walk(sink)
    return region, [placed for node in region.leaves if (placed := found[node]) is not None]


def _tokens(up: Placed, dispatch: Dispatch) -> fx.Node:
    """x [T, H] of which an up GEMM reads one row for each pair."""
    if not up.gemm.grouped:
        x: fx.Node | None = up.source
        fits = same_shape(up.source, [dispatch.num_tokens, val(up.source).shape[-1]])
    else:
        x = reads_tokens(dispatch.unmask(up.source, up.gemm.num_experts), dispatch)
        fits = x is not None
    if not fits or x is None:
        raise Declined("the up GEMM's rows are not each token K times")
    return x


def _check_dtypes(placed: Placed) -> None:
    gemm, bias = placed.gemm, [placed.bias] if placed.bias else []
    operands = (gemm.node if gemm.float8 else gemm.weight, placed.source, *bias)
    dtypes = {val(node).dtype for node in operands}
    if len(dtypes) != 1 or not dtypes <= set(_FLOATS):
        raise Declined(f"a GEMM in {', '.join(sorted(map(str, dtypes)))}")


def _check_dtypes_of_sum(combine: Combine) -> None:
    for node in (combine.y, combine.weights, combine.node, combine.base or combine.node):
        if val(node).dtype not in _FLOATS:
            raise Declined(f"a weighted sum in {val(node).dtype}")


def _rewrite(graph: fx.Graph, experts: Experts) -> None:
    combine, down, dispatch = experts.combine, experts.down, experts.dispatch
    first = min(up.gemm.node for up in experts.ups)
    with graph.inserting_before(first):
        ids = _ids(graph, experts, first)
        sort = call(graph, moe.sort_tokens.default, ids, experts.num_experts, like=first)
        rows, offsets, position = unpack(graph, sort, 3)
    for mask in experts.masks:
        mask.replace_all_uses_with(args(mask)[2])
    new = {}
    for up in sorted(experts.ups, key=lambda up: up.result):
        new[up.result] = replace(graph, up, experts.x, offsets, rows, dispatch.top_k)
    h = down.source
    while h in experts.masks:
        h = args(h)[2]
    new[down.result] = replace(graph, down, new.get(h, h), offsets, None, 1)
    y = combine.y
    while y in new or y in experts.masks:
        y = new[y] if y in new else args(y)[2]
    with graph.inserting_before(combine.node):
        y = shaped(graph, y, [-1, combine.width], combine.node)
        out = call(
            graph,
            moe.combine.default,
            y,
            position,
            combine.make_weights(graph),
            like=combine.node,
            dtype=val(combine.node).dtype,
        )
        out = shaped(graph, out, list(val(combine.node).shape), combine.node)
        if combine.base is not None:
            out = call(graph, aten.add.Tensor, combine.base, out, like=combine.node)
    combine.node.replace_all_uses_with(out)


def _ids(graph: fx.Graph, experts: Experts, like: fx.Node) -> fx.Node:
    """The ids as [T, K]. A gather counts a negative id from the end; to the ops it is none."""
    dispatch, E = experts.dispatch, experts.num_experts
    ids = simplest_ids(dispatch.ids, E)
    shape = [dispatch.num_tokens, dispatch.top_k]
    wraps = dispatch.sort is None and not in_range(ids, E)
    source = ids
    while is_call(source, *RESHAPES) and not same_shape(source, shape):
        source = args(source)[0]
    if same_shape(source, shape):
        ids = source
    else:
        ids = call(graph, aten.reshape.default, ids, [-1, dispatch.top_k], like=like)
    if wraps:
        negative = call(graph, aten.lt.Scalar, ids, 0, like=like)
        from_end = call(graph, aten.add.Tensor, ids, E, like=like)
        ids = call(graph, aten.where.self, negative, from_end, ids, like=like)
    return ids


def _rewrite_alone(graph: fx.Graph, gemm: Gemm) -> bool:
    """Make one grouped GEMM an op, with the gather of its rows if there is one.

    y[r] = x[token[r]] @ w[e] for offsets[e - 1] <= r < offsets[e] holds for any order and offsets;
    the rows past the last offset, which torch leaves undefined, become zeros.
    """
    node, x, rows, top_k = gemm.node, gemm.x, None, 1
    dtypes = {val(n).dtype for n in (x, gemm.weight, node)}  # one, so not in float8
    if len(dtypes) != 1 or not dtypes <= set(_FLOATS) or val(gemm.index).dtype != torch.int32:
        return False
    with graph.inserting_before(node):
        token = _token(x)
        if token is not None:
            x, order = args(x)[0], exact(token)
            if is_call(order, aten.div.Tensor_mode):
                order, top_k = args(order)
            rows = call(graph, prims.convert_element_type.default, order, torch.int32, like=node)
        new = grouped_mm(graph, x, gemm.weight, gemm.index, rows, top_k, None, node)
    node.replace_all_uses_with(new)
    return True


def _token(rows: fx.Node) -> fx.Node | None:
    """The index of rows gathered from a matrix, if none of it is negative."""
    if not is_call(rows, aten.index.Tensor) or len(args(rows)[1]) != 1:
        return None
    x, (token,) = args(rows)
    if token is None or val(x).ndim != 2 or val(token).ndim != 1 or not never_negative(token):
        return None
    return token  # type: ignore[no-any-return]
