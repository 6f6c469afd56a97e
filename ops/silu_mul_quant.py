"""Gate rows by the silu of others, and quantise them to float8 by groups.

x holds gate and up side by side, or gate alone where `up` is given. As `silu_mul` (interleaved,
alpha, limit, up_shift) and then `quant_fp8` (everything else), without a trip through memory
between them. `round_terms` (alpha * gate and up + up_shift), `round_sigmoid` (of gate * sigmoid),
`round_silu` and `round_product` round to x's dtype after each, as a model does that computes these
as ops of their own; `weights` multiplies each row in float32 before it is quantised, as a routing
weight folded in early. With `pad_rows` the rows of q lie G * group apart, as in a padded tensor
whose columns were cut off.

Letters: R rows, F features, X = 2 * F, or F where up is given, G = ceil(F / group) groups, E
    experts.
Shapes: x [R, 2F], or x and up [R, F]; weights [R], offsets [E] -> q [R, F], scale [R, G]; see
    `quant_fp8` for the scale's layout and for what offsets leave unwritten.
Dtypes: x float32, float16 or bfloat16; weights float32; q float8_e4m3fn, scale float32.
Errors: ValueError as those two ops, for weights of another shape or dtype, and for an up that is
    not like x or comes with `interleaved`.
Source: as `silu_mul` and `quant_fp8`; the folded weight is DeepGEMM's MegaMoE, DeepSeek-AI 2026.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims
from moe_compile.ops._library import define
from moe_compile.ops._quant_kernel import launch
from moe_compile.ops.quant_fp8 import AMAX_FLOOR, check_quant, new_outputs, quantize_reference


def silu_mul_quant_reference(
    x_RX: Tensor,
    up_RF: Tensor | None = None,
    weights_R: Tensor | None = None,
    offsets_E: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_terms: bool = False,
    round_sigmoid: bool = False,
    round_silu: bool = False,
    round_product: bool = False,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
    pad_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `silu_mul_quant` means, in plain PyTorch; rows of no expert are computed too."""
    rounds = (round_terms, round_sigmoid, round_silu, round_product)
    y_RF = _activation(x_RX, up_RF, interleaved, alpha, limit, up_shift, rounds)
    if weights_R is not None:
        y_RF = y_RF * weights_R[:, None]
    how = (power_of_two, amax_floor, scale_floor, (scale_by_reciprocal, quant_by_reciprocal))
    q_RF, scale_RG = quantize_reference(y_RF, group, *how, (amax_eps, scale_eps), pad_rows)
    return q_RF, scale_RG.t().contiguous().t() if column_major else scale_RG


def _activation(
    x_RX: Tensor,
    up: Tensor | None,
    interleaved: bool,
    alpha: float,
    limit: float | None,
    up_shift: float,
    rounds: tuple[bool, bool, bool, bool],
) -> Tensor:
    """The gated rows in float32, rounded on the way where asked."""

    def rounded(y: Tensor, asked: bool) -> Tensor:
        return y.to(x_RX.dtype).float() if asked else y

    halves = (x_RX[:, ::2], x_RX[:, 1::2]) if interleaved else x_RX.chunk(2, dim=-1)
    gate_RF, up_RF = (half.float() for half in (halves if up is None else (x_RX, up)))
    if limit is not None:
        gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
    below_RF = 1 + torch.exp(-rounded(alpha * gate_RF, rounds[0]))
    silu_RF = gate_RF / below_RF
    if rounds[1]:
        silu_RF = gate_RF * rounded(1 / below_RF, True)
    y_RF = rounded(silu_RF, rounds[2]) * rounded(up_RF + up_shift, rounds[0])
    return rounded(y_RF, rounds[3])


