"""Choose how the dense layers of few tokens read their weights."""

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS_OF_SUMS, MOST_WEIGHTS
from moe_compile.passes._graph import (
    RESHAPES,
    args,
    aten,
    call,
    is_call,
    is_input,
    move_before,
    strip,
    unpack,
    val,
)
from moe_compile.passes._linear_fp8 import multiply_unquantised
from moe_compile.passes._outcome import Outcome, exactness

# Measured on 2 cores of Zen 4 with torch 2.13, weights not in cache, [N, K] as nn.Linear has them.
MOST_ROWS = 16
LEAST_WEIGHT = 2**16

MOST_ROWS_CUDA = 16  # of a tile of the tensor cores
# One H200: 16 rows times 4096 x 2048 take 10.4 us, cuBLAS 9.2; times 2048 x 128, 3.8 and 5.5; q, k
# and v of Qwen3-30B-A3B in one launch 9.7, in three of cuBLAS 19.4 (ours with weights prefetched,
# which they are not any more).
MOST_COLUMNS_ALONE = 512
MOST_COLUMNS_CUDA = 2**15  # the head of a vocabulary has more: cuBLAS fills a GPU with it

_FLOATS = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),
}


@exactness("reassociating")
def choose_linear(graph: fx.Graph) -> Outcome:
    """Multiply few rows by a parameter with `skinny_mm`.

    Before:
        arg0_1: f32[256, 256]
        arg1_1: f32[2, 256]
        permute: f32[256, 256] = aten.permute(arg0_1, [1, 0])
        mm: f32[2, 256] = aten.mm(arg1_1, permute)
        return [mm]

    After:
        arg0_1: f32[256, 256]
        arg1_1: f32[2, 256]
        permute: f32[256, 256] = aten.permute(arg0_1, [1, 0])
        skinny_mm: f32[2, 256] = moe_compile.skinny_mm(arg1_1, permute)
        return [skinny_mm]

    On a GPU up to MOST_WEIGHTS weights that multiply the same x, and lie in memory in the same
    order, become one `skinny_mms` where the first of them was. There, too, `quant_fp8` and each
    `linear_fp8` of what it made, or of what was made just so, become `skinny_mms_fp8`, which
    quantises x itself.
    Left alone: a number of rows that is not known, or above MOST_ROWS; weights of less than
    LEAST_WEIGHT elements, computed in the graph, or not contiguous along K or N. On a GPU also
    float32, weights of more than MOST_COLUMNS_CUDA, those whose columns (or rows) begin on no
    multiple of 16 bytes, and more than MOST_ROWS_OF_SUMS rows of one weight of many columns. What
    `route` alone reads may be of a small weight there, and in float32, up to so many rows. In
    float8 also rows that `quant_fp8` did not make, or in other groups or with other roundings.
    Numerics: summed in float32 and rounded once, in another order.
    """
    outcome = Outcome()
    groups = defaultdict(list)
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *bias, x, w = args(node)
            if _gains(node, x, w, *bias):
                groups[_group(node, x, w, *bias)].append(node)
    for nodes in groups.values():
        nodes.sort()
        for start in range(0, len(nodes), MOST_WEIGHTS):
            together = nodes[start : start + MOST_WEIGHTS]
            if len(together) > 1 or not _is_cublas_faster(together[0]):
                _rewrite(graph, together, outcome)
    multiply_unquantised(graph, outcome)
    return outcome


def _gains(node: fx.Node, x: Any, w: Any, bias: Any = None) -> bool:
    """Is this a product that `skinny_mm` computes, and faster?"""
    M, (K, N) = val(x).shape[0], val(w).shape
    if node.kwargs or not all(isinstance(size, int) for size in (M, K, N)):
        return False
    device = val(x).device.type
    routed = device == "cuda" and M <= MOST_ROWS_OF_SUMS and _are_logits(node)
    if not routed and val(x).dtype not in _FLOATS.get(device, ()):
        return False
    if bias is not None and (val(bias).shape != (N,) or val(bias).dtype != val(x).dtype):
        return False
    if device == "cuda" and not (M <= MOST_ROWS_CUDA and N <= MOST_COLUMNS_CUDA and _aligned(w)):
        return False
    large = routed or K * N >= LEAST_WEIGHT
    return 0 < M <= MOST_ROWS and large and is_input(w) and 1 in val(w).stride()


def _are_logits(node: fx.Node) -> bool:
    """Does `route` read this, and nothing else?

    One H200, product and `route` of one row, us: Mixtral 2.8, with torch's product 5.9; DeepSeek-V3
    in float32 7.5 and 10.6; of four rows 4.5 and 5.9, 8.6 and 18.9.
    """
    return bool(node.users) and all(is_call(user, moe.route.default) for user in node.users)


def _is_cublas_faster(node: fx.Node) -> bool:
    """More rows than have sums of their own: our gain is in few columns, and in one launch."""
    x, w = args(node)[-2:]
    rows, columns = val(x).shape[0], val(w).shape[1]
    many = rows > MOST_ROWS_OF_SUMS and columns > MOST_COLUMNS_ALONE
    return val(x).device.type == "cuda" and many


def _aligned(w: fx.Node) -> bool:
    """Can whole columns (or rows) be read by 16 bytes?"""
    value = val(w)
    return all(stride == 1 or stride * value.itemsize % 16 == 0 for stride in value.stride())


def _group(node: fx.Node, x: Any, w: Any, bias: Any = None) -> Any:
    """What products that go together have in common: x, and along which dim w is contiguous."""
    if val(x).device.type != "cuda" or not is_input(bias):
        return node
    return strip(x, *RESHAPES), val(x).shape, val(x).dtype, val(w).stride(0) == 1


def _rewrite(graph: fx.Graph, nodes: list[fx.Node], outcome: Outcome) -> None:
    """All that `nodes` compute, where the first of them is."""
    first = nodes[0]
    x = args(first)[-2]
    ws = [args(node)[-1] for node in nodes]
    biases = [args(node)[0] if len(args(node)) == 3 else None for node in nodes]
    M, (K, N) = val(x).shape[0], val(ws[0]).shape
    with graph.inserting_before(first):
        if len(nodes) == 1:
            bias = [b for b in biases if b is not None]
            new = call(graph, moe.skinny_mm.default, x, *ws, *bias, like=first)
            first.replace_all_uses_with(new)
            outcome.rewrote(first, f"skinny_mm: {M} rows times a weight of {K} x {N}")
            return
        for node in (*ws, *biases):
            move_before(first, node)
        product = call(graph, moe.skinny_mms.default, x, ws, biases, like=first)
        for node, new in zip(nodes, unpack(graph, product, len(nodes)), strict=True):
            node.replace_all_uses_with(new)
    columns = ", ".join(str(val(w).shape[1]) for w in ws)
    outcome.rewrote(first, f"skinny_mms: {M} rows times weights of {K} x {columns}")
