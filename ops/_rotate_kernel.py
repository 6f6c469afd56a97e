"""What kernels that turn heads share: the norm and rotation of some heads of one token."""

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import rounded


@triton.jit
def _weighted(y, scale, weight_ptr, d, is_in, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype = weight_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + d, mask=is_in, other=0.0).to(tl.float32)[None, :]
    return rounded(rounded(y * scale, dtype, True, INTERPRETED) * weight, dtype, True, INTERPRETED)


@triton.jit
def rotate_heads(  # type: ignore[no-untyped-def]
    x_ptr,
    stride_xh,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_oh,
    first,
    num_heads,
    eps,
    HAS_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Some heads of one token: the lower and upper half of what is turned, and the rest."""
    dtype = out_ptr.dtype.element_ty
    head = first + tl.arange(0, HEADS)
    is_head = (head < num_heads)[:, None]
    d = tl.arange(0, BLOCK_L)
    is_in = d < R // 2
    x_ptrs = x_ptr + head.to(tl.int64)[:, None] * stride_xh + d[None, :]
    out_ptrs = out_ptr + head.to(tl.int64)[:, None] * stride_oh + d[None, :]
    is_both = is_head & is_in[None, :]
    low = tl.load(x_ptrs, mask=is_both, other=0.0).to(tl.float32)
    high = tl.load(x_ptrs + R // 2, mask=is_both, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + d, mask=is_in, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_ptr + R // 2 + d, mask=is_in, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_ptr + d, mask=is_in, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_ptr + R // 2 + d, mask=is_in, other=0.0).to(tl.float32)[None, :]
    if R < D:
        u = tl.arange(0, BLOCK_U)
        is_rest = u < D - R
        rest_ptrs = x_ptr + head.to(tl.int64)[:, None] * stride_xh + (R + u)[None, :]
        rest = tl.load(rest_ptrs, mask=is_head & is_rest[None, :], other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        total = tl.sum(low * low + high * high, 1)
        if R < D:
            total += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(total / D + eps)[:, None]
        low = _weighted(low, scale, weight_ptr, d, is_in, INTERPRETED)
        high = _weighted(high, scale, weight_ptr, R // 2 + d, is_in, INTERPRETED)
        if R < D:
            rest = _weighted(rest, scale, weight_ptr, R + u, is_rest, INTERPRETED)
    new_low = rounded(low * cos_low, dtype, True, INTERPRETED)
    new_low -= rounded(high * sin_low, dtype, True, INTERPRETED)
    new_high = rounded(high * cos_high, dtype, True, INTERPRETED)
    new_high += rounded(low * sin_high, dtype, True, INTERPRETED)
    new_low = rounded(new_low, dtype, True, INTERPRETED)
    new_high = rounded(new_high, dtype, True, INTERPRETED)
    tl.store(out_ptrs, new_low.to(dtype), mask=is_both)
    tl.store(out_ptrs + R // 2, new_high.to(dtype), mask=is_both)
    if R < D:
        rest_ptrs = out_ptr + head.to(tl.int64)[:, None] * stride_oh + (R + u)[None, :]
        tl.store(rest_ptrs, rest.to(dtype), mask=is_head & is_rest[None, :])


_MOST_SINGLE = 1056  # programs of one head: eight for each of the 132 SMs of an H100 or H200


def heads_of_program(heads: int) -> int:
    """How many heads a program takes, of so many of all tokens."""
    return 1 if heads <= _MOST_SINGLE else 4


def with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
