"""The products that `skinny_mm_fp8_kernel` is made of: few rows times a few columns, all of K."""

import triton
import triton.language as tl

from moe_compile.ops._quant_kernel import quantized, to_e4m3
from moe_compile.ops._skinny_mm_sums import along_k, append

GROUP = tl.constexpr(128)  # of x along K that has a scale; of w, in both dims


@triton.jit
def quantised_groups(  # type: ignore[no-untyped-def]
    x,
    dtype,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x [M, K] as `quant_fp8` gives it: [M, K // 128, 128] in dtype, and scales [M, K // 128]."""
    groups = tl.reshape(x.to(tl.float32), [x.shape[0], x.shape[1] // GROUP, GROUP])
    q, scale = quantized(
        groups, amax_floor, 0.0, POWER_OF_TWO, False, False, DIVIDE, INTERPRETED
    )  # fmt: skip
    return to_e4m3(q, dtype, INTERPRETED), scale


@triton.jit
def column(q, scale, ws):  # type: ignore[no-untyped-def]
    """One row q [1, G, 128] times its scales [1, G] and those of a weight [G], as [128 * G, 1].

    A product of whole rows and columns is then exact up to its sums: each value of w is multiplied
    once, and not scaled.
    """
    scaled = q.to(tl.float32) * (scale * ws[None, :])[:, :, None]
    return tl.reshape(scaled, [q.shape[1] * GROUP, 1])


@triton.jit
def folded(x, w, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [K, 1] times w [K, N], a sum of each FOLD neighbours along K, which one thread has read."""
    product = tl.reshape(x * w.to(tl.float32), [w.shape[0] // FOLD, FOLD, w.shape[1]])
    return tl.sum(product, 1)


@triton.jit
def rows_of_sums(  # type: ignore[no-untyped-def]
    x_ptrs,
    xs_ptr,
    norm_ptrs,
    w_ptrs,
    ws_ptr,
    w_mask,
    K,
    stride_xm,
    amax_floor,
    eps,
    NORM: tl.constexpr,
    AHEAD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] without tensor cores: a [BLOCK_N] for each row.

    Rows that are normed meet the norm's weight before they are quantised, in float32, and the rest
    of the norm, which is one factor for the row, after they are added up.
    """
    k = tl.arange(0, BLOCK_K)[:, None]
    groups = tl.arange(0, BLOCK_K // GROUP)
    sums, squares = (), ()
    for _ in tl.static_range(ROWS):
        if NORM:
            squares = append(squares, tl.zeros([BLOCK_K // FOLD, 1], tl.float32))
        sums = append(sums, tl.zeros([BLOCK_K // FOLD, BLOCK_N], tl.float32))
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        # Triton lays products out as what is loaded last: w, of which a thread reads 16 at once.
        xs = ()
        for m in tl.static_range(ROWS):
            if EVEN_K:
                xs = append(xs, tl.load(x_ptrs + m * stride_xm))
            else:
                xs = append(xs, tl.load(x_ptrs + m * stride_xm, mask=k < K - start, other=0.0))
        if NORM:
            norm = along_k(norm_ptrs, k < K - start, EVEN_K)
            norm_ptrs += BLOCK_K
        if EVEN_K:
            ws = tl.load(ws_ptr + groups)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            ws = tl.load(ws_ptr + groups, mask=groups * GROUP < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start), other=0.0)
        added, added_squares = (), ()
        for m in tl.static_range(ROWS):
            if AHEAD:
                q = tl.reshape(xs[m], [1, BLOCK_K // GROUP, GROUP])
                at = xs_ptr + m * tl.cdiv(K, GROUP) + start // GROUP + groups
                scale = tl.load(at, mask=groups * GROUP < K - start, other=0.0)[None, :]
            else:
                x = xs[m]  # type: ignore[var-annotated]
                if NORM:
                    x = x.to(tl.float32)
                    added_squares = append(added_squares, squares[m] + folded(x, x, FOLD))
                    x *= norm
                q, scale = quantised_groups(
                    tl.reshape(x, [1, BLOCK_K]), w_ptrs.dtype.element_ty, amax_floor,
                    POWER_OF_TWO, DIVIDE, INTERPRETED,
                )  # fmt: skip
            scaled = column(q, scale, ws)
            if not EVEN_K:  # nothing over a least amax of 0 is NaN
                scaled = tl.where(k < K - start, scaled, 0.0)
            added = append(added, sums[m] + folded(scaled, w, FOLD))
        sums = added
        if NORM:
            squares = added_squares
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        ws_ptr += BLOCK_K // GROUP
    rows = ()
    for m in tl.static_range(ROWS):
        row = tl.sum(sums[m], 0)
        if NORM:
            row *= tl.rsqrt(tl.sum(squares[m]) / K + eps)
        rows = append(rows, row)
    return rows


@triton.jit
def rows_by_dot(  # type: ignore[no-untyped-def]
    x_ptrs,
    xs_ptrs,
    x_mask,
    w_ptrs,
    ws_ptr,
    w_mask,
    K,
    amax_floor,
    AHEAD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, K] times [K, BLOCK_N] on tensor cores, a group at a time, scaled in float32.

    As float16, which holds every e4m3: in float8 tensor cores keep less of a sum.
    """
    wide: tl.constexpr = tl.float32 if INTERPRETED else tl.float16
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (k < K - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start)[:, None], other=0.0)
        if AHEAD:
            q, scale = x, tl.load(xs_ptrs + start // BLOCK_K, mask=x_mask, other=0.0)
        else:
            q, scale = quantised_groups(
                x, w_ptrs.dtype.element_ty, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED
            )  # fmt: skip
            q = tl.reshape(q, [ROWS, BLOCK_K])
        scale *= tl.load(ws_ptr + start // BLOCK_K)
        acc += tl.dot(q.to(wide), w.to(wide)) * scale
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc
