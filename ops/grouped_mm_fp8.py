"""Multiply each expert's float8 rows by that expert's float8 weight, both with scales by block.

    for e in range(E):
        for r in range(offsets[e - 1], offsets[e]):           # from 0 for the first expert
            y[r] = dequantized x[rows[r] // top_k] @ dequantized w[e] + bias[e]

The scale of x[n, h] is x_scale[n, h // 128] (or h // 64), that of w[e, h, g] is
w_scale[e, h // 128, g // 128]. Rows from offsets[E - 1] on belong to no expert: exact zeros.

Letters: N rows of x, R output rows, E experts, H features in, G features out, K groups along H,
    L groups along G (the last of each may be short).
Shapes: x [N, H], x_scale [N, K], w [E, H, G], w_scale [E, ceil(H / 128), L], offsets [E], rows [R],
    bias [E, G] -> [R, G]; without rows R is N. w is stored along H: the transpose of [E, G, H].
Dtypes: x, w float8_e4m3fn; scales float32; offsets and rows int32; y and bias in `dtype`, which is
    float32, float16 or bfloat16. Summed in float32, rounded once.
Errors: ValueError for other ranks, dtypes, shapes or strides, scales of other groups, tensors on
    several devices, or top_k < 1.
Source: DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3; the published runner quantised
    activations for bfloat16 weights, too: here that is an error when it is compiled.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float_dtype,
    check_int32,
    check_same_device,
)
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize, group_of_scales, launch
from moe_compile.ops._library import define

FP8 = torch.float8_e4m3fn


def grouped_mm_fp8_reference(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What `grouped_mm_fp8` means: dequantise, multiply, round. float64 if asked for as dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = dequantize(x_NH, x_scale_NK, 1, group_of_scales(x_NH.shape[1], x_scale_NK), wide)
    x_RH = x if rows_R is None else x[rows_R.long() // top_k]
    y_RG = x_RH.new_zeros(x_RH.shape[0], w_EHG.shape[2])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:  # an expert without rows is not dequantised
            w_HG = dequantize(w_EHG[expert], w_scale_EKL[expert], 128, 128, wide)
            y_RG[start:end] = x_RH[start:end] @ w_HG
            if bias_EG is not None:
                y_RG[start:end] += bias_EG[expert].to(wide)
        start = end
    return y_RG.to(dtype)


def check_fp8(
    op: str, x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> None:
    """What `grouped_mm_fp8` and `linear_fp8` ask for alike; w [.., H, G]."""
    check_dims(op, "x", x, "[N, H]")
    check_dims(op, "x_scale", x_scale, "[N, K]")
    for name, tensor in (("x", x), ("w", w)):
        check(tensor.dtype == FP8, op, f"{name} in {FP8}", tensor.dtype)
    for name, tensor in (("x_scale", x_scale), ("w_scale", w_scale)):
        check(tensor.dtype == torch.float32, op, f"{name} in float32", tensor.dtype)
    check_float_dtype(op, dtype)
    (N, H), (*lead, depth, G) = x.shape, w.shape
    check(depth == H, op, f"x [N, {depth}] for w {list(w.shape)}", x.shape)
    check(w.stride(-2) == 1 or H <= 1, op, "w stored along H", w.stride())
    check(x_scale.shape[0] == N, op, f"x_scale [{N}, K]", x_scale.shape)
    if isinstance(H, int) and isinstance(x_scale.shape[1], int):
        groups = f"x_scale of groups of 128 or 64 along {H}"
        check(group_of_scales(H, x_scale) > 0, op, groups, x_scale.shape)
    blocks = (*lead, (H + 127) // 128, (G + 127) // 128)
    check(w_scale.shape == blocks, op, f"w_scale {list(blocks)}", w_scale.shape)


def check_grouped_mm_fp8(
    op: str,
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None,
    top_k: int,
    bias_EG: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """What `grouped_mm_fp8` and `grouped_mm_fp8_silu_mul` ask for alike."""
    check_dims(op, "w", w_EHG, "[E, H, G]")
    check_dims(op, "offsets", offsets_E, "[E]")
    check_fp8(op, x_NH, x_scale_NK, w_EHG, w_scale_EKL, dtype)
    check_int32(op, "offsets", offsets_E)
    check_same_device(
        op, x=x_NH, x_scale=x_scale_NK, w=w_EHG, w_scale=w_scale_EKL, offsets=offsets_E,
        rows=rows_R, bias=bias_EG,
    )  # fmt: skip
    E, _, G = w_EHG.shape
    check(offsets_E.shape[0] == E, op, f"offsets [{E}]", offsets_E.shape)
    check(top_k >= 1, op, "top_k >= 1", top_k)
    if bias_EG is not None:
        check(bias_EG.shape == (E, G), op, f"bias [{E}, {G}]", bias_EG.shape)
        check(bias_EG.dtype == dtype, op, f"bias in {dtype}", bias_EG.dtype)
    if rows_R is not None:
        check_dims(op, "rows", rows_R, "[R]")
        check_int32(op, "rows", rows_R)


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
) -> Tensor:
    weights = (w_EHG, w_scale_EKL, offsets_E, rows_R, top_k, bias_EG)
    check_grouped_mm_fp8("grouped_mm_fp8", x_NH, x_scale_NK, *weights, dtype)
    R = x_NH.shape[0] if rows_R is None else rows_R.shape[0]
    return x_NH.new_empty(R, w_EHG.shape[2], dtype=dtype)


def grouped_mm_fp8_triton(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_EHG: Tensor,
    w_scale_EKL: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **how: Any,
) -> Tensor:
    """Launch the kernel: one program for BLOCK_M rows of one expert and BLOCK_N columns."""
    given = (x_NH, x_scale_NK, w_EHG, w_scale_EKL, offsets_E, rows_R, top_k, bias_EG)
    y_RG = _fake(*given, dtype)
    launch(*given[:4], y_RG, *given[4:], **how)
    return y_RG


def _cpu(*args: Any, **kwargs: Any) -> Tensor:
    _fake(*args, **kwargs)
    return grouped_mm_fp8_reference(*args, **kwargs)


grouped_mm_fp8 = define(
    "grouped_mm_fp8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor offsets,"
    " Tensor? rows=None, int top_k=1, Tensor? bias=None, ScalarType dtype=bfloat16) -> Tensor",
    cpu=_cpu,
    cuda=grouped_mm_fp8_triton,
    fake=_fake,
)
