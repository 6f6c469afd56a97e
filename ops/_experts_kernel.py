"""The experts of so few tokens that hardly two share one: two kernels, and nothing is sorted.

The first is `grouped_mm_silu_mul`'s, where each (token, slot) pair is a tile of one row and finds
its expert in the ids themselves; `_gate_up_fp8_kernel.py`'s from rows that are to be quantised. The
second is here: the second product and the sum over a token's experts in one, so that each program
reads its columns of K weights at once. In float8 it quantises the rows itself, groups of 128 as it
comes to them. Both of weights whose columns are contiguous are in `_experts_columns_kernel.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._experts_columns_kernel import (
    ColumnsBlocks,
    launch_down_columns,
    launch_up_columns,
)
from moe_compile.ops._experts_down_fp8 import requantized, sum_by_dots
from moe_compile.ops._gate_up_fp8_kernel import GateUpBlocks, launch_gate_up
from moe_compile.ops._gated import rounded
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_fp8_kernel import group_of_scales
from moe_compile.ops._grouped_mm_fp8_kernel import launch as launch_fp8
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._grouped_mm_kernel import launch as launch_grouped_mm
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._skinny_mm_fp8_kernel import is_division_needed
from moe_compile.ops._tuned_kernels import EXPERTS_DOWN, EXPERTS_UP, EXPERTS_UP_FP8


class FewBlocks(NamedTuple):
    """Features and columns of one program of `down_combine_kernel`, and how Triton compiles it.

    dot: in float8, on tensor cores, which want 16 columns.
    """

    f: int
    o: int
    warps: int
    stages: int
    dot: bool = False


# One H200, benchmarks/sweep_experts.py, one token, us of both kernels: Mixtral 170 with these, 176
# with (16, 256, 4, 1); DeepSeek-V3 163.3 and 164.3; Qwen3-30B-A3B 23.5 to 23.7 with either.
BLOCKS_UP = Blocks(1, 4, 512, 1, 2, 3)


def are_few(R: int, w_EHG: Tensor, w_EFO: Tensor) -> bool:
    """Have R rows nearly all an expert of their own, and weights stored as these kernels want them?

    Rows that share an expert read it again, from L2 at best: Mixtral, T = 4, gate+up takes 419 us
    by rows and 309 by tiles (one H200, bfloat16).
    """
    dims = (1,) if w_EHG.element_size() == 1 else (1, 2)  # one of them contiguous
    stored = all(any(w.stride(dim) == 1 for dim in dims) for w in (w_EHG, w_EFO))
    return w_EHG.shape[0] >= 4 * R and stored


def choose_few_blocks(F: int, K: int, fp8: bool) -> FewBlocks:
    """For K experts a token, rounded up to a power of two.

    Measured with (16, 256, 4, 3) before, in float8 with (16, 64, 4, 4).
    """
    if fp8 and K <= 2:  # Mixtral 91.0, by sums with (1024, 4) 95.4
        return FewBlocks(512, 16, 4, 3, True)
    if fp8 and F > 1024:  # DeepSeek-V3 93.1, by sums with (128, 8) 97.5; with gate and up's 90.5
        return FewBlocks(128, 16, 4, 3, True)
    if fp8:  # Qwen3 16.3, by dots with (256, 16) 16.5
        return FewBlocks(256, 8, 4, 3)
    # Qwen3 22.6 with 2 stages; Mixtral 166 with 3, 171 with 2; DeepSeek-V3 165 with either.
    return FewBlocks(256, 4, 8, 2 if F <= 1024 else 3)


def choose_blocks_up_fp8(F: int) -> Blocks:
    """Qwen3 17.3 with n = 32, 18.2 with 64; DeepSeek-V3 115 and 99.5."""
    return Blocks(16, 32 if F <= 1024 else 64, 0, 1, 4, 6)


@triton.jit
def _sum_of_sums(  # type: ignore[no-untyped-def]
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    token,
    cols,
    E,
    F,
    C,
    stride_we,
    stride_wo,
    stride_wse,
    stride_wsk,
    amax_floor,
    FP8: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Of one token, the sum over its experts of these columns, on CUDA cores."""
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
    owned = (expert >= 0) & (expert < E)
    weight = tl.load(weights_ptr + token * K + k, mask=k < K, other=0.0).to(tl.float32)
    f = tl.arange(0, BLOCK_F)
    h_ptrs = h_ptr + (token * K + k)[:, None, None] * F + f[None, :, None]
    w_ptrs = w_ptr + expert[:, None, None] * stride_we + f[None, :, None]
    w_ptrs += cols.to(tl.int64)[None, None, :] * stride_wo
    h_mask = owned[:, None, None]
    w_mask = h_mask & (cols < C)[None, None, :]
    if FP8:
        groups = tl.arange(0, BLOCK_F // 128)
        ws_ptrs = ws_ptr + (expert * stride_wse)[:, None]
        ws_ptrs += groups[None, :] * stride_wsk
    # Of each FOLD neighbours along F, which one thread has read at once, it keeps one sum.
    sums = tl.zeros([BLOCK_K, BLOCK_F // FOLD, BLOCK_O], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        if EVEN:
            h = tl.load(h_ptrs, mask=h_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            inside = (f < F - start)[None, :, None]
            h = tl.load(h_ptrs, mask=h_mask & inside, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & inside, other=0.0)
        h = h.to(tl.float32)
        if FP8:
            has_group = owned[:, None] & (start + groups * 128 < F)[None, :]
            ws = tl.load(ws_ptrs, mask=has_group, other=0.0)
            ws_ptrs += (BLOCK_F // 128) * stride_wsk
            h = requantized(
                h, ws, w_ptr.dtype.element_ty, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED
            )  # fmt: skip
            if DIVIDE:  # nothing over a least amax of 0 is NaN
                h = tl.where(h_mask & (f < F - start)[None, :, None], h, 0.0)
        product = tl.reshape(h * w.to(tl.float32), [BLOCK_K, BLOCK_F // FOLD, FOLD, BLOCK_O])
        sums += tl.sum(product, 2)
        h_ptrs += BLOCK_F
        w_ptrs += BLOCK_F
    y = tl.sum(sums, 1)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert[:, None] * C + cols[None, :]
        y += tl.load(bias_ptrs, mask=owned[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
    return tl.sum(tl.where(owned, weight, 0.0)[:, None] * y, 0)


@triton.jit
def down_combine_kernel(  # type: ignore[no-untyped-def]
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    E,
    F,
    C,
    stride_we,
    stride_wo,
    stride_wse,
    stride_wsk,
    stride_wsg,
    amax_floor,
    FP8: tl.constexpr,
    DOT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    num_columns = tl.cdiv(C, BLOCK_O)
    token = (tl.program_id(0) // num_columns).to(tl.int64)
    cols = (tl.program_id(0) % num_columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * C + cols, mask=cols < C).to(tl.float32)
    if FP8:  # BLOCK_O divides 128: a scale for each expert and group of features
        ws_ptr += (((tl.program_id(0) % num_columns) * BLOCK_O) // 128) * stride_wsg
    if DOT:
        tl.static_assert(not HAS_BIAS)
        out = sum_by_dots(
            h_ptr + token * K * F, ids_ptr + token * K, weights_ptr + token * K,
            w_ptr + cols.to(tl.int64) * stride_wo, cols < C, ws_ptr, E, F,
            stride_we, stride_wse, stride_wsk, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED,
            EVEN, K, BLOCK_K, BLOCK_F, BLOCK_O, STAGES,
        )  # fmt: skip
    else:
        out = _sum_of_sums(
            h_ptr, ids_ptr, weights_ptr, w_ptr, ws_ptr, bias_ptr, token, cols, E, F, C,
            stride_we, stride_wo, stride_wse, stride_wsk, amax_floor,
            FP8, POWER_OF_TWO, DIVIDE, INTERPRETED, HAS_BIAS, EVEN,
            K, BLOCK_K, BLOCK_F, BLOCK_O, STAGES, FOLD,
        )  # fmt: skip
    out = rounded(out, out_ptr.dtype.element_ty, True, INTERPRETED)
    if HAS_RESIDUAL:
        out = rounded(out + residual, out_ptr.dtype.element_ty, True, INTERPRETED)
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
    blocks_up: Blocks | ColumnsBlocks | None = None,
    blocks_down: FewBlocks | ColumnsBlocks | None = None,
    residual_TO: Tensor | None = None,
) -> None:
    """Fill out; see `are_few` for when."""
    if out_TO.numel() == 0:
        return
    ids_TK = ids_TK.contiguous()
    T, K = ids_TK.shape
    h_RF = x_TH.new_empty(T * K, w_down_EFO.shape[1])
    if w_up_EHG.stride(1) == 1:
        assert not isinstance(blocks_up, ColumnsBlocks)
        blocks_up = blocks_up or EXPERTS_UP.chosen(
            x_TH.device,
            (x_TH.dtype, gate.interleaved, K),
            (T * K, *w_up_EHG.shape[1:]),
            lambda: BLOCKS_UP,
        )
        launch_grouped_mm(
            x_TH, w_up_EHG, h_RF, ids_TK, None, K, bias_up_EG, gate, blocks_up, direct=True
        )
    else:
        assert not isinstance(blocks_up, Blocks)
        launch_up_columns(x_TH, ids_TK, w_up_EHG, bias_up_EG, h_RF, gate, blocks_up)
    rows, added = (h_RF, ids_TK, weights_TK), (bias_down_EO, residual_TO, out_TO)
    if w_down_EFO.stride(1) == 1:
        assert not isinstance(blocks_down, ColumnsBlocks)
        launch_down(*rows, w_down_EFO, None, *added, blocks_down)
    else:
        assert not isinstance(blocks_down, FewBlocks)
        launch_down_columns(*rows, w_down_EFO, *added, blocks_down)


def launch_few_fp8(
    x_TH: Tensor,
    x_scale_TL: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    out_TO: Tensor,
    dtype: torch.dtype,
    gate: Gate,
    quantisation: tuple[float, bool],
    blocks_up: Blocks | GateUpBlocks | None = None,
    blocks_down: FewBlocks | None = None,
    residual_TO: Tensor | None = None,
) -> None:
    """Fill out from float8 rows and weights with their scales; rows between are in `dtype`.

    quantisation: of these rows, and of x without scales, the least amax and whether scales are
        powers of two.
    """
    if out_TO.numel() == 0:
        return
    ids_TK = ids_TK.contiguous()
    T, K = ids_TK.shape
    h_RF = out_TO.new_empty(T * K, down[0].shape[1], dtype=dtype)
    if x_scale_TL is None:
        assert not isinstance(blocks_up, Blocks)
        launch_gate_up(x_TH, ids_TK, *up, h_RF, gate, quantisation, blocks_up)
    else:
        assert not isinstance(blocks_up, GateUpBlocks)
        blocks_up = blocks_up or EXPERTS_UP_FP8.chosen(
            x_TH.device,
            (dtype, group_of_scales(x_TH.shape[1], x_scale_TL), K),
            (T * K, *up[0].shape[1:]),
            choose_blocks_up_fp8,
            h_RF.shape[1],
        )
        launch_fp8(
            x_TH, x_scale_TL, *up, h_RF, ids_TK, None, K, None, gate, blocks_up, direct=True
        )  # fmt: skip
    added = (None, residual_TO)
    launch_down(h_RF, ids_TK, weights_TK, *down, *added, out_TO, blocks_down, quantisation)


def launch_down(
    h_RF: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_EFO: Tensor,
    w_scale: Tensor | None,
    bias_EO: Tensor | None,
    residual_TO: Tensor | None,
    out_TO: Tensor,
    blocks: FewBlocks | None,
    quantisation: tuple[float, bool] = (0.0, False),
) -> None:
    (T, K), (E, F, C) = ids_TK.shape, w_EFO.shape
    fp8, block_k = w_scale is not None, triton.next_power_of_2(K)
    blocks = blocks or EXPERTS_DOWN.chosen(
        h_RF.device,
        (h_RF.dtype, fp8, K),
        (T, F, C),
        choose_few_blocks,
        *(F, block_k, fp8),
    )
    down_combine_kernel[(T * triton.cdiv(C, blocks.o),)](
        h_RF,
        ids_TK,
        weights_TK.contiguous(),
        w_EFO,
        w_scale,
        bias_EO if bias_EO is None else bias_EO.contiguous(),
        residual_TO if residual_TO is None else residual_TO.contiguous(),
        out_TO,
        E,
        F,
        C,
        w_EFO.stride(0),
        w_EFO.stride(2),
        *((0, 0, 0) if w_scale is None else w_scale.stride()),
        quantisation[0],
        FP8=fp8,
        DOT=fp8 and blocks.dot,
        POWER_OF_TWO=quantisation[1],
        DIVIDE=not h_RF.is_cuda or is_division_needed(quantisation[0]),
        INTERPRETED=not h_RF.is_cuda,
        HAS_BIAS=bias_EO is not None,
        HAS_RESIDUAL=residual_TO is not None,
        EVEN=F % blocks.f == 0,
        K=K,
        BLOCK_K=block_k,
        BLOCK_F=blocks.f,
        BLOCK_O=blocks.o,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        FOLD=16 // w_EFO.element_size(),  # what a thread reads at once
        **overlap(h_RF, T * K * F * C * w_EFO.element_size()),
    )
