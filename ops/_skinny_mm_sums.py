"""The products that `skinny_mm_kernel` is made of: few rows times a few columns, over all of K.

Rows that are to be normed meet the norm's weight as they are read, and their squares are added up:
what is left is one factor for each row's sums.
"""

import triton
import triton.language as tl

from moe_compile.ops._gated import rounded


@triton.jit
def append(rows, row):  # type: ignore[no-untyped-def]
    return rows + (row,)  # noqa: RUF005 (Triton knows no star here)


@triton.jit
def folded(x, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each FOLD neighbours along K, which one thread has read, the sum."""
    if FOLD > 1:
        x = tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD, x.shape[1]]), 1)
    return x


@triton.jit
def along_k(ptrs, is_left, EVEN_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of K, or what is left of it, in float32."""
    x = tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=is_left, other=0.0)
    return x.to(tl.float32)


@triton.jit
def rows_of_sums(  # type: ignore[no-untyped-def]
    x_ptrs,
    norm_ptrs,
    w_ptrs,
    w_mask,
    K,
    stride_xm,
    w_step,
    NORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] without tensor cores: a [BLOCK_N] for each row, and for each
    the sum of its squares where it is normed.

    The rows share what was read of w. Of each FOLD neighbours along K a thread keeps one sum. These
    sums are added up at the end: more exact than one long sum.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    sums, squares = (), ()
    for _ in tl.static_range(ROWS):
        sums = append(sums, tl.zeros([BLOCK_K // FOLD, BLOCK_N], tl.float32))
        squares = append(squares, tl.zeros([BLOCK_K // FOLD, 1], tl.float32))
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start), other=0.0)
        if NORM:
            norm = along_k(norm_ptrs, k < K - start, EVEN_K)
            norm_ptrs += BLOCK_K
        added, added_squares = (), ()
        for m in tl.static_range(ROWS):
            x = along_k(x_ptrs + m * stride_xm, k < K - start, EVEN_K)
            if NORM:
                added_squares = append(added_squares, squares[m] + folded(x * x, FOLD))
                x *= norm
            added = append(added, sums[m] + folded(x * w.to(tl.float32), FOLD))
        sums = added
        if NORM:
            squares = added_squares
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    rows, totals = (), ()
    for m in tl.static_range(ROWS):
        rows = append(rows, tl.sum(sums[m], 0))
        totals = append(totals, tl.sum(squares[m]))
    return rows, totals


@triton.jit
def rows_by_dot(  # type: ignore[no-untyped-def]
    x_ptrs,
    x_mask,
    norm_ptrs,
    w_ptrs,
    w_mask,
    K,
    w_step,
    NORM: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] on tensor cores, added up in float32, and the sums of squares
    of the rows where they are normed."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_K // FOLD], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (k < K - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start)[:, None], other=0.0)
        if NORM:
            norm = along_k(norm_ptrs, k < K - start, EVEN_K)
            norm_ptrs += BLOCK_K
            wide = x.to(tl.float32)
            squares += tl.sum(tl.reshape(wide * wide, [ROWS, BLOCK_K // FOLD, FOLD]), 2)
            x = rounded(wide * norm[None, :], w.dtype, True, UPCAST).to(w.dtype)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    return acc, tl.sum(squares, 1)
