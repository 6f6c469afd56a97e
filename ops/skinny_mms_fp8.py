"""Multiply few rows by several float8 weights in one launch, the rows quantised on the way.

    q, q_scale = quant_fp8(x, power_of_two=power_of_two, amax_floor=amax_floor)
    [linear_fp8(q, q_scale, w, w_scale, bias, dtype) for each w]

The dense layers of a decode step that read the same x, as q, k and v. To the product with a single
weight a residual may be added. With `norm`, x is the RMSNorm of what is given, as `rms_norm_mms`
has it, with `norm_eps` and `round_first`.

Letters: M rows, K features in, N features out, each weight its own.
Shapes: x [M, K], w 1 to 4 of [N, K], as many w_scale of [ceil(N / 128), ceil(K / 128)] and bias of
    [N] or None, residual [M, N], norm [K] -> as many of [M, N]. M may be 0. Each w is stored
    along K.
Dtypes: x and norm float32, float16 or bfloat16, the same; w float8_e4m3fn; scales float32; y, bias
    and residual in `dtype`: float32, float16 or bfloat16. Summed in float32, rounded once, and once
    more with the residual. Rows that are normed may not be rounded before they are quantised, and
    values below amax_floor, where that is 1e-8 or less, may differ by an eighth of it.
Errors: ValueError as those ops, for no weight or more than 4, for another number of scales or
    biases, for a norm or a residual of another shape, dtype or device, and for a residual with
    several weights.
Source: as `quant_fp8` and `grouped_mm_fp8`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_float_dtype,
    check_residual,
    check_same_device,
)
from moe_compile.ops._library import define
from moe_compile.ops._quant_kernel import FP8
from moe_compile.ops._skinny_mm_fp8_kernel import Blocks, can_norm, fits, launch
from moe_compile.ops._skinny_mm_kernel import MOST_WEIGHTS, Norm
from moe_compile.ops.linear_fp8 import linear_fp8_reference, linear_fp8_triton
from moe_compile.ops.quant_fp8 import AMAX_FLOOR, quant_fp8_reference, quant_fp8_triton
from moe_compile.ops.rms_norm_mms import check_norm, rms_norm


def skinny_mms_fp8_reference(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    power_of_two: bool = False,
    amax_floor: float = AMAX_FLOOR,
    dtype: torch.dtype = torch.bfloat16,
    residual_MN: Tensor | None = None,
    norm_K: Tensor | None = None,
    norm_eps: float = 0.0,
    round_first: bool = True,
) -> list[Tensor]:
    """What `skinny_mms_fp8` means, by the references of its parts."""
    if norm_K is not None:
        x_MK = rms_norm(x_MK, norm_K, norm_eps, round_first)
    q = quant_fp8_reference(x_MK, power_of_two=power_of_two, amax_floor=amax_floor)
    weights = zip(ws, w_scales, biases, strict=True)
    ys = [linear_fp8_reference(*q, w, w_scale, b, dtype) for w, w_scale, b in weights]
    return ys if residual_MN is None else [ys[0] + residual_MN]


def skinny_mms_fp8_triton(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    power_of_two: bool = False,
    amax_floor: float = AMAX_FLOOR,
    dtype: torch.dtype = torch.bfloat16,
    residual_MN: Tensor | None = None,
    norm_K: Tensor | None = None,
    norm_eps: float = 0.0,
    round_first: bool = True,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Launch the kernel once where it takes such an input, else one for each part."""
    how = (power_of_two, amax_floor)
    ys = _fake(x_MK, ws, w_scales, biases, *how, dtype, residual_MN, norm_K)
    norm = None
    if norm_K is not None:
        if can_norm(x_MK, *how, norm_eps):
            norm = Norm(norm_K, norm_eps, round_first, keep=False)
        else:
            x_MK = rms_norm(x_MK, norm_K, norm_eps, round_first)
    if fits(x_MK):
        launch(x_MK, ws, w_scales, biases, ys, *how, blocks, residual_MN, norm)
        return ys
    q = quant_fp8_triton(x_MK, power_of_two=power_of_two, amax_floor=amax_floor)
    weights = zip(ws, w_scales, biases, strict=True)
    ys = [linear_fp8_triton(*q, w, w_scale, b, dtype) for w, w_scale, b in weights]
    return ys if residual_MN is None else [ys[0] + residual_MN]


