"""The first kernel of `experts_fp8` for few tokens: gate and up, from rows not yet quantised.

Each (token, slot) pair finds its expert in the ids, and each program a few features of one pair:
their columns of gate and of up. It quantises the row as it comes to it, as `skinny_mms_fp8` does.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._dots_fp8 import COLUMNS, added_up, products, quantised_row
from moe_compile.ops._gated import gated, rounded
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._skinny_mm_fp8_kernel import READ_AT_ONCE, is_division_needed
from moe_compile.ops._skinny_mm_fp8_sums import GROUP, column, folded, quantised_groups


class GateUpBlocks(NamedTuple):
    """Features and depth of one program, and how Triton compiles it.

    dot: on tensor cores, which want 16 features.
    """

    f: int
    k: int
    warps: int
    stages: int
    dot: bool = False


def choose_gate_up_blocks(F: int) -> GateUpBlocks:
    """One H200, 2026-11-22, sweep_experts.py, both kernels of one token, the other by sums, us:
    Qwen3-30B-A3B 16.3 by dots, (8, 512, 1, 3) by sums 17.2; DeepSeek-V3 94.8 and, with
    (8, 1024, 2, 3), 97.5; Mixtral 97.2 at best by dots, and 95.4.
    """
    if F <= 1024:
        return GateUpBlocks(16, 256, 2, 4, True)
    return GateUpBlocks(16, 256, 1, 4, True) if F <= 4096 else GateUpBlocks(8, 1024, 2, 3)


@triton.jit
def _by_sums(  # type: ignore[no-untyped-def]
    x_ptr,
    gate_ptr,
    up_step,
    ws_ptr,
    up_s_step,
    stride_wsk,
    H,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_H: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The row times columns of gate and of up, on CUDA cores; gate_ptr [BLOCK_F]."""
    k = tl.arange(0, BLOCK_K)[:, None]
    groups = tl.arange(0, BLOCK_K // GROUP)
    x_ptrs = x_ptr + k
    gate_ptrs = k + gate_ptr[None, :]
    up_ptrs = gate_ptrs + up_step
    gate_s_ptrs = ws_ptr + groups * stride_wsk
    up_s_ptrs = gate_s_ptrs + up_s_step
    gates = tl.zeros([BLOCK_K // FOLD, BLOCK_F], tl.float32)
    ups = tl.zeros([BLOCK_K // FOLD, BLOCK_F], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        if EVEN_H:
            x = tl.load(x_ptrs)
            gate_w, up_w = tl.load(gate_ptrs), tl.load(up_ptrs)
            gate_s, up_s = tl.load(gate_s_ptrs), tl.load(up_s_ptrs)
        else:
            inside, has_group = k < H - start, groups * GROUP < H - start
            x = tl.load(x_ptrs, mask=inside, other=0.0)
            gate_w = tl.load(gate_ptrs, mask=inside, other=0.0)
            up_w = tl.load(up_ptrs, mask=inside, other=0.0)
            gate_s = tl.load(gate_s_ptrs, mask=has_group, other=0.0)
            up_s = tl.load(up_s_ptrs, mask=has_group, other=0.0)
        q, scale = quantised_groups(
            tl.reshape(x, [1, BLOCK_K]), gate_ptr.dtype.element_ty, amax_floor,
            POWER_OF_TWO, DIVIDE, INTERPRETED,
        )  # fmt: skip
        for_gate, for_up = column(q, scale, gate_s), column(q, scale, up_s)
        if not EVEN_H:  # nothing over a least amax of 0 is NaN
            for_gate = tl.where(k < H - start, for_gate, 0.0)
            for_up = tl.where(k < H - start, for_up, 0.0)
        gates += folded(for_gate, gate_w, FOLD)
        ups += folded(for_up, up_w, FOLD)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        gate_s_ptrs += (BLOCK_K // GROUP) * stride_wsk
        up_s_ptrs += (BLOCK_K // GROUP) * stride_wsk
    return tl.sum(gates, 0), tl.sum(ups, 0)


@triton.jit
def _by_dots(  # type: ignore[no-untyped-def]
    x_ptr,
    gate_ptr,
    up_step,
    ws_ptr,
    up_s_step,
    stride_wsk,
    H,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same on tensor cores (`_dots_fp8.py`)."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    groups = tl.arange(0, GROUPS)
    k = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x_ptrs = x_ptr + k
    gate_ptrs = gate_ptr[None, :, None] + k[:, None, :]
    up_ptrs = gate_ptrs + up_step
    gate_s_ptrs = ws_ptr + groups * stride_wsk
    up_s_ptrs = gate_s_ptrs + up_s_step
    gates = tl.zeros([GROUPS, BLOCK_F, COLUMNS], tl.float32)
    ups = tl.zeros([GROUPS, BLOCK_F, COLUMNS], tl.float32)
    x = tl.load(x_ptrs, mask=k < H, other=0.0)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        x_ptrs += BLOCK_K
        next_x = tl.load(x_ptrs, mask=k < H - start - BLOCK_K, other=0.0)
        q, scale = quantised_row(
            x, gate_ptr.dtype.element_ty, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED
        )
        if DIVIDE and not EVEN_H:  # nothing over a least amax of 0 is NaN
            q = tl.where(k < H - start, q.to(tl.float32), 0.0)
        # Weights are loaded ahead, and waited for here: not before the row is quantised.
        if EVEN_H:
            gate_w, up_w = tl.load(gate_ptrs), tl.load(up_ptrs)
        else:
            inside = (k < H - start)[:, None, :]
            gate_w = tl.load(gate_ptrs, mask=inside, other=0.0)
            up_w = tl.load(up_ptrs, mask=inside, other=0.0)
        has_group = groups * GROUP < H - start
        gate_s = tl.load(gate_s_ptrs, mask=has_group, other=0.0)
        up_s = tl.load(up_s_ptrs, mask=has_group, other=0.0)
        gates += products(q, gate_w, scale * gate_s, INTERPRETED)
        ups += products(q, up_w, scale * up_s, INTERPRETED)
        x = next_x
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        gate_s_ptrs += GROUPS * stride_wsk
        up_s_ptrs += GROUPS * stride_wsk
    return added_up(gates), added_up(ups)


@triton.jit
def gate_up_fp8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    ids_ptr,
    w_ptr,
    ws_ptr,
    h_ptr,
    E,
    H,
    F,
    top_k,
    stride_xt,
    stride_we,
    stride_wg,
    stride_wse,
    stride_wsk,
    stride_wsg,
    alpha,
    limit,
    up_shift,
    amax_floor,
    HAS_LIMIT: tl.constexpr,
    ROUND_SILU: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_H: tl.constexpr,
    DOT: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    num_columns = tl.cdiv(F, BLOCK_F)
    pair = tl.program_id(0) // num_columns
    first = (tl.program_id(0) % num_columns) * BLOCK_F
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return  # the rows of no expert are not read
    features = first + tl.arange(0, BLOCK_F)
    x_ptr += (pair // top_k).to(tl.int64) * stride_xt
    gate_ptr = w_ptr + expert * stride_we + features.to(tl.int64) * stride_wg
    up_step = F.to(tl.int64) * stride_wg  # from a column of gate to that of up
    # BLOCK_F divides 128, and 128 divides F: a column of scales for gate's features and for up's.
    ws_ptr += expert * stride_wse + (first // GROUP) * stride_wsg
    up_s_step = (F // GROUP) * stride_wsg
    if DOT:
        gate, up = _by_dots(
            x_ptr, gate_ptr, up_step, ws_ptr, up_s_step, stride_wsk, H, amax_floor,
            POWER_OF_TWO, DIVIDE, INTERPRETED, EVEN_H, BLOCK_F, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        gate, up = _by_sums(
            x_ptr, gate_ptr, up_step, ws_ptr, up_s_step, stride_wsk, H, amax_floor,
            POWER_OF_TWO, DIVIDE, INTERPRETED, EVEN_H, FOLD, BLOCK_F, BLOCK_K, STAGES,
        )  # fmt: skip
    dtype = h_ptr.dtype.element_ty
    gate = rounded(gate, dtype, True, INTERPRETED)  # as the product is stored
    up = rounded(up, dtype, True, INTERPRETED)
    h = gated(
        gate, up, alpha, limit, up_shift, dtype, HAS_LIMIT, False, False, ROUND_SILU, INTERPRETED
    )
    tl.store(h_ptr + pair.to(tl.int64) * F + features, h.to(dtype))


def launch_gate_up(
    x_TH: Tensor,
    ids_TK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    h_RF: Tensor,
    gate: Gate,
    quantisation: tuple[float, bool],
    blocks: GateUpBlocks | None = None,
) -> None:
    """Fill h with each pair's row; those of no expert are not written. 128 divides F.

    quantisation: of x, the least amax and whether scales are powers of two.
    """
    (R, F), (E, H, _) = h_RF.shape, w_EHG.shape
    blocks = blocks or choose_gate_up_blocks(F)
    x = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    amax_floor, power_of_two = quantisation
    gate_up_fp8_kernel[(R * (F // blocks.f),)](
        x,
        ids_TK,
        w_EHG,
        w_scale_EKL,
        h_RF,
        E,
        H,
        F,
        ids_TK.shape[1],
        x.stride(0),
        w_EHG.stride(0),
        w_EHG.stride(2),
        *w_scale_EKL.stride(),
        float(gate.alpha),
        0.0 if gate.limit is None else float(gate.limit),
        float(gate.up_shift),
        amax_floor,
        HAS_LIMIT=gate.limit is not None,
        ROUND_SILU=gate.round_silu,
        POWER_OF_TWO=power_of_two,
        DIVIDE=not x.is_cuda or is_division_needed(amax_floor),
        INTERPRETED=not x.is_cuda,
        EVEN_H=H % blocks.k == 0,
        DOT=blocks.dot,
        FOLD=READ_AT_ONCE,
        BLOCK_F=blocks.f,
        BLOCK_K=blocks.k,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x, 2 * R * F * H),
    )
