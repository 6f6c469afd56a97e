"""Choose how the attention of one query reads the cache."""

import math
import operator
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import arg, aten, call, is_call, prims, same, val
from moe_compile.passes._outcome import Outcome, exactness

attention = aten._scaled_dot_product_flash_attention_for_cpu.default


@exactness("reassociating")
def choose_attention(graph: fx.Graph) -> Outcome:
    """On a CPU, write the attention of one query out, for Inductor to fuse with what feeds it.

    Before:
        arg0_1: f32[2, 4, 1, 8]
        arg1_1: f32[2, 4, 6, 8]
        arg2_1: f32[2, 4, 6, 8]
        _scaled_dot_product_flash_attention_for_cpu = aten._scaled_dot_product_flash_attention_for_cpu(arg0_1, arg1_1, arg2_1, scale=0.5)
        getitem: f32[2, 4, 1, 8] = _scaled_dot_product_flash_attention_for_cpu[0]
        return [getitem]

    After:
        arg0_1: f32[2, 4, 1, 8]
        arg1_1: f32[2, 4, 6, 8]
        arg2_1: f32[2, 4, 6, 8]
        mul: f32[2, 4, 6, 8] = aten.mul.Tensor(arg0_1, arg1_1)
        sum: f32[2, 4, 6, 1] = aten.sum.dim_IntList(mul, [-1], True)
        mul_1: f32[2, 4, 6, 1] = aten.mul.Tensor(sum, 0.5)
        amax: f32[2, 4, 1, 1] = aten.amax(mul_1, [2], True)
        eq: b8[2, 4, 1, 1] = aten.eq.Scalar(amax, -inf)
        full: f32[] = aten.full([], 0.0, dtype=f32)
        full_1: f32[] = aten.full([], 1.0, dtype=f32)
        where: f32[2, 4, 1, 1] = aten.where.self(eq, full, amax)
        sub: f32[2, 4, 6, 1] = aten.sub.Tensor(mul_1, where)
        exp: f32[2, 4, 6, 1] = aten.exp(sub)
        sum_1: f32[2, 4, 1, 1] = aten.sum.dim_IntList(exp, [2], True)
        where_1: f32[2, 4, 1, 1] = aten.where.self(eq, full_1, sum_1)
        div: f32[2, 4, 6, 1] = aten.div.Tensor(exp, where_1)
        mul_2: f32[2, 4, 6, 8] = aten.mul.Tensor(div, arg2_1)
        sum_2: f32[2, 4, 1, 8] = aten.sum.dim_IntList(mul_2, [2], True)
        return [sum_2]

    Flash attention wants keys and values as tensors: repeated for each query head and copied.
    Written out, the repetition is an index in a loop. On 2 cores of Zen 4 (torch 2.13), 16 heads over
    4, a batch of 8, a static cache of 256: 13 to 18 ms of a decode step of 4 layers before.

    Left alone: other devices, more queries than one or a number of them that is not known, causal
    masks, dropout, a logsumexp that is read.
    Numerics: float32, rounded once; a query that may attend to nothing gives zeros, as it did.
    """  # noqa: E501
    outcome = Outcome()
    node: Any
    for node in graph.find_nodes(op="call_function", target=attention):
        outputs = [user for user in node.users if is_call(user, operator.getitem)]
        query = val(node.args[0])
        if not (query.ndim == 4 and same(query.shape[2], 1)):
            continue
        if arg(node, 3, "dropout_p", 0.0) or arg(node, 4, "is_causal", False):
            outcome.decline(node, "dropout or a causal mask")
            continue
        if any(user.args[1] != 0 and user.users for user in outputs):
            outcome.decline(node, "the logsumexp is read")
            continue
        with graph.inserting_before(node):
            new = _write_out(graph, node)
        outcome.rewrote(node, f"one query over {val(node.args[1]).shape[2]} positions, written out")
        for user in outputs:
            if user.args[1] == 0:
                user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)  # dead code elimination takes it for random, and keeps it
    return outcome


def _write_out(graph: fx.Graph, node: Any) -> fx.Node:
    """softmax(scale * q k + mask) v, for q [B, A, 1, D], k and v [B, A, S, D]; A heads."""

    def op(target: Any, *arguments: Any, **kwargs: Any) -> fx.Node:
        return call(graph, target, *arguments, like=node, **kwargs)

    def wide(x: fx.Node) -> fx.Node:
        return x if val(x).dtype == torch.float32 else op(cast, x, torch.float32)

    cast = prims.convert_element_type.default
    query, keys, values = node.args[:3]
    dtype, width = val(query).dtype, val(query).shape[3]
    scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
    products = op(aten.mul.Tensor, wide(query), wide(keys))
    scores = op(aten.mul.Tensor, op(aten.sum.dim_IntList, products, [-1], True), scale)
    mask = node.kwargs.get("attn_mask")
    if mask is not None:
        scores = op(aten.add.Tensor, scores, wide(op(aten.permute.default, mask, [0, 1, 3, 2])))
    highest = op(aten.amax.default, scores, [2], True)
    nothing = op(aten.eq.Scalar, highest, -math.inf)
    zero, one = (_number(graph, node, x) for x in (0.0, 1.0))
    highest = op(aten.where.self, nothing, zero, highest)
    powers = op(aten.exp.default, op(aten.sub.Tensor, scores, highest))
    total = op(aten.sum.dim_IntList, powers, [2], True)
    weights = op(aten.div.Tensor, powers, op(aten.where.self, nothing, one, total))
    out = op(aten.sum.dim_IntList, op(aten.mul.Tensor, weights, wide(values)), [2], True)
    return out if dtype == torch.float32 else op(cast, out, dtype)


def _number(graph: fx.Graph, node: Any, number: float) -> fx.Node:
    query = val(node.args[0])
    full = graph.call_function(
        aten.full.default, ([], number), {"dtype": torch.float32, "device": query.device}
    )
    full.meta["val"] = query.new_full((), number, dtype=torch.float32)
    return full