def _fake(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    power_of_two: bool = False,
    amax_floor: float = AMAX_FLOOR,
    dtype: torch.dtype = torch.bfloat16,
    residual_MN: Tensor | None = None,
    norm_K: Tensor | None = None,
    norm_eps: float = 0.0,
    round_first: bool = True,
) -> list[Tensor]:
    op = "skinny_mms_fp8"
    check_dims(op, "x", x_MK, "[M, K]")
    check_float(op, "x", x_MK)
    check_float_dtype(op, dtype)
    check(amax_floor >= 0, op, "amax_floor of 0 or more", amax_floor)
    check(1 <= len(ws) <= MOST_WEIGHTS, op, f"1 to {MOST_WEIGHTS} weights", len(ws))
    check(len(w_scales) == len(ws), op, f"{len(ws)} w_scale, one a weight", len(w_scales))
    check(len(biases) == len(ws), op, f"{len(ws)} biases or None, one a weight", len(biases))
    for w, w_scale, bias in zip(ws, w_scales, biases, strict=True):
        _check_weight(op, x_MK, w, w_scale, bias, dtype)
    if residual_MN is not None:
        check(len(ws) == 1, op, "1 weight with a residual", len(ws))
    check_residual(op, residual_MN, (x_MK.shape[0], ws[0].shape[0]), dtype, x_MK)
    if norm_K is not None:
        check_norm(op, x_MK, norm_K)
    return [x_MK.new_empty(x_MK.shape[0], w.shape[0], dtype=dtype) for w in ws]


def _check_weight(
    op: str, x_MK: Tensor, w_NK: Tensor, w_scale: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> None:
    check_dims(op, "w", w_NK, "[N, K]")
    check_same_device(op, x=x_MK, w=w_NK, w_scale=w_scale, bias=bias_N)
    N, K = w_NK.shape
    check(x_MK.shape[1] == K, op, f"x [M, {K}] for w {list(w_NK.shape)}", x_MK.shape)
    check(w_NK.dtype == FP8, op, f"w in {FP8}", w_NK.dtype)
    check(w_NK.stride(1) == 1 or K <= 1, op, "w stored along K", w_NK.stride())
    blocks = ((N + 127) // 128, (K + 127) // 128)
    check(w_scale.shape == blocks, op, f"w_scale {list(blocks)}", w_scale.shape)
    check(w_scale.dtype == torch.float32, op, "w_scale in float32", w_scale.dtype)
    if bias_N is not None:
        check(bias_N.shape == (N,), op, f"bias [{N}]", bias_N.shape)
        check(bias_N.dtype == dtype, op, f"bias in {dtype}", bias_N.dtype)


def _cpu(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    power_of_two: bool = False,
    amax_floor: float = AMAX_FLOOR,
    dtype: torch.dtype = torch.bfloat16,
    residual_MN: Tensor | None = None,
    norm_K: Tensor | None = None,
    norm_eps: float = 0.0,
    round_first: bool = True,
) -> list[Tensor]:
    given = (x_MK, ws, w_scales, biases, power_of_two, amax_floor, dtype, residual_MN)
    norm = (norm_K, norm_eps, round_first)
    _fake(*given, *norm)
    return skinny_mms_fp8_reference(*given, *norm)


skinny_mms_fp8 = define(
    "skinny_mms_fp8(Tensor x, Tensor[] w, Tensor[] w_scale, Tensor?[] bias,"
    " bool power_of_two=False, float amax_floor=1e-10, ScalarType dtype=bfloat16,"
    " Tensor? residual=None, Tensor? norm=None, float norm_eps=0., bool round_first=True)"
    " -> Tensor[]",
    cpu=_cpu,
    cuda=skinny_mms_fp8_triton,
    fake=_fake,
)
