"""Choose how a dense layer of few tokens reads its weight."""

from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import args, aten, call, strip, val
from moe_compile.passes._outcome import Outcome, exactness

# Measured on 2 cores of Zen 4 with torch 2.13, weights not in cache, [N, K] as nn.Linear has them.
MOST_ROWS = 16
LEAST_WEIGHT = 2**16

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@exactness("reassociating")
def choose_linear(graph: fx.Graph) -> Outcome:
    """On a CPU, multiply few rows by a parameter with `skinny_mm`.

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

    Left alone: other devices; a number of rows that is not known, or above MOST_ROWS; weights of
    less than LEAST_WEIGHT elements, computed in the graph, or not contiguous along K or N.
    Numerics: summed in float32 and rounded once, in another order.
    """
    outcome = Outcome()
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *bias, x, w = args(node)
            if not _gains(node, x, w, *bias):
                continue
            with graph.inserting_before(node):
                new = call(graph, moe.skinny_mm.default, x, w, *bias, like=node)
            node.replace_all_uses_with(new)
            M, (K, N) = val(x).shape[0], val(w).shape
            outcome.rewrote(node, f"skinny_mm: {M} rows times a weight of {K} x {N}")
    return outcome


def _gains(node: fx.Node, x: Any, w: Any, bias: Any = None) -> bool:
    """Is this a product that `skinny_mm` computes, and faster?"""
    M, (K, N) = val(x).shape[0], val(w).shape
    known = all(isinstance(size, int) for size in (M, K, N))
    if val(x).device.type != "cpu" or not known or val(x).dtype not in _FLOATS or node.kwargs:
        return False
    if bias is not None and (val(bias).shape != (N,) or val(bias).dtype != val(x).dtype):
        return False
    is_parameter = strip(w, aten.permute.default, aten.t.default).op in ("placeholder", "get_attr")
    return 0 < M <= MOST_ROWS and K * N >= LEAST_WEIGHT and is_parameter and 1 in val(w).stride()
