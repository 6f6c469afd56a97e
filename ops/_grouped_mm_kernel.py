"""The kernel of `grouped_mm`.

A tile is up to BLOCK_M rows of one expert. The host knows only how many tiles there can be; each
program finds its own from the offsets on the device, so nothing waits for the router.

With a gate (`grouped_mm_silu_mul`), a tile's columns of w are pairs of gate and up, side by side:
so they stand in w itself (interleaved), or so their addresses are chosen. A thread then holds both
of a pair when the product is done, and no copy of the weight is made.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import gated, rounded
from moe_compile.ops._grouped_mm_blocks import Blocks, choose_blocks, swaps
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._tuned_kernels import GROUPED_MM


@triton.jit
def find_tile(  # type: ignore[no-untyped-def]
    offsets_ptr, tile, R, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The expert of a tile, its first row, and where the expert's rows end.

    The tiles after all experts' are those of the rows of no expert, E; one past these is empty.
    """
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, 0)
    first_tile = last_tile - tiles
    is_mine = (first_tile <= tile) & (tile < last_tile)
    rows = starts + (tile - first_tile) * BLOCK_M
    # One reduction for both numbers: each costs barriers that decoding waits for.
    mine = tl.max(tl.where(is_mine, (experts.to(tl.int64) << 32) | rows.to(tl.int64), -1), 0)
    if mine >= 0:
        expert = (mine >> 32).to(tl.int32)
        first_row = (mine & 0x7FFFFFFF).to(tl.int32)
        end = tl.load(offsets_ptr + expert)
    else:
        expert = E
        first_row = tl.max(ends, 0) + (tile - tl.max(last_tile, 0)) * BLOCK_M
        end = R
    return expert, first_row, end


@triton.jit
def one_row(  # type: ignore[no-untyped-def]
    x_ptrs,
    w_ptrs,
    w_mask,
    H,
    w_step,
    EVEN_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[H] times [H, BLOCK_N] without tensor cores, which would multiply 15 rows of nothing.

    A sum for every element of a block, added up at the end: more exact than one long sum.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        if EVEN_H:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=k < H - start, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < H - start), other=0.0)
        sums += x.to(tl.float32) * w.to(tl.float32)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    return tl.sum(sums, 0)


@triton.jit
def _many_rows(  # type: ignore[no-untyped-def]
    x_ptrs,
    x_mask,
    w_ptrs,
    w_mask,
    H,
    w_step,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPENSATE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, H] times [H, BLOCK_N], added up in float32. SWAP: see `swaps`."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    lost = tl.zeros([BLOCK_M, BLOCK_N] if COMPENSATE else [1, 1], tl.float32)
    for start in range(0, H, BLOCK_K):
        if EVEN_H:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (k < H - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < H - start)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if COMPENSATE:  # Kahan: one long float32 sum would err more than cuBLAS's split ones
            part = tl.dot(x, w, input_precision="ieee") - lost
            total = acc + part
            lost = (total - acc) - part
            acc = total
        elif SWAP:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc)
        else:
            acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    return tl.trans(acc) if SWAP else acc


