"""One MoE layer, routing given: what the compiler makes of it, its routings, its exact result.

Letters: T tokens, K experts per token, R = T * K rows, E experts, H hidden, F expert features.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe_compile.ops import moe
from moe_compile.ops._experts_kernel import are_few
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize
from moe_compile.passes.fuse_epilogue import LEAST_ROWS_FP8

ROUTINGS = ("uniform", "one first", "zipf")


def layer(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, *w: Tensor) -> Tensor:
    """The ops that the passes leave on a GPU for a known number of tokens, called one by one.

    w: gate with up [E, H, 2F] and down [E, F, H], stored along H and F; in float8 each followed by
    its scales. tests/test_bench_layer.py holds it to `choose_kernels` and `fuse_epilogue`.
    """
    return (_layer if len(w) == 2 else _layer_fp8)(x_TH, ids_TK, weights_TK, *w)


def _layer(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if are_few(ids_TK.numel(), up, down):
        return moe.experts(x_TH, ids_TK, weights_TK, up, down)
    rows, offsets, position = moe.sort_tokens(ids_TK, up.shape[0])
    h_RF = moe.grouped_mm_silu_mul(x_TH, up, offsets, rows, ids_TK.shape[1])
    return moe.combine(moe.grouped_mm(h_RF, down, offsets), position, weights_TK)


def _layer_fp8(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    w_up, w_down = (up, up_scale), (down, down_scale)
    if are_few(ids_TK.numel(), up, down):
        return moe.experts_fp8(x_TH, None, ids_TK, weights_TK, *w_up, *w_down, round_silu=True)
    x_q = moe.quant_fp8(x_TH)
    rows, offsets, position = moe.sort_tokens(ids_TK, up.shape[0])
    routing = (offsets, rows, ids_TK.shape[1])
    if rows.shape[0] >= LEAST_ROWS_FP8:
        h_RF = moe.grouped_mm_fp8_silu_mul(*x_q, *w_up, *routing, round_silu=True)
        h_q = moe.quant_fp8(h_RF, offsets=offsets)
    else:
        h_RG = moe.grouped_mm_fp8(*x_q, *w_up, *routing)
        h_q = moe.silu_mul_quant(h_RG, offsets=offsets, round_silu=True, round_product=True)
    return moe.combine(moe.grouped_mm_fp8(*h_q, *w_down, offsets), position, weights_TK)


def choices(kind: str, T: int, E: int, K: int, count: int, seed: int = 0) -> list[Tensor]:
    """`count` routings, ids [T, K] on the CPU, no expert twice for a token.

    uniform: any K experts; those of one token are none of the routings' before, while there are
        such, so that weights come from memory.
    one first: one expert is every token's first choice, the others are uniform.
    zipf: K without replacement, expert number i with probability as 1 / i.
    Which experts are the popular ones changes from routing to routing.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(E, generator=generator)
    found = []
    for i in range(count):
        if kind == "uniform" and T == 1:
            found.append(order[torch.arange(i * K, (i + 1) * K) % E][None])
            continue
        # The K largest of log(p) + Gumbel noise are K without replacement (Vieira 2014).
        keys = -(-torch.rand(T, E, generator=generator).clamp(1e-30, 1 - 1e-7).log()).log()
        if kind == "one first":
            keys[:, order[i % E]] = torch.inf
        elif kind == "zipf":
            keys -= (1 + torch.randperm(E, generator=generator)).log()
        found.append(keys.topk(K).indices)
    return found


def relative_error(
    got_TH: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, *w: Tensor, most: int = 4
) -> float:
    """By RMS, of up to `most` tokens, against float64 with the same weights; x is not quantised."""
    few = torch.linspace(0, x_TH.shape[0] - 1, min(most, x_TH.shape[0])).long().to(x_TH.device)
    x, ids, weights, got = (t[few] for t in (x_TH, ids_TK, weights_TK, got_TH))
    want = torch.zeros_like(got, dtype=torch.float64)
    for e in ids.unique().tolist():
        up, down = _experts_weights(e, *w)
        gate, value = (x.double() @ up).chunk(2, -1)
        weight = (weights.double() * (ids == e)).sum(1, keepdim=True)
        want += weight * ((silu(gate) * value) @ down)
    error = got.double() - want
    return (error.square().mean().sqrt() / want.square().mean().sqrt()).item()


def _experts_weights(e: int, *w: Tensor) -> list[Tensor]:
    if len(w) == 2:
        return [each[e].double() for each in w]
    pairs = zip(w[::2], w[1::2], strict=True)
    return [dequantize(v[e], scale[e], 128, 128, torch.float64) for v, scale in pairs]
