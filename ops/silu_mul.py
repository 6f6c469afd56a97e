"""Gate one half of each row by the silu of the other: the activation of the SwiGLU family.

x = [gate | up], or gate and up in turn where `interleaved`; then
    y = g * sigmoid(alpha * g) * (u + up_shift)
with g = min(gate, limit), u = min(max(up, -limit), limit) where a limit is given.

Letters: R rows, F features of one half, G = 2 * F.
Shapes: x [R, 2F] -> [R, F]. R and F may be 0.
Dtypes: float32, float16, bfloat16; computed in float32, rounded once, returned in x's dtype.
Errors: ValueError if x has not two dims, an odd number of columns, or another dtype.
Source: SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6; alpha, limit, up_shift and the interleaved
    halves are those of gpt-oss, OpenAI 2025, arXiv:2508.10925.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float
from moe_compile.ops._gated import gated
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous


def silu_mul_reference(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """What `silu_mul` means, in plain PyTorch and in the dtype it is given."""
    gate_RF, up_RF = (x_RG[:, ::2], x_RG[:, 1::2]) if interleaved else x_RG.chunk(2, dim=-1)
    if limit is not None:
        gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
    return gate_RF * torch.sigmoid(alpha * gate_RF) * (up_RF + up_shift)


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    F,
    stride_xr,
    alpha,
    limit,
    up_shift,
    INTERLEAVED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK_F
    cols = block + tl.arange(0, BLOCK_F)
    x_row = x_ptr + row * stride_xr
    if INTERLEAVED:  # one contiguous load, parted in registers
        pairs = 2 * block + tl.arange(0, 2 * BLOCK_F)
        x = tl.load(x_row + pairs, mask=pairs < 2 * F, other=0.0)
        gate, up = tl.split(tl.reshape(x, [BLOCK_F, 2]))
    else:
        gate = tl.load(x_row + cols, mask=cols < F, other=0.0)
        up = tl.load(x_row + F + cols, mask=cols < F, other=0.0)
    y = gated(
        gate, up, alpha, limit, up_shift, x_ptr.dtype.element_ty,
        HAS_LIMIT, False, False, False, INTERPRETED,
    )  # fmt: skip
    tl.store(y_ptr + row * F + cols, y, mask=cols < F)


def silu_mul_triton(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """Launch the kernel: one program for BLOCK_F features of one row."""
    _check(x_RG)
    R, F = x_RG.shape[0], x_RG.shape[1] // 2
    y_RF = x_RG.new_empty(R, F)
    if y_RF.numel() == 0:
        return y_RF
    x_RG = x_RG if x_RG.stride(1) == 1 else x_RG.contiguous()
    BLOCK_F = min(1024, triton.next_power_of_2(F))
    _silu_mul_kernel[(R, triton.cdiv(F, BLOCK_F))](
        x_RG,
        y_RF,
        F,
        x_RG.stride(0),
        float(alpha),
        0.0 if limit is None else float(limit),
        float(up_shift),
        INTERLEAVED=interleaved,
        HAS_LIMIT=limit is not None,
        INTERPRETED=not x_RG.is_cuda,
        BLOCK_F=BLOCK_F,
        **overlap(x_RG, 3 * y_RF.nbytes),
    )
    return y_RF


def _check(x_RG: Tensor) -> None:
    check_dims("silu_mul", "x", x_RG, "[R, 2F]")
    check_float("silu_mul", "x", x_RG)
    check(x_RG.shape[1] % 2 == 0, "silu_mul", "x [R, 2F]", list(x_RG.shape))


def _fake(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    _check(x_RG)
    return x_RG.new_empty(x_RG.shape[0], x_RG.shape[1] // 2)


def _cpu(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    _check(x_RG)
    if (alpha, limit, up_shift) == (1.0, None, 0.0):
        # Two vectorised kernels in x's own dtype: in bfloat16 a quarter of the time of casting.
        gate_RF, up_RF = (x_RG[:, ::2], x_RG[:, 1::2]) if interleaved else x_RG.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate_RF).mul_(up_RF)
    return silu_mul_reference(x_RG.float(), interleaved, alpha, limit, up_shift).to(x_RG.dtype)


silu_mul = define(
    "silu_mul(Tensor x, bool interleaved=False, float alpha=1.0, float? limit=None,"
    " float up_shift=0.0) -> Tensor",
    cpu=_cpu,
    cuda=silu_mul_triton,
    fake=_fake,
)
