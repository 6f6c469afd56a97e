"""A row times a few columns on tensor cores: each group of 128 along K is a product by itself.

The groups are a dim of the product, along which Triton lays the warps: each has groups of its own.
The weight's columns are the left side, as it is stored; the fewest columns that the right side has
are all the one row. As float16, which holds every e4m3, and added up in float32: so a value of w is
half a conversion and an eighth of an instruction of the tensor cores, where CUDA cores would take a
conversion and a half, and a multiplication. For sm_90 with 16 columns of gate and of up a thread
takes 1.7 instructions for each value in all, and 3.9 by sums.

The row is read a step ahead, into registers. Triton would keep it in shared memory and quantise it
once for each thread that multiplies it, eight times as often.
"""

import triton
import triton.language as tl

from moe_compile.ops._skinny_mm_fp8_sums import GROUP, quantised_groups
from moe_compile.ops._skinny_mm_sums import append

ARE_FASTER = False  # than sums? What blocks are chosen by, where nothing was measured for a shape.
COLUMNS = tl.constexpr(8)  # the fewest of the right side


@triton.jit
def quantised_row(  # type: ignore[no-untyped-def]
    x,
    dtype,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x [G, 128] as `quant_fp8` gives it, and scales [G]."""
    q, scale = quantised_groups(
        tl.reshape(x, [1, x.shape[0] * GROUP]), dtype, amax_floor,
        POWER_OF_TWO, DIVIDE, INTERPRETED,
    )  # fmt: skip
    return tl.reshape(q, x.shape), tl.reshape(scale, [x.shape[0]])


@triton.jit
def products(q, w, scale, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """q [G, 128] times w [G, N, 128], each of the G by its scale: [G, N, COLUMNS], all alike."""
    wide: tl.constexpr = tl.float32 if INTERPRETED else tl.float16
    row = tl.broadcast_to(q.to(wide)[:, :, None], [q.shape[0], GROUP, COLUMNS])
    return tl.dot(w.to(wide), row) * scale[:, None, None]


@triton.jit
def added_up(acc):  # type: ignore[no-untyped-def]
    """The sums [N] of `products`."""
    return tl.max(tl.sum(acc, 0), 1)


@triton.jit
def rows_of_dots(  # type: ignore[no-untyped-def]
    x_ptr,
    xs_ptr,
    norm_ptr,
    w_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `rows_of_sums`: a [BLOCK_N] for each row. The rows share what was read of w.

    w_ptr [BLOCK_N], w_mask [BLOCK_N].
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    groups = tl.arange(0, GROUPS)
    k = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    w_ptrs = w_ptr[None, :, None] + k[:, None, :]
    w_mask = w_mask[None, :, None]
    x_ptrs = x_ptr + k
    norm_ptrs = norm_ptr + k
    xs, sums, squares = (), (), ()
    for m in tl.static_range(ROWS):
        xs = append(xs, tl.load(x_ptrs + m * stride_xm, mask=k < K, other=0.0))
        sums = append(sums, tl.zeros([GROUPS, BLOCK_N, COLUMNS], tl.float32))
        squares = append(squares, tl.zeros([GROUPS, GROUP], tl.float32))
    norm = 0.0
    if NORM:
        norm = tl.load(norm_ptrs, mask=k < K, other=0.0)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        has_group = groups * GROUP < K - start
        is_next = k < K - start - BLOCK_K
        next_xs, qs, scales, added, added_squares = (), (), (), (), ()
        if NORM:
            norm_ptrs += BLOCK_K
            next_norm = tl.load(norm_ptrs, mask=is_next, other=0.0)
        for m in tl.static_range(ROWS):
            next_x = tl.load(x_ptrs + m * stride_xm + BLOCK_K, mask=is_next, other=0.0)
            next_xs = append(next_xs, next_x)
            if AHEAD:
                q = xs[m]  # type: ignore[var-annotated]
                at = xs_ptr + m * tl.cdiv(K, GROUP) + start // GROUP + groups
                scale = tl.load(at, mask=has_group, other=0.0)
            else:
                x = xs[m].to(tl.float32)  # type: ignore[var-annotated]
                if NORM:
                    added_squares = append(added_squares, squares[m] + x * x)
                    x *= norm.to(tl.float32)
                q, scale = quantised_row(
                    x, w_ptr.dtype.element_ty, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED
                )
                if DIVIDE and not EVEN_K:  # nothing over a least amax of 0 is NaN
                    q = tl.where(k < K - start, q.to(tl.float32), 0.0)
            qs, scales = append(qs, q), append(scales, scale)
        # Loaded ahead, and waited for here: not before the rows are quantised.
        if EVEN_K:
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=w_mask & (k < K - start)[:, None, :], other=0.0)
        ws = tl.load(ws_ptr + groups, mask=has_group, other=0.0)
        for m in tl.static_range(ROWS):
            added = append(added, sums[m] + products(qs[m], w, scales[m] * ws, INTERPRETED))
        if NORM:
            norm, squares = next_norm, added_squares
        xs, sums = next_xs, added
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        ws_ptr += GROUPS
    rows = ()
    for m in tl.static_range(ROWS):
        row = added_up(sums[m])
        if NORM:
            row *= tl.rsqrt(tl.sum(squares[m]) / K + eps)
        rows = append(rows, row)
    return rows
