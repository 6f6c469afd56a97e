"""The kernel of `skinny_mm` and `skinny_mms`, and the choice of its blocks.

A program computes a few columns of one weight for all rows, over all of K: sums that several
programs share would need atomics, whose order, and so the result, changes from run to run. Where
columns are few, a program has more warps instead, which share K.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._tuned_kernels import SKINNY_MM

MOST_ROWS = 16  # as the tensor cores multiply at once
MOST_ROWS_OF_SUMS = 4  # each row has sums of its own in the registers of every thread
MOST_WEIGHTS = 4
SMS = 132  # of an H100 or H200


class Blocks(NamedTuple):
    """Columns and depth of one program, whether on tensor cores, and how Triton compiles it."""

    n: int
    k: int
    dot: bool
    warps: int
    stages: int


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


@triton.jit
def _append(rows, row):  # type: ignore[no-untyped-def]
    return rows + (row,)  # noqa: RUF005 (Triton knows no star here)


@triton.jit
def _rows_of_sums(  # type: ignore[no-untyped-def]
    x_ptrs,
    w_ptrs,
    w_mask,
    K,
    stride_xm,
    w_step,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] without tensor cores: a [BLOCK_N] for each row.

    The rows share what was read of w. Of each FOLD neighbours along K, which one thread has read,
    it keeps one sum. These sums are added up at the end: more exact than one long sum.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = _append(sums, tl.zeros([BLOCK_K // FOLD, BLOCK_N], tl.float32))
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start), other=0.0)
        added = ()
        for m in tl.static_range(ROWS):
            if EVEN_K:
                x = tl.load(x_ptrs + m * stride_xm)
            else:
                x = tl.load(x_ptrs + m * stride_xm, mask=k < K - start, other=0.0)
            product = x.to(tl.float32) * w.to(tl.float32)
            if FOLD > 1:
                product = tl.sum(tl.reshape(product, [BLOCK_K // FOLD, FOLD, BLOCK_N]), 1)
            added = _append(added, sums[m] + product)
        sums = added
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    rows = ()
    for m in tl.static_range(ROWS):
        rows = _append(rows, tl.sum(sums[m], 0))
    return rows


@triton.jit
def _rows_by_dot(  # type: ignore[no-untyped-def]
    x_ptrs,
    x_mask,
    w_ptrs,
    w_mask,
    K,
    w_step,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] on tensor cores, added up in float32."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (k < K - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    return acc


@triton.jit(do_not_specialize=["M"])
def skinny_mm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptrs,
    bias_ptrs,
    y_ptrs,
    Ns,
    bias_Ns,
    strides_w,
    M,
    K,
    stride_xm,
    COUNT: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
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
    if DOT:
        m = tl.arange(0, ROWS)
        x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k[None, :]
        x_mask = (m < M)[:, None]
        y = _rows_by_dot(
            x_ptrs, x_mask, w_ptrs, w_mask, K, w_step, EVEN_K, UPCAST, ROWS, BLOCK_N, BLOCK_K
        )
        y_at = y_ptr + m[:, None] * N + cols[None, :]
        tl.store(y_at, (y + bias[None, :]).to(dtype), mask=x_mask & w_mask)
    else:
        rows = _rows_of_sums(
            x_ptr + k[:, None], w_ptrs, w_mask, K, stride_xm + zero, w_step,
            EVEN_K, ROWS, FOLD, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        for m in tl.static_range(ROWS):
            tl.store(y_ptr + m * N + cols, (rows[m] + bias).to(dtype), mask=cols < N)


def fits(x_MK: Tensor, ws: Sequence[Tensor]) -> bool:
    """Does the kernel take these? Not many rows, nor in float32 those for tensor cores."""
    M, K = x_MK.shape
    most = MOST_ROWS_OF_SUMS if x_MK.dtype == torch.float32 else MOST_ROWS
    agree = any(all(w.stride(dim) == 1 for w in ws) for dim in (0, 1))
    return 0 < M <= most and K > 0 and agree


def launch(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """x times each of the weights, which agree in K and in the dim that is contiguous."""
    M, K = x_MK.shape
    ys = [x_MK.new_empty(M, w.shape[1]) for w in ws]
    Ns = [w.shape[1] for w in ws]
    if sum(Ns) == 0:
        return ys
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    k_contiguous = all(w.stride(0) == 1 for w in ws)
    blocks = blocks or SKINNY_MM.chosen(
        x.device,
        (M if M <= MOST_ROWS_OF_SUMS else MOST_ROWS, x.dtype, k_contiguous),
        (K, *Ns),
        choose_blocks,
        *(M, K, sum(Ns), x.dtype, k_contiguous),
    )
    skinny_mm_kernel[(sum(triton.cdiv(N, blocks.n) for N in Ns),)](
        x,
        tuple(ws),
        tuple(x if bias is None else bias.contiguous() for bias in biases),
        tuple(ys),
        tuple(Ns),
        tuple(0 if bias is None else N for bias, N in zip(biases, Ns, strict=True)),
        tuple(w.stride(1 if k_contiguous else 0) for w in ws),
        M,
        K,
        x.stride(0),
        COUNT=len(ws),
        K_CONTIGUOUS=k_contiguous,
        HAS_BIAS=any(bias is not None for bias in biases),
        EVEN_K=K % blocks.k == 0,
        UPCAST=not x.is_cuda,  # only the interpreter runs on the CPU; its bfloat16 dot is wrong
        DOT=blocks.dot,
        ROWS=MOST_ROWS if blocks.dot else M,
        # What a thread reads at once: 16 bytes.
        FOLD=16 // x.dtype.itemsize if k_contiguous else 1,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x, sum(w.nbytes for w in ws)),
    )
    return ys
