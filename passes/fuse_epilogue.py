"""Let the product of gate and up end with silu(gate) * up."""

from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import arg, args, call, is_call, val
from moe_compile.passes._outcome import Declined, Outcome, exactness

# One H200, benchmarks/sweep_grouped_mm.py. In bfloat16 the gate costs the product nothing that is
# seen (Qwen3-30B-A3B, T = 1: 15.7 us with and without; T = 1024: 226.7 and 228.0; T = 8192: 788 and
# 767), and saves the activation (1.4, 7.6, 72). In float8 the quantisation stays a kernel, which
# then reads half: T = 1024, 136.2 with and without, but T = 16 68.1 and 66.8, where reading half
# saves nothing. Quantising in the product's own epilogue, too, asks for tiles of 64 x 256, and
# lost: Mixtral, T = 8192, 5557 for 5113 + 271.
LEAST_ROWS_FP8 = 2048


@exactness("bitwise")
def fuse_epilogue(graph: fx.Graph) -> Outcome:
    """On a GPU, gate the rows of a grouped GEMM before they are stored.

    Before:
        arg0_1: bf16[4, 64]
        arg1_1: bf16[3, 64, 256]
        arg2_1: i32[3]
        grouped_mm: bf16[4, 256] = moe_compile.grouped_mm(arg0_1, arg1_1, arg2_1)
        silu_mul: bf16[4, 128] = moe_compile.silu_mul(grouped_mm)
        return [silu_mul]

    After:
        arg0_1: bf16[4, 64]
        arg1_1: bf16[3, 64, 256]
        arg2_1: i32[3]
        grouped_mm_silu_mul: bf16[4, 128] = moe_compile.grouped_mm_silu_mul(arg0_1, arg1_1, arg2_1)
        return [grouped_mm_silu_mul]

    In float8 `grouped_mm_fp8` and `silu_mul_quant` become `grouped_mm_fp8_silu_mul` and
    `quant_fp8`, from LEAST_ROWS_FP8 rows on.
    Left alone: CPUs; products that others read, too; halves in weights that are not stored along
    H, whose columns of gate and up no tile reads together; in float8 a number of rows that is not
    known, and activations that the model does not round before they are quantised.
    Numerics: the same sums in the same order, rounded where they were stored.
    """
    outcome = Outcome()
    for target, fuse in (
        (moe.silu_mul.default, _fuse),
        (moe.silu_mul_quant.default, _fuse_fp8),
    ):
        for node in graph.find_nodes(op="call_function", target=target):
            if val(args(node)[0]).device.type != "cuda":
                continue
            try:
                fuse(graph, node, outcome)
            except Declined as reason:
                outcome.decline(node, str(reason))
    return outcome


def _fuse(graph: fx.Graph, silu_mul: fx.Node, outcome: Outcome) -> None:
    product = args(silu_mul)[0]
    if not is_call(product, moe.grouped_mm.default):
        return  # a dense layer, or another activation between
    _is_read_here_alone(product)
    interleaved = arg(silu_mul, 1, "interleaved", False)
    if not interleaved:
        _is_stored_along_h(args(product)[1])
    attributes = {
        name: arg(silu_mul, i, name)
        for i, name in enumerate(("interleaved", "alpha", "limit", "up_shift"), 1)
    }
    given = {k: v for k, v in attributes.items() if v is not None}
    with graph.inserting_before(silu_mul):
        new = call(
            graph, moe.grouped_mm_silu_mul.default, *args(product), like=silu_mul,
            **product.kwargs, **given,
        )  # fmt: skip
    silu_mul.replace_all_uses_with(new)
    outcome.rewrote(silu_mul, f"grouped_mm_silu_mul, {val(new).shape[1]} columns")


_ACTIVATION = ("alpha", "limit", "up_shift", "round_silu")
_NOT_OURS = ("up", "weights", "interleaved", "round_terms", "round_sigmoid", "pad_rows")
_QUANTISATION = (
    *("group", "power_of_two", "column_major", "amax_floor", "scale_floor"),
    *("scale_by_reciprocal", "quant_by_reciprocal", "amax_eps", "scale_eps"),
)


def _fuse_fp8(graph: fx.Graph, quant: fx.Node, outcome: Outcome) -> None:
    product = args(quant)[0]
    if not is_call(product, moe.grouped_mm_fp8.default):
        return
    _is_read_here_alone(product)
    rows, G = val(product).shape
    if not isinstance(rows, int) or rows < LEAST_ROWS_FP8:
        raise Declined(f"{rows} rows: gains from {LEAST_ROWS_FP8} known ones on")
    schema = [a.name for a in moe.silu_mul_quant.default._schema.arguments]
    given = {**dict(zip(schema, args(quant), strict=False)), **quant.kwargs}
    if any(given.get(name) for name in _NOT_OURS):
        raise Declined("an activation that the product's epilogue does not know")
    if not given.get("round_product"):
        raise Declined("the activation is not rounded before it is quantised")
    if G % 256:
        raise Declined(f"blocks of scales that hold both gate and up: {G} columns")
    activation = {k: given[k] for k in _ACTIVATION if k in given}
    how: dict[str, Any] = {k: given[k] for k in _QUANTISATION if k in given}
    if given.get("offsets") is not None:
        how["offsets"] = given["offsets"]
    with graph.inserting_before(quant):
        gated = call(
            graph, moe.grouped_mm_fp8_silu_mul.default, *args(product), like=quant,
            **product.kwargs, **activation,
        )  # fmt: skip
        new = call(graph, moe.quant_fp8.default, gated, like=quant, **how)
    quant.replace_all_uses_with(new)
    outcome.rewrote(quant, f"grouped_mm_fp8_silu_mul and quant_fp8, {G // 2} columns")


def _is_read_here_alone(product: fx.Node) -> None:
    if len(product.users) != 1:
        raise Declined("the product of gate and up is read by others, too")


def _is_stored_along_h(w: fx.Node) -> None:
    if val(w).stride(1) != 1:
        raise Declined("halves of a weight that is not stored along H")
