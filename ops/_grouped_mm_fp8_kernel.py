"""The kernel of `grouped_mm_fp8` and `linear_fp8`.

Tiles as in `grouped_mm`. The product of each group along K is added up by itself, scaled in float32
and added to the rest: so sums in the tensor cores stay short, and every scale is applied once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._grouped_mm_blocks import Blocks, choose_blocks_fp8, swaps
from moe_compile.ops._grouped_mm_kernel import Gate, columns_of_w, find_tile, gated_pairs
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._tuned_kernels import GROUPED_MM_FP8


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x_ptrs,
    xs_ptr,
    w_ptrs,
    ws_ptrs,
    w_mask,
    H,
    stride_xsg,
    stride_wsk,
    EVEN_H: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    k = tl.arange(0, GROUP_K)[:, None]
    sums = tl.zeros([GROUP_K, BLOCK_N], tl.float32)
    for start in tl.range(0, H, GROUP_K, num_stages=STAGES):
        if EVEN_H:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs + start, mask=k < H - start, other=0.0)
            w = tl.load(w_ptrs + start, mask=w_mask & (k < H - start), other=0.0)
        scale = tl.load(xs_ptr + (start // GROUP_K) * stride_xsg)
        scale = scale * tl.load(ws_ptrs + (start // 128) * stride_wsk)
        sums += x.to(tl.float32) * w.to(tl.float32) * scale[None, :]
    return tl.sum(sums, 0)


@triton.jit
def _many_rows(  # type: ignore[no-untyped-def]
    x_ptrs,
    xs_ptrs,
    row_mask,
    w_ptrs,
    ws_ptr,
    ws_gate,
    w_mask,
    H,
    stride_xsg,
    stride_wsk,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    GATE: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With a gate, columns of gate and up take turns, and up's scales are ws_gate behind gate's.

    SWAP: see `swaps`.
    """
    k = tl.arange(0, GROUP_K)
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    elif GATE:
        acc = tl.zeros([BLOCK_M, BLOCK_N // 2, 2], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, GROUP_K):
        if EVEN_H:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=row_mask[:, None] & (k < H - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < H - start)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        scale = tl.load(xs_ptrs + (start // GROUP_K) * stride_xsg, mask=row_mask, other=0.0)
        if SWAP:
            if GATE:
                ws_ptrs = ws_ptr + (start // 128) * stride_wsk + tl.arange(0, BLOCK_N) % 2 * ws_gate
                ws = tl.load(ws_ptrs)[:, None]
            else:
                ws = tl.load(ws_ptr + (start // 128) * stride_wsk)
            acc += tl.dot(tl.trans(w), tl.trans(x)) * (ws * scale[None, :])
        elif GATE:
            ws_ptrs = ws_ptr + (start // 128) * stride_wsk + tl.arange(0, 2) * ws_gate
            scale_of_pair = scale[:, None] * tl.load(ws_ptrs)[None, :]
            acc += tl.reshape(tl.dot(x, w), acc.shape) * scale_of_pair[:, None, :]
        else:
            scale *= tl.load(ws_ptr + (start // 128) * stride_wsk)
            acc += tl.dot(x, w) * scale[:, None]
        x_ptrs += GROUP_K
        w_ptrs += GROUP_K
    return tl.trans(acc) if SWAP else tl.reshape(acc, [BLOCK_M, BLOCK_N])


@triton.jit(do_not_specialize=["R", "num_tiles"])
def grouped_mm_fp8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    xs_ptr,
    w_ptr,
    ws_ptr,
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
    stride_xsn,
    stride_xsg,
    stride_we,
    stride_wg,
    stride_wse,
    stride_wsk,
    stride_wsg,
    alpha,
    limit,
    up_shift,
    DENSE: tl.constexpr,
    DIRECT: tl.constexpr,
    GATE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ROUND_SILU: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    UPCAST: tl.constexpr,
    SWAP: tl.constexpr,
    GROUP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    num_columns = tl.cdiv(G, BLOCK_N)
    group = tl.program_id(0) // (GROUP * num_columns)
    place = tl.program_id(0) % (GROUP * num_columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    tile = group * GROUP + place % size
    column = (place // size) * BLOCK_N
    cols = columns_of_w(column, G, GATE, BLOCK_N)

    if DENSE:
        expert, first_row, end = 0, tile * BLOCK_M, R
    elif DIRECT:  # each row is a tile, and offsets are the rows' experts themselves
        expert, first_row, end = tl.load(offsets_ptr + tile).to(tl.int32), tile, tile + 1
        if (expert < 0) | (expert >= E):
            return
    else:
        expert, first_row, end = find_tile(offsets_ptr, tile, R, E, BLOCK_M, BLOCK_E)
    rows = first_row + tl.arange(0, BLOCK_M)
    if first_row >= end:
        return
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATE else BLOCK_N
    dtype = y_ptr.dtype.element_ty
    F = G // 2 if GATE else G
    column = column // 2 if GATE else column
    features = column + tl.arange(0, BLOCK_F)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * F + features[None, :]
    y_mask = (rows < end)[:, None] & (features < F)[None, :]
    if expert == E:
        tl.store(y_ptrs, tl.zeros([BLOCK_M, BLOCK_F], dtype), mask=y_mask)
        return

    source = rows
    if DIRECT:
        source = tl.where(rows < end, rows, 0) // top_k
    elif HAS_ROWS:
        source = tl.load(rows_ptr + rows, mask=rows < end, other=0) // top_k
    source = source.to(tl.int64)
    k = tl.arange(0, GROUP_K)
    w_ptrs = w_ptr + tl.cast(expert, tl.int64) * stride_we
    w_ptrs += k[:, None] + cols.to(tl.int64)[None, :] * stride_wg
    w_mask = (cols < G)[None, :]
    # A tile's features are a part of 128: one column of weight scales, or one of gate and of up.
    ws_gate = (F // 128) * stride_wsg
    ws_ptr += tl.cast(expert, tl.int64) * stride_wse + (column // 128) * stride_wsg
    if BLOCK_M == 1:
        row = tl.max(source, 0)
        ws_ptrs = (
            ws_ptr + (tl.arange(0, BLOCK_N) % 2 if GATE else tl.zeros([1], tl.int32)) * ws_gate
        )
        acc = _one_row(
            x_ptr + row * stride_xn + k[:, None], xs_ptr + row * stride_xsn, w_ptrs, ws_ptrs,
            w_mask, H, stride_xsg, stride_wsk, EVEN_H, GROUP_K, BLOCK_N, STAGES,
        )[None, :]  # fmt: skip
    else:
        acc = _many_rows(
            x_ptr + source[:, None] * stride_xn + k[None, :], xs_ptr + source * stride_xsn,
            rows < end, w_ptrs, ws_ptr, ws_gate, w_mask, H, stride_xsg, stride_wsk,
            EVEN_H, UPCAST, GATE, SWAP, GROUP_K, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.cast(expert, tl.int64) * G + cols, mask=cols < G, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATE:
        acc = gated_pairs(acc, alpha, limit, up_shift, dtype, HAS_LIMIT, ROUND_SILU, UPCAST)
    tl.store(y_ptrs, acc.to(dtype), mask=y_mask)


def launch(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    y_RG: Tensor,
    offsets_E: Tensor | None,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    gate: Gate | None = None,
    blocks: Blocks | None = None,
    direct: bool = False,
) -> None:
    """Fill y; without offsets all rows are the one expert's. w is contiguous along H.

    With a gate y is [R, F], and its halves lie in w. direct: offsets are the rows' experts, row r
    is that of x[r // top_k]; rows of no expert are not written.
    """
    R, (E, H, G) = y_RG.shape[0], w_EHG.shape
    if y_RG.numel() == 0:
        return
    x_NH = x_NH if x_NH.stride(1) == 1 else x_NH.contiguous()
    group_k = group_of_scales(H, x_scale_NK)
    top = 0 if rows_R is None else top_k
    blocks = blocks or GROUPED_MM_FP8.chosen(
        x_NH.device,
        (y_RG.dtype, group_k, gate is not None, top, offsets_E is None),
        (R, E, H, G),
        choose_blocks_fp8,
        *(R, E, H, G),
    )
    num_tiles = R if direct else R // blocks.m + (min(R, E + 1) if blocks.m > 1 else 0)
    if offsets_E is None:
        num_tiles = triton.cdiv(R, blocks.m)
    limit = None if gate is None else gate.limit
    grouped_mm_fp8_kernel[(num_tiles * triton.cdiv(G, blocks.n),)](
        x_NH,
        x_scale_NK,
        w_EHG,
        w_scale_EKL,
        offsets_E if offsets_E is None else offsets_E.contiguous(),
        rows_R if rows_R is None else rows_R.contiguous(),
        bias_EG if bias_EG is None else bias_EG.contiguous(),
        y_RG,
        R,
        E,
        H,
        G,
        top_k,
        num_tiles,
        x_NH.stride(0),
        *x_scale_NK.stride(),
        w_EHG.stride(0),
        w_EHG.stride(2),
        *w_scale_EKL.stride(),
        1.0 if gate is None else float(gate.alpha),
        0.0 if limit is None else float(limit),
        0.0 if gate is None else float(gate.up_shift),
        DENSE=offsets_E is None,
        DIRECT=direct,
        GATE=int(gate is not None),
        HAS_LIMIT=limit is not None,
        ROUND_SILU=gate is not None and gate.round_silu,
        HAS_ROWS=rows_R is not None,
        HAS_BIAS=bias_EG is not None,
        EVEN_H=H % group_k == 0,
        UPCAST=not x_NH.is_cuda,  # only the interpreter runs on the CPU
        SWAP=swaps(blocks, w_EHG),
        GROUP_K=group_k,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_E=triton.next_power_of_2(E),
        GROUP=blocks.group,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x_NH, min(R, E) * H * G),
    )


def group_of_scales(H: int, x_scale_NK: Tensor) -> int:
    """64 or 128 columns of x that share a scale; 0 if the scales are of neither."""
    K = x_scale_NK.shape[1]
    return next((g for g in (128, 64) if (H + g - 1) // g == K), 0)


def dequantize(x: Tensor, scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """x [.., A, B] times the scale of each block of rows x cols."""
    A, B = x.shape[-2:]
    each = scale.to(dtype).repeat_interleave(rows, -2)[..., :A, :]
    return x.to(dtype) * each.repeat_interleave(cols, -1)[..., :B]
