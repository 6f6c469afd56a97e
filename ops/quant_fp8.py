"""Quantise rows to float8 with a scale for each group of columns.

    amax = max(max(|x|) over the group, amax_floor) + amax_eps
    scale = max(amax / 448, scale_floor) + scale_eps, or the least power of two not below
    q = x / scale, clamped to +-448, rounded to e4m3

`scale_by_reciprocal` is amax * (1 / 448), `quant_by_reciprocal` x * (1 / scale): other roundings of
the same, which models write. With `offsets`, rows from offsets[E - 1] on are not written.

Letters: R rows, F features, G = ceil(F / group) groups, E experts.
Shapes: x [R, F], offsets [E] -> q [R, F], scale [R, G]; scale is stored by columns (strides 1, R)
    with column_major. R and F may be 0; the last group may be short.
Dtypes: x float32, float16 or bfloat16, computed in float32; q float8_e4m3fn, scale float32.
Errors: ValueError for other ranks or dtypes, a group other than 64 or 128, negative floors or
    epsilons.
Source: groups of 128 as DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2; the
    power of two is the OCP microscaling formats' E8M0, rounded up.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_int32,
    check_same_device,
)
from moe_compile.ops._library import define
from moe_compile.ops._quant_kernel import FP8, LARGEST, launch

AMAX_FLOOR = 1e-10


def quant_fp8_reference(
    x_RF: Tensor,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    offsets_E: Tensor | None = None,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `quant_fp8` means, in plain PyTorch and float32; rows of no expert are quantised too."""
    how = (power_of_two, amax_floor, scale_floor, (scale_by_reciprocal, quant_by_reciprocal))
    q_RF, scale_RG = quantize_reference(x_RF.float(), group, *how, (amax_eps, scale_eps))
    return q_RF, scale_RG.t().contiguous().t() if column_major else scale_RG


def new_outputs(
    x: Tensor, R: Any, F: Any, group: int, column_major: bool, pad_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """q [R, F], and scales [R, G] whose rows or columns lie together.

    pad_rows: do q's rows lie whole groups apart?
    """
    G = (F + group - 1) // group
    scale = x.new_empty(G, R, dtype=torch.float32).t() if column_major else None
    if scale is None:
        scale = x.new_empty(R, G, dtype=torch.float32)
    stride = max(G * group if pad_rows else F, 1)
    return x.new_empty_strided((R, F), (stride, 1), dtype=FP8), scale


def quantize_reference(
    y_RF: Tensor,
    group: int,
    power_of_two: bool,
    amax_floor: float,
    scale_floor: float,
    reciprocals: tuple[bool, bool],
    epsilons: tuple[float, float],
    pad_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantise float32 rows, in plain PyTorch; the last group may be short."""
    R, F = y_RF.shape
    G = (F + group - 1) // group
    y_RGg = torch.nn.functional.pad(y_RF, (0, G * group - F)).view(R, G, group)
    amax_RG = y_RGg.abs().amax(-1).clamp_min(amax_floor) + epsilons[0]
    scale_RG = amax_RG * (1 / LARGEST) if reciprocals[0] else amax_RG / LARGEST
    scale_RG = scale_RG.clamp_min(scale_floor) + epsilons[1]
    if power_of_two:
        mantissa, exponent = torch.frexp(scale_RG)  # in [0.5, 1): a power of two is 0.5
        rounded = torch.ldexp(torch.ones_like(scale_RG), exponent - (mantissa == 0.5).int())
        rounded = torch.where(scale_RG == 0, 0.0, rounded).clamp_min(2.0**-126)
        scale_RG = torch.where(scale_RG.isfinite(), rounded, scale_RG)
    each = scale_RG[..., None]
    z_RGg = y_RGg * each.reciprocal() if reciprocals[1] else y_RGg / each
    q_RGg = z_RGg.clamp(-LARGEST, LARGEST).to(FP8)
    q_RF = q_RGg.view(R, G * group)[:, :F]
    return q_RF if pad_rows else q_RF.contiguous(), scale_RG


def check_quant(
    op: str,
    x: Tensor,
    group: int,
    floors: tuple[float, float],
    epsilons: tuple[float, float],
    **rest: Any,
) -> None:
    """What `quant_fp8` and `silu_mul_quant` ask for alike."""
    check_float(op, "x", x)
    check(group in (64, 128), op, "groups of 64 or 128", group)
    check(min(floors) >= 0, op, "floors of 0 or more", floors)
    check(all(0 <= e < math.inf for e in epsilons), op, "finite epsilons of 0 or more", epsilons)
    check_same_device(op, x=x, **rest)
    if (offsets := rest.get("offsets")) is not None:
        check_dims(op, "offsets", offsets, "[E]")
        check_int32(op, "offsets", offsets)
        check(offsets.shape[0] >= 1, op, "offsets of one expert or more", offsets.shape)


def quant_fp8_triton(
    x_RF: Tensor,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    offsets_E: Tensor | None = None,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program for a few groups of a few rows."""
    how = (amax_floor, scale_floor, (scale_by_reciprocal, quant_by_reciprocal))
    out = _fake(
        x_RF, group, power_of_two, column_major, amax_floor, scale_floor, offsets_E=offsets_E,
        amax_eps=amax_eps, scale_eps=scale_eps,
    )  # fmt: skip
    launch(x_RF, out, group, power_of_two, *how, offsets_E, epsilons=(amax_eps, scale_eps))
    return out


def _fake(
    x_RF: Tensor,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    offsets_E: Tensor | None = None,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_dims("quant_fp8", "x", x_RF, "[R, F]")
    floors, epsilons = (amax_floor, scale_floor), (amax_eps, scale_eps)
    check_quant("quant_fp8", x_RF, group, floors, epsilons, offsets=offsets_E)
    return new_outputs(x_RF, x_RF.shape[0], x_RF.shape[1], group, column_major)


def _cpu(x_RF: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    _fake(x_RF, *args, **kwargs)
    return quant_fp8_reference(x_RF, *args, **kwargs)


quant_fp8 = define(
    "quant_fp8(Tensor x, int group=128, bool power_of_two=False, bool column_major=False,"
    " float amax_floor=1e-10, float scale_floor=0.0, bool scale_by_reciprocal=False,"
    " bool quant_by_reciprocal=False, Tensor? offsets=None, float amax_eps=0.0,"
    " float scale_eps=0.0) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=quant_fp8_triton,
    fake=_fake,
)
