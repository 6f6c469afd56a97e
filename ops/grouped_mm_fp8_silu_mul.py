"""Multiply float8 rows by each expert's gate and up, and gate them before they are stored.

As `silu_mul(grouped_mm_fp8(...), ...)` in one kernel: the product is rounded to `dtype` as if it
had been stored, and gated in float32; `round_silu` rounds silu(gate), too, as a model does that
computes it as an op of its own. Rows from offsets[E - 1] on belong to no expert: exact zeros.

Letters: as `grouped_mm_fp8`, F features out, G = 2 * F.
Shapes: as `grouped_mm_fp8` with w [E, H, 2F], gate before up -> [R, F]; F is a multiple of 128, so
    that no block of scales holds columns of both.
Dtypes: as `grouped_mm_fp8`.
Errors: ValueError as `grouped_mm_fp8`, and for other F.
Source: as `grouped_mm_silu_mul`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_fp8_kernel import launch
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._library import define
from moe_compile.ops.grouped_mm_fp8 import check_grouped_mm_fp8, grouped_mm_fp8_reference


def grouped_mm_fp8_silu_mul_reference(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_silu: bool = False,
) -> Tensor:
    """What `grouped_mm_fp8_silu_mul` means, in plain PyTorch. float64 if asked for as dtype."""
    weights = (w_EHG, w_scale_EKL, offsets_E, rows_R, top_k, bias_EG)
    h_RG = grouped_mm_fp8_reference(x_NH, x_scale_NK, *weights, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gate_RF, up_RF = h_RG.to(wide).chunk(2, dim=-1)
    if limit is not None:
        gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
    silu_RF = gate_RF * torch.sigmoid(alpha * gate_RF)
    if round_silu:
        silu_RF = silu_RF.to(dtype).to(wide)
    return (silu_RF * (up_RF + up_shift)).to(dtype)


def grouped_mm_fp8_silu_mul_triton(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_silu: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernel of `grouped_mm_fp8` with a gate."""
    given = (x_NH, x_scale_NK, w_EHG, w_scale_EKL)
    routing = (offsets_E, rows_R, top_k, bias_EG)
    y_RF = _fake(*given, *routing, dtype)
    gate = Gate(False, alpha, limit, up_shift, round_silu)
    launch(*given, y_RF, *routing, gate, blocks)
    return y_RF


def _fake(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *_: Any,
    **__: Any,
) -> Tensor:
    op = "grouped_mm_fp8_silu_mul"
    weights = (w_EHG, w_scale_EKL, offsets_E, rows_R, top_k, bias_EG)
    check_grouped_mm_fp8(op, x_NH, x_scale_NK, *weights, dtype)
    G = w_EHG.shape[2]
    check(G % 256 == 0, op, "w [E, H, 2F], F a multiple of 128", list(w_EHG.shape))
    R = x_NH.shape[0] if rows_R is None else rows_R.shape[0]
    return x_NH.new_empty(R, G // 2, dtype=dtype)


def _cpu(*args: Any, **kwargs: Any) -> Tensor:
    _fake(*args, **kwargs)
    return grouped_mm_fp8_silu_mul_reference(*args, **kwargs)


grouped_mm_fp8_silu_mul = define(
    "grouped_mm_fp8_silu_mul(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor offsets,"
    " Tensor? rows=None, int top_k=1, Tensor? bias=None, ScalarType dtype=bfloat16,"
    " float alpha=1.0, float? limit=None, float up_shift=0.0, bool round_silu=False) -> Tensor",
    cpu=_cpu,
    cuda=grouped_mm_fp8_silu_mul_triton,
    fake=_fake,
)
