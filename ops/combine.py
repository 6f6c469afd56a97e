"""Add up what the experts made of each token, weighted.

out[t] = sum over k, in order, of weights[t, k] * y[position[t, k]]; a position of -1 adds nothing,
whatever its weight and the rows of y hold. A token without any position gives zeros. To that is
added residual[t], where it is given.

Letters: T tokens, K experts per token, R rows, H features.
Shapes: y [R, H], position [T, K], weights [T, K], residual [T, H] -> [T, H]. T, R and H may be 0.
Dtypes: y and weights float32, float16 or bfloat16, each its own; position int32; summed in float32,
    rounded once to `dtype` (y's, if not given), and once more with the residual, of that dtype.
Errors: ValueError for other ranks, dtypes or shapes, or tensors on several devices.
Source: the weighted sum of Shazeer et al. 2017, arXiv:1701.06538, eq. 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_float_dtype,
    check_int32,
    check_residual,
    check_same_device,
)
from moe_compile.ops._cpu import combine_cpu
from moe_compile.ops._gated import rounded
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous


def combine_reference(
    y_RH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """What `combine` means, in plain PyTorch and in the dtype it is given."""
    out_TH = _weighted_sum(y_RH, position_TK, weights_TK, dtype)
    return out_TH if residual_TH is None else out_TH + residual_TH


def _weighted_sum(
    y_RH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype | None
) -> Tensor:
    T = position_TK.shape[0]
    if y_RH.shape[0] == 0:
        return y_RH.new_zeros(T, y_RH.shape[1], dtype=dtype)
    y_TKH = y_RH[position_TK.clamp(min=0).long()]
    owned_TK1 = (position_TK >= 0).unsqueeze(-1)
    product_TKH = torch.where(owned_TK1, y_TKH * weights_TK.unsqueeze(-1), 0)
    return product_TKH.sum(1).to(dtype or y_RH.dtype)


@triton.jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    y_ptr,
    position_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    H,
    stride_yr,
    HAS_RESIDUAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * H + cols, mask=cols < H).to(tl.float32)
    for k in tl.static_range(K):  # unrolled: the loads of all k are in flight together
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + token * K + k).to(tl.float32)
        width = tl.where(row >= 0, H, 0)
        y = tl.load(y_ptr + row * stride_yr + cols, mask=cols < width, other=0.0)
        total += tl.where(row >= 0, weight, 0.0) * y.to(tl.float32)
    total = rounded(total, out_ptr.dtype.element_ty, True, INTERPRETED)
    if HAS_RESIDUAL:
        total = rounded(total + residual, out_ptr.dtype.element_ty, True, INTERPRETED)
    tl.store(out_ptr + token * H + cols, total, mask=cols < H)


def combine_triton(
    y_RH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    """Launch the kernel: one program for BLOCK_H features of one token."""
    _check(y_RH, position_TK, weights_TK, dtype, residual_TH)
    (T, K), H = position_TK.shape, y_RH.shape[1]
    out_TH = y_RH.new_empty(T, H, dtype=dtype)
    if out_TH.numel() == 0:
        return out_TH
    y_RH = y_RH if y_RH.stride(1) == 1 else y_RH.contiguous()
    BLOCK_H = min(_block_h(T), triton.next_power_of_2(H))
    _combine_kernel[(T, triton.cdiv(H, BLOCK_H))](
        y_RH,
        position_TK.contiguous(),
        weights_TK.contiguous(),
        None if residual_TH is None else residual_TH.contiguous(),
        out_TH,
        H,
        y_RH.stride(0),
        HAS_RESIDUAL=residual_TH is not None,
        INTERPRETED=not y_RH.is_cuda,
        K=K,
        BLOCK_H=BLOCK_H,
        **overlap(y_RH, y_RH.nbytes),
    )
    return out_TH


def _block_h(T: int) -> int:
    """Few tokens: many small programs, for the width of the machine."""
    return 256 if T < 256 else 1024


def _check(
    y_RH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype | None,
    residual_TH: Tensor | None,
) -> None:
    op = "combine"
    check_dims(op, "y", y_RH, "[R, H]")
    check_dims(op, "position", position_TK, "[T, K]")
    check_float(op, "y", y_RH)
    check_float(op, "weights", weights_TK)
    check_int32(op, "position", position_TK)
    check_float_dtype(op, dtype)
    if weights_TK.shape != position_TK.shape:
        expected = f"weights of position's shape {list(position_TK.shape)}"
        check(False, op, expected, weights_TK.shape)
    check_same_device(op, y=y_RH, position=position_TK, weights=weights_TK)
    shape = (position_TK.shape[0], y_RH.shape[1])
    check_residual(op, residual_TH, shape, dtype or y_RH.dtype, y_RH)


def _fake(
    y_RH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    _check(y_RH, position_TK, weights_TK, dtype, residual_TH)
    return y_RH.new_empty(position_TK.shape[0], y_RH.shape[1], dtype=dtype)


def _cpu(
    y_RH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    dtype: torch.dtype | None = None,
    residual_TH: Tensor | None = None,
) -> Tensor:
    _check(y_RH, position_TK, weights_TK, dtype, residual_TH)
    dtype = dtype or y_RH.dtype
    out_TH = combine_cpu(y_RH, position_TK, weights_TK, dtype)
    if out_TH is None:
        out_TH = combine_reference(y_RH.float(), position_TK, weights_TK.float()).to(dtype)
    return out_TH if residual_TH is None else out_TH + residual_TH


combine = define(
    "combine(Tensor y, Tensor position, Tensor weights, ScalarType? dtype=None,"
    " Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    cuda=combine_triton,
    fake=_fake,
)
