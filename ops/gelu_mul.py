"""Gate one half of each row by the gelu of the other: the activation of the GeGLU family.

x = [gate | up]; y = gelu(gate) * up. `approximate` is torch's: "none" (erf) or "tanh".

Letters: R rows, F features of one half, G = 2 * F.
Shapes: x [R, 2F] -> [R, F]. R and F may be 0.
Dtypes: float32, float16, bfloat16; computed in float32, rounded once, returned in x's dtype.
Errors: ValueError if x has not two dims, an odd number of columns, or another dtype, or if
    approximate is neither none nor tanh.
Source: GEGLU, Shazeer 2020, arXiv:2002.05202, eq. 6; both forms of gelu, Hendrycks and Gimpel
    2016, arXiv:1606.08415.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu

from moe_compile.ops._check import check, check_dims, check_float
from moe_compile.ops._library import define


def gelu_mul_reference(x_RG: Tensor, approximate: str = "none") -> Tensor:
    """What `gelu_mul` means, in plain PyTorch and in the dtype it is given."""
    gate_RF, up_RF = x_RG.chunk(2, dim=-1)
    return gelu(gate_RF, approximate=approximate) * up_RF


@triton.jit
def _gelu_mul_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, F, stride_xr, TANH: tl.constexpr, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    gate = tl.load(x_ptr + row * stride_xr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_xr + F + cols, mask=mask, other=0.0).to(tl.float32)
    if TANH:  # (1 + tanh(z)) / 2 = sigmoid(2 z); 1.5957... = 2 * sqrt(2 / pi)
        phi = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:  # 0.7071... = sqrt(1 / 2)
        phi = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y_ptr + row * F + cols, gate * phi * up, mask=mask)


def gelu_mul_triton(x_RG: Tensor, approximate: str = "none") -> Tensor:
    """Launch the kernel: one program for BLOCK_F features of one row."""
    _check(x_RG, approximate)
    R, F = x_RG.shape[0], x_RG.shape[1] // 2
    y_RF = x_RG.new_empty(R, F)
    if y_RF.numel() == 0:
        return y_RF
    x_RG = x_RG if x_RG.stride(1) == 1 else x_RG.contiguous()
    BLOCK_F = min(1024, triton.next_power_of_2(F))
    grid = (R, triton.cdiv(F, BLOCK_F))
    tanh = approximate == "tanh"
    _gelu_mul_kernel[grid](x_RG, y_RF, F, x_RG.stride(0), TANH=tanh, BLOCK_F=BLOCK_F)
    return y_RF


def _check(x_RG: Tensor, approximate: str) -> None:
    check_dims("gelu_mul", "x", x_RG, "[R, 2F]")
    check_float("gelu_mul", "x", x_RG)
    check(x_RG.shape[1] % 2 == 0, "gelu_mul", "x [R, 2F]", list(x_RG.shape))
    check(approximate in ("none", "tanh"), "gelu_mul", "approximate none or tanh", approximate)


def _fake(x_RG: Tensor, approximate: str = "none") -> Tensor:
    _check(x_RG, approximate)
    return x_RG.new_empty(x_RG.shape[0], x_RG.shape[1] // 2)


def _cpu(x_RG: Tensor, approximate: str = "none") -> Tensor:
    _check(x_RG, approximate)
    return gelu_mul_reference(x_RG.float(), approximate).to(x_RG.dtype)


gelu_mul = define(
    'gelu_mul(Tensor x, str approximate="none") -> Tensor',
    cpu=_cpu,
    cuda=gelu_mul_triton,
    fake=_fake,
)
