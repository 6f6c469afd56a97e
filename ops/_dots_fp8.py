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
