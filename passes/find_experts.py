"""Find the experts of an MoE layer and give each stage its op."""

from dataclasses import dataclass

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._combine import Combine, parse_combine
from moe_compile.passes._dispatch import Dispatch, in_range, repeated_tokens
from moe_compile.passes._gemm import Gemm, expert_gemms_above, is_expert_gemm, parse_gemm
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    aten,
    call,
    is_call,
    same,
    same_shape,
    strip,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rows import Region


@dataclass(frozen=True)
class Experts:
    """One matched layer."""

    combine: Combine
    x: fx.Node  # [T, H]
    ups: tuple[Gemm, ...]
    down: Gemm
    masks: tuple[fx.Node, ...]  # where(unowned, 0, .), which the ops make needless

    @property
    def dispatch(self) -> Dispatch:
        return self.combine.dispatch


@exactness("reassociating")
def find_experts(graph: fx.Graph) -> Outcome:
    """Replace the GEMMs of experts, and what sorts and adds up their rows, by ops.

    Before:
        BEFORE

    After:
        AFTER

    The activation between the GEMMs stays as it is: it is proved to work row by row, which is all that
    the new order of rows asks of it.

    Forms: rows sorted by expert and `_grouped_mm` (transformers' grouped_mm, torchtitan), or weights
    gathered for each row and `bmm` (transformers' batched_mm, gpt-fast); one GEMM for gate and up or
    two; weights [E, G, H] or [E, H, G]; with and without biases; any activation.
    Left alone: rows read by somebody else (saved for backward, say), functions that mix rows, offsets
    that are not the counts of the ids. Each is reported.
    Numerics: products with routing weights and their sum are float32, rounded once.
    """
    outcome = Outcome()
    reasons: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        combine = parse_combine(node)
        if combine is None:
            continue
        try:
            experts = _match(combine)
        except Declined as declined:
            for gemm in expert_gemms_above(combine.y):
                reasons.setdefault(gemm.node, str(declined))
            continue
        _rewrite(graph, experts)
        outcome.rewrote(experts.down.node, _describe(experts))
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if is_expert_gemm(node):
            outcome.decline(node, reasons.get(node, "no sum over the experts of a token was found below"))
    return outcome


def _describe(experts: Experts) -> str:
    E, H, G = val(experts.ups[0].weight).shape
    form = "grouped" if experts.down.grouped else "batched"
    bias = ", bias" if experts.down.bias is not None else ""
    return f"{form}{bias}: {E} experts, top-{experts.combine.top_k}, {len(experts.ups)} GEMM up, 1 down"


def _match(combine: Combine) -> Experts:
    dispatch = combine.dispatch
    tail = _region(combine, combine.y)
    (down,) = _gemms(tail, dispatch, "between the down GEMM and the weighting")
    middle = _region(combine, strip(down.x, *SQUEEZES))
    ups = _gemms(middle, dispatch, "between the up and the down GEMM")
    tail.check_private(combine.reader)
    middle.check_private(down.node, *_views_between(down))
    xs = {_tokens(up, combine) for up in ups}
    if len(xs) != 1:
        raise Declined("the up GEMMs read different inputs")
    experts = {gemm.num_experts for gemm in (*ups, down)}
    if len(experts) != 1:
        raise Declined(f"the GEMMs have different numbers of experts: {experts}")
    for gemm in (*ups, down):
        _check_frame(gemm, combine)
    masks = tuple(n for n in tail.inside | middle.inside if tail.masks(n))
    return Experts(combine, xs.pop(), tuple(ups), down, masks)


def _region(combine: Combine, sink: fx.Node) -> Region:
    dispatch = combine.dispatch

    def leaf(node: fx.Node) -> bool:
        gemm = parse_gemm(node, dispatch)
        return gemm is not None and same_shape(node, (*combine.rows, val(node).shape[-1]))

    def masks(node: fx.Node) -> bool:
        return any(dispatch.zeroes_unowned(node, e) for e in _mask_bound(node))

    region = Region(combine.rows, leaf, masks)
    region.walk(sink)
    return region


def _mask_bound(node: fx.Node) -> list[int]:
    """The E of a mask `ids >= E`."""
    if not is_call(node, aten.where.self):
        return []
    mask = strip(node.args[0], *SQUEEZES, *RESHAPES, aten.expand.default)
    return [mask.args[1]] if is_call(mask, aten.ge.Scalar) else []


def _gemms(region: Region, dispatch: Dispatch, where: str) -> list[Gemm]:
    gemms = [parse_gemm(leaf, dispatch) for leaf in region.leaves]
    found = [g for g in gemms if g is not None]
    if not 1 <= len(found) <= 2:
        raise Declined(f"expected 1 or 2 expert GEMMs {where}, got {len(found)}")
    return found


def _views_between(gemm: Gemm) -> list[fx.Node]:
    """The views through which a GEMM reads its rows."""
    views, node = [], gemm.x
    while is_call(node, *SQUEEZES):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return views


