"""The experts of so few tokens that hardly two share one: two kernels, and nothing is sorted.

The first is `grouped_mm_silu_mul`'s, where each (token, slot) pair is a tile of one row and finds
its expert in the ids themselves. The second is here: the second product and the sum over a token's
experts in one, so that each program reads its columns of K weights at once.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._grouped_mm_kernel import Blocks, Gate
from moe_compile.ops._grouped_mm_kernel import launch as launch_grouped_mm
from moe_compile.ops._overlap import overlap, prefetch, wait_for_previous

PREFETCH = True


class FewBlocks(NamedTuple):
    """Features and columns of one program of `down_combine_kernel`, and how Triton compiles it."""

    f: int
    o: int
    warps: int
    stages: int


BLOCKS_UP = Blocks(1, 16, 256, 1, 4, 3)


def are_few(R: int, w_EHG: Tensor, w_EFO: Tensor) -> bool:
    """Have R rows nearly all an expert of their own, and weights stored as these kernels want them?

    Rows that share an expert read it again, from L2 at best: Mixtral, T = 4, gate+up takes 419 us
    by rows and 309 by tiles (one H200, bfloat16).
    """
    return w_EHG.shape[0] >= 4 * R and w_EHG.stride(1) == 1 and w_EFO.stride(1) == 1


def choose_few_blocks(F: int, K: int) -> FewBlocks:
    return FewBlocks(256, max(1, 32 // K), 4, 3)


@triton.jit
def down_combine_kernel(  # type: ignore[no-untyped-def]
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    E,
    F,
    C,
    stride_we,
    stride_wo,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    num_columns = tl.cdiv(C, BLOCK_O)
    token = (tl.program_id(0) // num_columns).to(tl.int64)
    cols = (tl.program_id(0) % num_columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
    owned = (expert >= 0) & (expert < E)
    weight = tl.load(weights_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    # The kernel before, the first product's, lets this one start when the ids are there.
    lines = tl.arange(0, LINES) * 64
    early = w_ptr + expert[:, None, None] * stride_we + lines[None, :, None]
    early += cols.to(tl.int64)[None, None, :] * stride_wo
    inside = (lines < F)[None, :, None] & (cols < C)[None, None, :]
    prefetch(tl.where(owned[:, None, None] & inside, early, w_ptr), PREFETCH)
    wait_for_previous(PDL)
    f = tl.arange(0, BLOCK_F)
    h_ptrs = h_ptr + (token * K + k)[:, None, None] * F + f[None, :, None]
    w_ptrs = w_ptr + expert[:, None, None] * stride_we + f[None, :, None]
    w_ptrs += cols.to(tl.int64)[None, None, :] * stride_wo
    h_mask = owned[:, None, None]
    w_mask = h_mask & (cols < C)[None, None, :]
    sums = tl.zeros([BLOCK_K, BLOCK_F, BLOCK_O], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        if EVEN:
            h = tl.load(h_ptrs, mask=h_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            inside = (f < F - start)[None, :, None]
            h = tl.load(h_ptrs, mask=h_mask & inside, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & inside, other=0.0)
        sums += h.to(tl.float32) * w.to(tl.float32)
        h_ptrs += BLOCK_F
        w_ptrs += BLOCK_F
    y = tl.sum(sums, 1)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert[:, None] * C + cols[None, :]
        y += tl.load(bias_ptrs, mask=owned[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
    out = tl.sum(tl.where(owned, weight, 0.0)[:, None] * y, 0)
    tl.store(out_ptr + token * C + cols, out, mask=cols < C)


def launch_few(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    out_TO: Tensor,
    bias_up_EG: Tensor | None,
    bias_down_EO: Tensor | None,
    gate: Gate,
    blocks_up: Blocks | None = None,
    blocks_down: FewBlocks | None = None,
) -> None:
    """Fill out; see `are_few` for when."""
    (T, K), (E, F, C) = ids_TK.shape, w_down_EFO.shape
    if out_TO.numel() == 0:
        return
    ids_TK = ids_TK.contiguous()
    h_RF = x_TH.new_empty(T * K, F)
    launch_grouped_mm(
        x_TH, w_up_EHG, h_RF, ids_TK, None, K, bias_up_EG, gate, blocks_up or BLOCKS_UP, direct=True
    )
    blocks = blocks_down or choose_few_blocks(F, triton.next_power_of_2(K))
    down_combine_kernel[(T * triton.cdiv(C, blocks.o),)](
        h_RF,
        ids_TK,
        weights_TK.contiguous(),
        w_down_EFO,
        h_RF if bias_down_EO is None else bias_down_EO.contiguous(),
        out_TO,
        E,
        F,
        C,
        w_down_EFO.stride(0),
        w_down_EFO.stride(2),
        HAS_BIAS=bias_down_EO is not None,
        EVEN=F % blocks.f == 0,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        BLOCK_F=blocks.f,
        BLOCK_O=blocks.o,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        LINES=triton.next_power_of_2(min(64, triton.cdiv(F, 64))),
        PREFETCH=PREFETCH and overlap(x_TH)["PDL"],
        **overlap(x_TH),
    )
