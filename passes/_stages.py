"""Write the stages of experts: their products in place of a model's own."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._gemm import Placed
from moe_compile.passes._gemm_fp8 import quantized
from moe_compile.passes._graph import aten, call, same, strip, val


def replace(
    graph: fx.Graph,
    placed: Placed,
    x: fx.Node,
    offsets: fx.Node,
    rows: fx.Node | None,
    top_k: int,
) -> fx.Node:
    """Put `grouped_mm` or `grouped_mm_fp8` where the result of a GEMM is."""
    like, float8 = placed.gemm.node, placed.gemm.float8
    weights = [placed.gemm.weight, *([float8.scale] if float8 else [])]
    with graph.inserting_before(placed.result):
        x = shaped(graph, x, [-1, val(x).shape[-1]], like)
        if placed.transpose:
            weights = [call(graph, aten.permute.default, w, [0, 2, 1], like=like) for w in weights]
        how = (offsets, rows, top_k, placed.bias)
        if float8 is None:
            new = grouped_mm(graph, x, weights[0], *how, like)
        else:
            operands = (*quantized(graph, x, float8.quant, placed.result), *weights)
            new = _grouped_mm_fp8(graph, *operands, *how, like=like)
        new = shaped(graph, new, list(val(placed.result).shape), like)
    placed.result.replace_all_uses_with(new)
    return new


def grouped_mm(
    graph: fx.Graph,
    x: fx.Node,
    weight: fx.Node,
    offsets: fx.Node,
    rows: fx.Node | None,
    top_k: int,
    bias: fx.Node | None,
    like: fx.Node,
) -> fx.Node:
    """The call without trailing defaults, so that graphs read well."""
    inputs = _without_defaults([x, weight, offsets, rows, top_k, bias], (None, 1, None))
    return call(graph, moe.grouped_mm.default, *inputs, like=like)


def _grouped_mm_fp8(graph: fx.Graph, *inputs: Any, like: fx.Node) -> fx.Node:
    dtype = val(like).dtype
    inputs = (*inputs, dtype)
    named = _without_defaults(inputs, (None, 1, None, torch.bfloat16))
    return call(graph, moe.grouped_mm_fp8.default, *named, like=like)


def _without_defaults(inputs: Iterable[Any], defaults: Sequence[Any]) -> list[Any]:
    """The inputs, of which the last may be left out where they are these."""
    inputs = list(inputs)
    for default in reversed(defaults):
        if inputs[-1] is not default:
            break
        inputs.pop()
    return inputs


def shaped(graph: fx.Graph, node: fx.Node, shape: list[Any], like: fx.Node) -> fx.Node:
    """`node` in this shape; -1 stands for what is left."""
    for view in (node, strip(node, aten.reshape.default)):
        sizes = val(view).shape
        if len(sizes) == len(shape) and all(
            same(b, -1) or same(a, b) for a, b in zip(sizes, shape, strict=True)
        ):
            return view
    known = [size if isinstance(size, int) else -1 for size in shape]  # only T may be symbolic
    return call(graph, aten.reshape.default, node, known, like=like)