def _tokens(up: Gemm, combine: Combine) -> fx.Node:
    """x [T, H] of which an up GEMM reads one row for each pair."""
    dispatch = combine.dispatch
    rows = dispatch.unmask(strip(up.x, *SQUEEZES), up.num_experts)
    rows = strip(rows, *COPIES)
    if dispatch.sort is not None:
        if is_call(rows, aten.index.Tensor) and len(rows.args[1]) == 1:
            x, (token,) = rows.args
            if val(x).ndim == 2 and dispatch.is_token_of_row(strip(token, *CASTS)):
                return x  # type: ignore[no-any-return]
        raise Declined("the up GEMM's rows are not x[order // K]")
    x = repeated_tokens(rows, combine.top_k)
    if x is None:
        raise Declined("the up GEMM's rows are not each token K times")
    return x


def _check_frame(gemm: Gemm, combine: Combine) -> None:
    dispatch = combine.dispatch
    if gemm.grouped != (dispatch.sort is not None):
        raise Declined("a grouped GEMM outside a sort, or gathered weights inside one")
    if gemm.grouped and not dispatch.counts_rows(gemm.index, gemm.num_experts):
        raise Declined("the offsets are not proved to be the running counts of the sorted ids")
    if not gemm.grouped and not dispatch.is_expert_of_row(gemm.index):
        raise Declined("the GEMMs gather weights by different ids")


def _rewrite(graph: fx.Graph, experts: Experts) -> None:
    combine, down = experts.combine, experts.down
    place = {node: i for i, node in enumerate(graph.nodes)}
    first = min((up.result for up in experts.ups), key=place.__getitem__)
    with graph.inserting_before(first):
        ids = _ids(graph, experts, first)
        sort = call(graph, moe.sort_tokens.default, ids, down.num_experts, like=first)
        rows, offsets, position = unpack(graph, sort, 3)
    for mask in experts.masks:
        mask.replace_all_uses_with(mask.args[2])  # type: ignore[arg-type]
    new = {}
    for up in experts.ups:
        new[up.result] = _replace(graph, up, experts.x, offsets, rows, combine.top_k)
    h = _as_rows(graph, strip(down.node.args[0] if down.grouped else down.x, *SQUEEZES), down)
    new[down.result] = _replace(graph, down, h, offsets, None, 1)
    y = combine.y
    while y in new or y in experts.masks:
        y = new[y] if y in new else y.args[2]  # type: ignore[assignment]
    with graph.inserting_before(combine.node):
        if val(y).ndim != 2:
            y = call(graph, aten.reshape.default, y, [-1, val(y).shape[-1]], like=combine.node)
        weights, dtype = combine.weights(graph), val(combine.node).dtype
        target = moe.combine.default
        out = call(graph, target, y, position, weights, like=combine.node, dtype=dtype)
        if combine.base is not None:
            out = call(graph, aten.add.Tensor, combine.base, out, like=combine.node)
    combine.node.replace_all_uses_with(out)


def _ids(graph: fx.Graph, experts: Experts, like: fx.Node) -> fx.Node:
    """The ids as [T, K]. A gather takes a negative id from the end, where the ops take it for none."""
    ids, top_k, E = experts.dispatch.ids, experts.combine.top_k, experts.down.num_experts
    wraps = not experts.down.grouped and not in_range(ids, E)
    ids = ids if wraps else _unflatten(ids, top_k)
    if val(ids).ndim != 2:
        ids = call(graph, aten.reshape.default, ids, [-1, top_k], like=like)
    if wraps:
        negative = call(graph, aten.lt.Scalar, ids, 0, like=like)
        ids = call(
            graph, aten.where.self, negative, call(graph, aten.add.Tensor, ids, E, like=like), ids, like=like
        )
    return ids


def _unflatten(ids: fx.Node, top_k: int) -> fx.Node:
    """The [T, K] node that was flattened, if there is one."""
    source = strip(ids, *RESHAPES)
    return source if val(source).ndim == 2 and same(val(source).shape[1], top_k) else ids


def _as_rows(graph: fx.Graph, h: fx.Node, gemm: Gemm) -> fx.Node:
    if val(h).ndim == 2:
        return h
    with graph.inserting_before(gemm.result):
        return call(graph, aten.reshape.default, h, [-1, val(gemm.x).shape[-1]], like=gemm.node)


def _replace(
    graph: fx.Graph, gemm: Gemm, x: fx.Node, offsets: fx.Node, rows: fx.Node | None, top_k: int
) -> fx.Node:
    with graph.inserting_before(gemm.result):
        weight = gemm.weight
        if gemm.transpose:
            weight = call(graph, aten.permute.default, weight, [0, 2, 1], like=gemm.node)
        inputs = (x, weight, offsets, rows, top_k, gemm.bias)
        new = call(graph, moe.grouped_mm.default, *_trim(inputs), like=gemm.node)
        if val(gemm.result).ndim != 2:
            shape = [*val(gemm.result).shape[:-1], val(new).shape[-1]]
            new = call(graph, aten.reshape.default, new, shape, like=gemm.node)
    gemm.result.replace_all_uses_with(new)
    return new


def _trim(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Without trailing defaults of `grouped_mm`, so that graphs read well."""
    defaults = (..., ..., ..., None, 1, None)
    count = len(inputs)
    while count > 3 and inputs[count - 1] is defaults[count - 1] or inputs[count - 1] == 1 and count == 5:
        count -= 1
    return inputs[:count]
