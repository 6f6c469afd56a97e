"""What `down_combine_kernel` does in float8: rows quantised as it comes to them, and products.

On tensor cores all groups of 128 of all of a token's experts are products by themselves
(`_dots_fp8.py`), so that a group's scale can hold its expert's weight, too.
"""

import triton
import triton.language as tl

from moe_compile.ops._dots_fp8 import COLUMNS, added_up, products, quantised_row
from moe_compile.ops._quant_kernel import quantized, to_e4m3
from moe_compile.ops._skinny_mm_fp8_sums import GROUP


@triton.jit
def requantized(  # type: ignore[no-untyped-def]
    h,
    ws,
    dtype,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """h [K, F, 1] as float8 keeps its groups of 128, times the scales ws [K, F // 128]."""
    groups = tl.reshape(h, [h.shape[0], h.shape[1] // 128, 128])
    q, scale = quantized(groups, amax_floor, 0.0, POWER_OF_TWO, False, False, DIVIDE, INTERPRETED)
    q = to_e4m3(q, dtype, INTERPRETED).to(tl.float32)
    return tl.reshape(q * (scale * ws)[:, :, None], h.shape)


@triton.jit
def sum_by_dots(  # type: ignore[no-untyped-def]
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    w_mask,
    ws_ptr,
    E,
    F,
    stride_we,
    stride_wse,
    stride_wsk,
    amax_floor,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Of one token, the sum over its experts, [BLOCK_O]; w_ptr and w_mask [BLOCK_O].

    128 divides F. BLOCK_F // 128 groups of each expert at a time.
    """
    GROUPS: tl.constexpr = BLOCK_F // GROUP
    each = tl.arange(0, BLOCK_K * GROUPS)
    k, group = each // GROUPS, each % GROUPS
    f = tl.arange(0, GROUP)
    expert = tl.load(ids_ptr + k, mask=k < K, other=-1).to(tl.int64)
    owned = (expert >= 0) & (expert < E)
    weight = tl.load(weights_ptr + k, mask=owned, other=0.0).to(tl.float32)
    h_ptrs = h_ptr + (k * F + group * GROUP)[:, None] + f[None, :]
    w_ptrs = w_ptr[None, :, None] + (expert * stride_we + group * GROUP)[:, None, None]
    w_ptrs += f[None, None, :]
    ws_ptrs = ws_ptr + expert * stride_wse + group * stride_wsk
    acc = tl.zeros([BLOCK_K * GROUPS, BLOCK_O, COLUMNS], tl.float32)
    h = tl.load(h_ptrs, mask=(owned & (group * GROUP < F))[:, None], other=0.0)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        inside = owned if EVEN else owned & (group * GROUP < F - start)
        h_ptrs += BLOCK_F
        is_next = owned & (group * GROUP < F - start - BLOCK_F)
        next_h = tl.load(h_ptrs, mask=is_next[:, None], other=0.0)
        q, scale = quantised_row(
            h, w_ptr.dtype.element_ty, amax_floor, POWER_OF_TWO, DIVIDE, INTERPRETED
        )
        if DIVIDE:  # nothing over a least amax of 0 is NaN
            q = tl.where(inside[:, None], q.to(tl.float32), 0.0)
            scale = tl.where(inside, scale, 0.0)
        # Loaded ahead, and waited for here: not before the row is quantised.
        w = tl.load(w_ptrs, mask=inside[:, None, None] & w_mask[None, :, None], other=0.0)
        ws = tl.load(ws_ptrs, mask=inside, other=0.0)
        acc += products(q, w, scale * ws * weight, INTERPRETED)
        h = next_h
        w_ptrs += BLOCK_F
        ws_ptrs += GROUPS * stride_wsk
    return added_up(acc)