# Arguments that change with the number of tokens are not specialised on: it would compile again.
@triton.jit(do_not_specialize=["R", "num_tiles"])
def grouped_mm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    offsets_ptr,
    rows_ptr,
    bias_ptr,
    y_ptr,
    R,
    E,
    H,
    G,
    top_k,
    num_tiles,
    stride_xn,
    stride_we,
    stride_wh,
    stride_wg,
    alpha,
    limit,
    up_shift,
    DIRECT: tl.constexpr,
    GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    COMPENSATE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    # GROUP neighbouring tiles go over all columns together: tiles of one expert share its weight in
    # L2, and each column block finds the rows of the group there.
    num_columns = tl.cdiv(G, BLOCK_N)
    group = tl.program_id(0) // (GROUP * num_columns)
    place = tl.program_id(0) % (GROUP * num_columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    tile = group * GROUP + place % size
    column = (place // size) * BLOCK_N
    cols = columns_of_w(column, G, GATE, BLOCK_N)

    if DIRECT:  # each row is a tile, and offsets are the rows' experts themselves
        expert, first_row, end = tl.load(offsets_ptr + tile).to(tl.int32), tile, tile + 1
        if (expert < 0) | (expert >= E):
            return
    else:
        expert, first_row, end = find_tile(offsets_ptr, tile, R, E, BLOCK_M, BLOCK_E)
    rows = first_row + tl.arange(0, BLOCK_M)
    if first_row >= end:
        return
    dtype = y_ptr.dtype.element_ty
    BLOCK_F: tl.constexpr = BLOCK_N if GATE == 0 else BLOCK_N // 2
    F = G if GATE == 0 else G // 2
    features = (column if GATE == 0 else column // 2) + tl.arange(0, BLOCK_F)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * F + features[None, :]
    y_mask = (rows < end)[:, None] & (features < F)[None, :]
    if expert == E:
        tl.store(y_ptrs, tl.zeros([BLOCK_M, BLOCK_F], dtype), mask=y_mask)
        return

    source = rows
    if DIRECT:
        source = rows // top_k
    elif HAS_ROWS:
        source = tl.load(rows_ptr + rows, mask=rows < end, other=0) // top_k
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we
    w_ptrs += k.to(tl.int64)[:, None] * stride_wh + cols.to(tl.int64)[None, :] * stride_wg
    w_mask = (cols < G)[None, :]
    w_step = tl.full([], BLOCK_K, tl.int64) * stride_wh
    if BLOCK_M == 1:
        x_ptrs = x_ptr + tl.max(source, 0).to(tl.int64) * stride_xn + k[:, None]
        acc = one_row(x_ptrs, w_ptrs, w_mask, H, w_step, EVEN_H, BLOCK_N, BLOCK_K, STAGES)
        acc = acc[None, :]
    else:
        x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xn + k[None, :]
        x_mask = (rows < end)[:, None]
        acc = _many_rows(
            x_ptrs, x_mask, w_ptrs, w_mask, H, w_step,
            EVEN_H, UPCAST, COMPENSATE, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * G + cols, mask=cols < G, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATE != 0:
        acc = gated_pairs(acc, alpha, limit, up_shift, dtype, HAS_LIMIT, False, UPCAST)
    tl.store(y_ptrs, acc.to(dtype), mask=y_mask)


@triton.jit
def columns_of_w(column, G, GATE: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns of a tile that begins with `column`; past G where there are no more."""
    cols = column + tl.arange(0, BLOCK_N)
    if GATE == 1:  # halves: gate and up in turn
        cols = tl.where(cols < G, cols // 2 + (cols % 2) * (G // 2), G)
    return cols


@triton.jit
def gated_pairs(  # type: ignore[no-untyped-def]
    acc,
    alpha,
    limit,
    up_shift,
    dtype,
    HAS_LIMIT: tl.constexpr,
    ROUND_SILU: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """[M, 2F] of gate and up in turn -> [M, F], from what the product would have been stored as."""
    pairs = tl.reshape(rounded(acc, dtype, True, INTERPRETED), [acc.shape[0], acc.shape[1] // 2, 2])
    gate, up = tl.split(pairs)
    return gated(
        gate, up, alpha, limit, up_shift, dtype, HAS_LIMIT, False, False, ROUND_SILU, INTERPRETED
    )


class Gate(NamedTuple):
    """The attributes of silu_mul, for a product that ends with it."""

    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_shift: float = 0.0
    round_silu: bool = False


def launch(
    x_NH: Tensor,
    w_EHG: Tensor,
    y_RG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None,
    top_k: int,
    bias_EG: Tensor | None,
    gate: Gate | None = None,
    blocks: Blocks | None = None,
    direct: bool = False,
) -> None:
    """Fill y: one program for BLOCK_M rows of one expert and BLOCK_N columns of w.

    direct: offsets are the rows' experts, row r is that of x[r // top_k], blocks have one row; rows
        of no expert are not written.
    """
    R, (E, H, G) = y_RG.shape[0], w_EHG.shape
    if y_RG.numel() == 0:
        return
    x_NH = x_NH if x_NH.stride(1) == 1 else x_NH.contiguous()
    gating = 0 if gate is None else 2 if gate.interleaved else 1
    h_contiguous = w_EHG.stride(1) == 1
    kind = (x_NH.dtype, h_contiguous, gating, 0 if rows_R is None else top_k)
    model = (choose_blocks, R, E, H, x_NH.dtype, h_contiguous)
    blocks = blocks or GROUPED_MM.chosen(x_NH.device, kind, (R, E, H, G), *model)
    # E experts and the rows of none are E + 1 groups; each group that is not empty adds at most one
    # tile that is not full.
    num_tiles = R // blocks.m + (min(R, E + 1) if blocks.m > 1 else 0)
    limit = None if gate is None else gate.limit
    grouped_mm_kernel[(num_tiles * triton.cdiv(G, blocks.n),)](
        x_NH,
        w_EHG,
        offsets_E.contiguous(),
        offsets_E if rows_R is None else rows_R.contiguous(),
        x_NH if bias_EG is None else bias_EG.contiguous(),
        y_RG,
        R,
        E,
        H,
        G,
        top_k,
        num_tiles,
        x_NH.stride(0),
        *w_EHG.stride(),
        1.0 if gate is None else float(gate.alpha),
        0.0 if limit is None else float(limit),
        0.0 if gate is None else float(gate.up_shift),
        DIRECT=direct,
        GATE=gating,
        HAS_LIMIT=limit is not None,
        HAS_ROWS=rows_R is not None,
        HAS_BIAS=bias_EG is not None,
        EVEN_H=H % blocks.k == 0,
        UPCAST=not x_NH.is_cuda,  # only the interpreter runs on the CPU; its bfloat16 dot is wrong
        COMPENSATE=x_NH.dtype == torch.float32,
        SWAP=swaps(blocks, w_EHG),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        BLOCK_E=triton.next_power_of_2(E),
        GROUP=blocks.group,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x_NH, min(R, E) * H * G * w_EHG.element_size()),
    )
