"""Square what is positive, drop what is not: y = relu(x) ** 2, for experts without a gate.

Letters: R rows, F features.
Shapes: x [R, F] -> [R, F]. R and F may be 0.
Dtypes: float32, float16, bfloat16; computed in float32, rounded once, returned in x's dtype.
Errors: ValueError if x has not two dims, or another dtype.
Source: squared ReLU, So et al. 2021 (Primer), arXiv:2109.08668.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check_dims, check_float
from moe_compile.ops._library import define


def relu2_reference(x_RF: Tensor) -> Tensor:
    """What `relu2` means, in plain PyTorch and in the dtype it is given."""
    return x_RF.relu().square()


@triton.jit
def _relu2_kernel(x_ptr, y_ptr, F, stride_xr, BLOCK_F: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    x = tl.load(x_ptr + row * stride_xr + cols, mask=cols < F, other=0.0).to(tl.float32)
    x = tl.where(x < 0, 0.0, x)  # by a comparison, which leaves NaN as it is
    tl.store(y_ptr + row * F + cols, x * x, mask=cols < F)


def relu2_triton(x_RF: Tensor) -> Tensor:
    """Launch the kernel: one program for BLOCK_F features of one row."""
    _check(x_RF)
    R, F = x_RF.shape
    y_RF = x_RF.new_empty(R, F)
    if y_RF.numel() == 0:
        return y_RF
    x_RF = x_RF if x_RF.stride(1) == 1 else x_RF.contiguous()
    BLOCK_F = min(1024, triton.next_power_of_2(F))
    grid = (R, triton.cdiv(F, BLOCK_F))
    _relu2_kernel[grid](x_RF, y_RF, F, x_RF.stride(0), BLOCK_F=BLOCK_F)
    return y_RF


def _check(x_RF: Tensor) -> None:
    check_dims("relu2", "x", x_RF, "[R, F]")
    check_float("relu2", "x", x_RF)


def _fake(x_RF: Tensor) -> Tensor:
    _check(x_RF)
    return x_RF.new_empty(x_RF.shape)


def _cpu(x_RF: Tensor) -> Tensor:
    _check(x_RF)
    return relu2_reference(x_RF.float()).to(x_RF.dtype)


relu2 = define("relu2(Tensor x) -> Tensor", cpu=_cpu, cuda=relu2_triton, fake=_fake)