def silu_mul_quant_triton(
    x_RX: Tensor,
    up_RF: Tensor | None = None,
    weights_R: Tensor | None = None,
    offsets_E: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_terms: bool = False,
    round_sigmoid: bool = False,
    round_silu: bool = False,
    round_product: bool = False,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
    pad_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program for a few groups of a few rows."""
    floors, epsilons = (amax_floor, scale_floor), (amax_eps, scale_eps)
    out = _outputs(
        x_RX, up_RF, interleaved, weights_R, offsets_E, group, floors, epsilons, column_major,
        pad_rows,
    )  # fmt: skip
    launch(
        x_RX, out, group, power_of_two, *floors, (scale_by_reciprocal, quant_by_reciprocal),
        offsets_E, gated=True, up=up_RF, weights=weights_R, interleaved=interleaved, alpha=alpha,
        limit=limit, up_shift=up_shift, round_terms=round_terms, round_sigmoid=round_sigmoid,
        round_silu=round_silu, round_product=round_product, epsilons=epsilons,
    )  # fmt: skip
    return out


def _outputs(
    x_RX: Tensor,
    up_RF: Tensor | None,
    interleaved: bool,
    weights_R: Tensor | None,
    offsets_E: Tensor | None,
    group: int,
    floors: tuple[float, float],
    epsilons: tuple[float, float],
    column_major: bool,
    pad_rows: bool,
) -> tuple[Tensor, Tensor]:
    op = "silu_mul_quant"
    check_dims(op, "x", x_RX, "[R, F]" if up_RF is not None else "[R, 2F]")
    check_quant(op, x_RX, group, floors, epsilons, up=up_RF, weights=weights_R, offsets=offsets_E)
    R, F = x_RX.shape
    if up_RF is None:
        check(F % 2 == 0, op, "x [R, 2F]", list(x_RX.shape))
        F = F // 2
    else:
        check(up_RF.shape == x_RX.shape, op, f"up {list(x_RX.shape)} as x", up_RF.shape)
        check(up_RF.dtype == x_RX.dtype, op, f"up in x's {x_RX.dtype}", up_RF.dtype)
        check(not interleaved, op, "no up where gate and up are interleaved", "both")
    if weights_R is not None:
        check_dims(op, "weights", weights_R, "[R]")
        check(weights_R.shape[0] == R, op, f"weights [{R}]", weights_R.shape)
        check(weights_R.dtype == torch.float32, op, "float32 weights", weights_R.dtype)
    return new_outputs(x_RX, R, F, group, column_major, pad_rows)


def _fake(
    x_RX: Tensor,
    up_RF: Tensor | None = None,
    weights_R: Tensor | None = None,
    offsets_E: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_terms: bool = False,
    round_sigmoid: bool = False,
    round_silu: bool = False,
    round_product: bool = False,
    group: int = 128,
    power_of_two: bool = False,
    column_major: bool = False,
    amax_floor: float = AMAX_FLOOR,
    scale_floor: float = 0.0,
    scale_by_reciprocal: bool = False,
    quant_by_reciprocal: bool = False,
    amax_eps: float = 0.0,
    scale_eps: float = 0.0,
    pad_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    return _outputs(
        x_RX,
        up_RF,
        interleaved,
        weights_R,
        offsets_E,
        group,
        (amax_floor, scale_floor),
        (amax_eps, scale_eps),
        column_major,
        pad_rows,
    )


def _cpu(x_RX: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    _fake(x_RX, *args, **kwargs)
    return silu_mul_quant_reference(x_RX, *args, **kwargs)


silu_mul_quant = define(
    "silu_mul_quant(Tensor x, Tensor? up=None, Tensor? weights=None, Tensor? offsets=None,"
    " bool interleaved=False, float alpha=1.0, float? limit=None, float up_shift=0.0,"
    " bool round_terms=False, bool round_sigmoid=False, bool round_silu=False,"
    " bool round_product=False, int group=128, bool power_of_two=False, bool column_major=False,"
    " float amax_floor=1e-10, float scale_floor=0.0, bool scale_by_reciprocal=False,"
    " bool quant_by_reciprocal=False, float amax_eps=0.0, float scale_eps=0.0,"
    " bool pad_rows=False) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=silu_mul_quant_triton,
    fake=_fake,
)
