"""The kernel of `grouped_mm`, and the choice of its blocks.

A tile is up to BLOCK_M rows of one expert. The host knows only how many tiles there can be; each
program finds its own from the offsets on the device, so nothing waits for the router.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Blocks(NamedTuple):
    """Rows, columns and depth of one program, tiles that share L2, and how Triton compiles it."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


def choose_blocks(R: int, E: int, dtype: torch.dtype, h_contiguous: bool) -> Blocks:
    """Blocks for R rows over E experts, from what the host knows without waiting."""
    m = min(128, max(16, triton.next_power_of_2(triton.cdiv(R, E))))
    if dtype == torch.float32:  # true float32 runs on the CUDA cores
        return Blocks(min(m, 64), 64, 32, 8, 4, 3)
    if m == 16:
        return Blocks(16, 32, 128, 1, 4, 5) if h_contiguous else Blocks(16, 64, 64, 1, 4, 5)
    if m < 128:
        return Blocks(m, 128, 64, 4, 4, 4)
    return Blocks(128, 256, 64, 16, 8, 3)


@triton.jit
def _find_tile(  # type: ignore[no-untyped-def]
    offsets_ptr, tile, R, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The expert of a tile, its first row, and where the expert's rows end.

    Expert E stands for the rows of no expert. A tile that does not exist is empty: 0, 0, 0.
    """
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + experts, mask=experts < E, other=R)
    after_first = (experts > 0) & (experts <= E)
    starts = tl.load(offsets_ptr + experts - 1, mask=after_first, other=0)
    starts = tl.where(experts > E, R, starts)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, 0)
    first_tile = last_tile - tiles
    is_mine = (first_tile <= tile) & (tile < last_tile)
    expert = tl.sum(tl.where(is_mine, experts, 0), 0)
    first_row = tl.sum(tl.where(is_mine, starts + (tile - first_tile) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(is_mine, ends, 0), 0)
    return expert, first_row, end


@triton.jit
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
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP neighbouring tiles go over all columns together: tiles of one expert share its weight in
    # L2, and each column block finds the rows of the group there.
    num_columns = tl.cdiv(G, BLOCK_N)
    group = tl.program_id(0) // (GROUP * num_columns)
    place = tl.program_id(0) % (GROUP * num_columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    tile = group * GROUP + place % size
    cols = (place // size) * BLOCK_N + tl.arange(0, BLOCK_N)

    expert, first_row, end = _find_tile(offsets_ptr, tile, R, E, BLOCK_M, BLOCK_E)
    rows = first_row + tl.arange(0, BLOCK_M)
    if first_row >= end:
        return
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * G + cols[None, :]
    y_mask = (rows < end)[:, None] & (cols < G)[None, :]
    if expert == E:
        tl.store(y_ptrs, tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty), mask=y_mask)
        return

    source = rows
    if HAS_ROWS:
        source = tl.load(rows_ptr + rows, mask=rows < end, other=0) // top_k
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * stride_xn + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we
    w_ptrs += k.to(tl.int64)[:, None] * stride_wh + cols.to(tl.int64)[None, :] * stride_wg
    x_mask = (rows < end)[:, None]
    w_mask = (cols < G)[None, :]
    step = tl.full([], BLOCK_K, tl.int64) * stride_wh
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_K):
        if EVEN_H:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (k < H - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < H - start)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += step
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * G + cols, mask=cols < G, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_mask)
