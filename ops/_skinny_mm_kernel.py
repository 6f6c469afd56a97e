"""The kernel of `skinny_mm`, `skinny_mms` and `rms_norm_mms`, and the choice of its blocks.

A program computes a few columns of one weight for all rows, over all of K: sums that several
programs share would need atomics, whose order, and so the result, changes from run to run. Where
columns are few, a program has more warps instead, which share K.

So each program reads whole rows of x, and can norm them as it does: it adds up their squares beside
their products (`_skinny_mm_sums.py`), and scales the sums by what the squares say at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import rounded
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._skinny_mm_sums import append, rows_by_dot, rows_of_sums
from moe_compile.ops._tuned_kernels import SKINNY_MM

MOST_ROWS = 16  # as the tensor cores multiply at once
MOST_ROWS_OF_SUMS = 4  # each row has sums of its own in the registers of every thread
MOST_WEIGHTS = 4
LEAST_PART = 32  # of the normed rows, for one program to store
MOST_KEPT = 4096  # elements of all rows that a program holds meanwhile, 32 a thread
SMS = 132  # of an H100 or H200


class Blocks(NamedTuple):
    """Columns and depth of one program, whether on tensor cores, and how Triton compiles it."""

    n: int
    k: int
    dot: bool
    warps: int
    stages: int


class Norm(NamedTuple):
    """The RMSNorm of the rows before the product; see `rms_norm_mms`."""

    weight: Tensor
    eps: float
    round_first: bool
    keep: bool


def choose_blocks(M: int, K: int, N: int, dtype: torch.dtype, k_contiguous: bool) -> Blocks:
    """Blocks for M rows times weights of K by N, which is the sum of the columns of all.

    An SM reads at full speed with some 32 KB on the way. So there are two programs for each SM or
    more, as far as columns allow it, and each asks for (stages - 1) blocks of 4 to 16 KB ahead.
    Stages come by way of shared memory: ptxas orders plain loads to save registers, so that no more
    than three of a thread are on the way, whatever the block.
    """
    n = 1 << max(0, (N // (2 * SMS)).bit_length() - 1)  # the widest for two programs an SM
    if M > MOST_ROWS_OF_SUMS:
        return _on_tensor_cores(n, k_contiguous)
    if not k_contiguous:
        n = min(64, max(16, n))  # 128 to 32 bytes of a row of w
        return Blocks(n, 2048 // n, False, 4, 4)
    # A warp reads 512 bytes of a column at once. Warps side by side along K read x once, and need
    # not exchange it. One H200, 2026-11-22, sweep_skinny_mm.py, one row, us (weights were
    # prefetched to L2 then, which they are not any more): q, k and v of Qwen3-30B-A3B with
    # (4, 1024) 7.7, (8, 512) 10.0, torch 21.9; o with (4, 2048) 6.6, (4, 1024) 8.7, torch 9.0;
    # router with (2, 1024) 1.3, (1, 2048) 1.6, torch 5.3.
    n = max(2, min(n, 4))
    warps = 4 if K < 4096 else 8
    lane = 512 // dtype.itemsize
    while warps > 1 and lane * warps >= 2 * K:
        warps //= 2
    return Blocks(n, lane * warps, False, warps, 4)


def _on_tensor_cores(n: int, k_contiguous: bool) -> Blocks:
    if not k_contiguous:
        n = min(64, max(16, n))
        return Blocks(n, 64, True, 4, 4)
    if n < 16:  # one warp would do for the product, but four ask for more at a time
        return Blocks(8, 256, True, 4, 4)
    return Blocks(16, 256, True, 2, 4) if n == 16 else Blocks(32, 128, True, 4, 4)


@triton.jit(do_not_specialize=["M"])
def skinny_mm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    w_ptrs,
    bias_ptrs,
    residual_ptr,
    y_ptrs,
    normed_ptr,
    Ns,
    bias_Ns,
    strides_w,
    M,
    K,
    stride_xm,
    eps,
    COUNT: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    PART: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_UP: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # The programs of a weight come after those of the weights before it.
    program = tl.program_id(0)
    zero = tl.full([], 0, tl.int64)  # makes a tensor of what Triton knows to be 1
    w_ptr, bias_ptr, y_ptr = w_ptrs[0], bias_ptrs[0], y_ptrs[0]
    N, bias_N, stride_w, first = Ns[0] + zero, bias_Ns[0] + zero, strides_w[0] + zero, zero
    end = tl.cdiv(N, BLOCK_N)
    for i in tl.static_range(1, COUNT):
        if program >= end:
            w_ptr, bias_ptr, y_ptr = w_ptrs[i], bias_ptrs[i], y_ptrs[i]
            N, bias_N, stride_w, first = Ns[i] + zero, bias_Ns[i] + zero, strides_w[i] + zero, end
        end += tl.cdiv(Ns[i] + zero, BLOCK_N)

    cols = (program - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dtype = y_ptr.dtype.element_ty
    if K_CONTIGUOUS:
        w_ptrs = w_ptr + k[:, None] + cols[None, :] * stride_w
        w_step = zero + BLOCK_K
    else:
        w_ptrs = w_ptr + k[:, None] * stride_w + cols[None, :]
        w_step = stride_w * BLOCK_K
    w_mask = (cols < N)[None, :]
    wait_for_previous(PDL)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < bias_N, other=0.0).to(tl.float32)
    m_up = tl.arange(0, ROWS_UP)
    if PART:  # of all normed rows each program stores a part
        at = program * PART + tl.arange(0, PART)
        at_mask = (m_up < M)[:, None] & (at < K)[None, :]
        part = tl.load(x_ptr + m_up[:, None] * (stride_xm + zero) + at[None, :], mask=at_mask)
        weight = tl.load(norm_ptr + at, mask=at < K)
    if DOT:
        y_at = m_up[:, None] * N + cols[None, :]
        x_mask = (m_up < M)[:, None]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + y_at, mask=x_mask & w_mask)
        y, squares = rows_by_dot(
            x_ptr + m_up[:, None] * (stride_xm + zero) + k[None, :], x_mask, norm_ptr + k,
            w_ptrs, w_mask, K, w_step, NORM, EVEN_K, UPCAST, ROWS, FOLD, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if NORM:
            scale = tl.rsqrt(squares / K + eps)
            y *= scale[:, None]
        y = rounded(y + bias[None, :], dtype, True, UPCAST)
        if HAS_RESIDUAL:
            y = rounded(y + residual.to(tl.float32), dtype, True, UPCAST)
        tl.store(y_ptr + y_at, y.to(dtype), mask=x_mask & w_mask)
    else:
        if HAS_RESIDUAL:
            residuals = ()
            for m in tl.static_range(ROWS):
                residual = tl.load(residual_ptr + m * N + cols, mask=cols < N)
                residuals = append(residuals, residual.to(tl.float32))
        rows, squares = rows_of_sums(
            x_ptr + k[:, None], norm_ptr + k[:, None], w_ptrs, w_mask, K, stride_xm + zero, w_step,
            NORM, EVEN_K, ROWS, FOLD, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        if NORM:
            scale = tl.zeros([ROWS_UP], tl.float32)
        for m in tl.static_range(ROWS):
            y = rows[m]
            if NORM:
                row_scale = tl.rsqrt(squares[m] / K + eps)
                scale = tl.where(m_up == m, row_scale, scale)
                y *= row_scale
            y = rounded(y + bias, dtype, True, UPCAST)
            if HAS_RESIDUAL:
                y = rounded(y + residuals[m], dtype, True, UPCAST)
            tl.store(y_ptr + m * N + cols, y.to(dtype), mask=cols < N)
    if PART:
        normed = rounded(part.to(tl.float32) * scale[:, None], dtype, ROUND_FIRST, UPCAST)
        normed = rounded(normed * weight.to(tl.float32)[None, :], dtype, True, UPCAST)
        tl.store(normed_ptr + m_up[:, None] * K + at[None, :], normed.to(dtype), mask=at_mask)


def most_rows(dtype: torch.dtype, norm: bool = False) -> int:
    """In float32 none for tensor cores; in float16 neither where x * norm weight may overflow."""
    few = (torch.float32, torch.float16) if norm else (torch.float32,)
    return MOST_ROWS_OF_SUMS if dtype in few else MOST_ROWS


def fits(x_MK: Tensor, ws: Sequence[Tensor], norm: bool = False) -> bool:
    """Does the kernel take these?"""
    M, K = x_MK.shape
    agree = any(all(w.stride(dim) == 1 for w in ws) for dim in (0, 1))
    return 0 < M <= most_rows(x_MK.dtype, norm) and K > 0 and agree


def can_keep(x_MK: Tensor, ws: Sequence[Tensor]) -> bool:
    """Are the programs so many that each can store its part of the normed rows?"""
    blocks = _blocks_for(x_MK, ws, norm=True)
    if _programs(ws, blocks) == 0:
        return False
    rows: int = triton.next_power_of_2(MOST_ROWS if blocks.dot else x_MK.shape[0])
    return rows * _part(x_MK.shape[1], ws, blocks) <= MOST_KEPT


def _blocks_for(x_MK: Tensor, ws: Sequence[Tensor], norm: bool) -> Blocks:
    (M, K), columns = x_MK.shape, sum(w.shape[1] for w in ws)
    k_contiguous = all(w.stride(0) == 1 for w in ws)
    given = (M, K, columns, x_MK.dtype, k_contiguous)
    if not norm:
        rows = M if M <= MOST_ROWS_OF_SUMS else MOST_ROWS
        kind, sizes = (rows, x_MK.dtype, k_contiguous), (K, *(w.shape[1] for w in ws))
        return SKINNY_MM.chosen(x_MK.device, kind, sizes, choose_blocks, *given)
    blocks = choose_blocks(*given)
    if blocks.dot and k_contiguous and blocks.k < 64 * blocks.warps:
        # Triton makes stages of a load, here of the norm's weight, from 4 bytes a thread on.
        return blocks._replace(k=64 * blocks.warps, stages=3)
    return blocks


def _programs(ws: Sequence[Tensor], blocks: Blocks) -> int:
    return sum(triton.cdiv(w.shape[1], blocks.n) for w in ws)


def _part(K: int, ws: Sequence[Tensor], blocks: Blocks) -> int:
    """Features of the normed rows for each program to store."""
    part: int = triton.next_power_of_2(triton.cdiv(K, _programs(ws, blocks)))
    return max(LEAST_PART, part)


def launch(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    blocks: Blocks | None = None,
    residual_MN: Tensor | None = None,
    norm: Norm | None = None,
) -> list[Tensor]:
    """x times each of the weights, which agree in K and in the dim that is contiguous.

    residual: added to the product with a single weight.
    norm: of x before; the normed rows, where kept, come last.
    """
    M, K = x_MK.shape
    Ns = [w.shape[1] for w in ws]
    ys = [x_MK.new_empty(M, N) for N in Ns]
    if sum(Ns) == 0:
        return ys
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    blocks = blocks or _blocks_for(x, ws, norm is not None)
    k_contiguous = all(w.stride(0) == 1 for w in ws)
    normed = x.new_empty(M, K) if norm and norm.keep else None
    rows = MOST_ROWS if blocks.dot else M
    skinny_mm_kernel[(_programs(ws, blocks),)](
        x,
        norm.weight.contiguous() if norm else x,
        tuple(ws),
        tuple(x if bias is None else bias.contiguous() for bias in biases),
        None if residual_MN is None else residual_MN.contiguous(),
        tuple(ys),
        normed,
        tuple(Ns),
        tuple(0 if bias is None else N for bias, N in zip(biases, Ns, strict=True)),
        tuple(w.stride(1 if k_contiguous else 0) for w in ws),
        M,
        K,
        x.stride(0),
        norm.eps if norm else 0.0,
        COUNT=len(ws),
        K_CONTIGUOUS=k_contiguous,
        HAS_BIAS=any(bias is not None for bias in biases),
        HAS_RESIDUAL=residual_MN is not None,
        NORM=norm is not None,
        ROUND_FIRST=norm is not None and norm.round_first,
        PART=0 if normed is None else _part(K, ws, blocks),
        EVEN_K=K % blocks.k == 0,
        UPCAST=not x.is_cuda,  # only the interpreter runs on the CPU; its bfloat16 dot is wrong
        DOT=blocks.dot,
        ROWS=rows,
        ROWS_UP=triton.next_power_of_2(rows),
        # What a thread reads at once: 16 bytes.
        FOLD=16 // x.dtype.itemsize if k_contiguous or blocks.dot else 1,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x, sum(w.nbytes for w in ws)),
    )
    return ys if normed is None else [*ys, normed]
