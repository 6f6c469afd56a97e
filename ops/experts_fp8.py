"""All stages of the experts of a layer in float8 in one op, for a few tokens at a time.

As `experts`, from rows quantised by `quant_fp8`: `grouped_mm_fp8`, `silu_mul_quant` with the
activation rounded to `dtype` before it is quantised, `grouped_mm_fp8`, `combine`. Without x_scale
it quantises x, too, with the same floor of amax and the same choice of powers of two.

Letters: T tokens, K experts per token, E experts, H features in, F expert features, G = 2 * F, O
    features out, L and M groups of 128 of H and F.
Shapes: x [T, H], x_scale [T, L], ids and weights [T, K], w_up [E, H, 2F], w_up_scale [E, L, 2M],
    w_down [E, F, O], w_down_scale [E, M, ceil(O / 128)], residual [T, O] -> [T, O]; gate before up,
    F a multiple of 128, weights stored along H and F. Any id outside [0, E) is no expert and adds
    exactly 0.
Dtypes: x, w_up and w_down float8_e4m3fn, without x_scale x float32, float16 or bfloat16; scales
    float32; weights float32, float16 or bfloat16; ids int32 or int64; rows between the products,
    the result and the residual that is added to it in `dtype`.
Errors: ValueError as those ops, and for other F.
Source: as `experts` and `grouped_mm_fp8`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_residual,
    check_same_device,
)
from moe_compile.ops._experts_kernel import are_few, launch_few_fp8
from moe_compile.ops._grouped_mm_fp8_kernel import group_of_scales
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._library import define
from moe_compile.ops._quant_kernel import FP8
from moe_compile.ops.combine import combine_reference, combine_triton
from moe_compile.ops.grouped_mm_fp8 import (
    check_fp8,
    grouped_mm_fp8_reference,
    grouped_mm_fp8_triton,
)
from moe_compile.ops.quant_fp8 import quant_fp8_reference, quant_fp8_triton
from moe_compile.ops.silu_mul_quant import silu_mul_quant_reference, silu_mul_quant_triton
from moe_compile.ops.sort_tokens import sort_tokens_reference, sort_tokens_triton

REFERENCES = (
    sort_tokens_reference,
    grouped_mm_fp8_reference,
    silu_mul_quant_reference,
    combine_reference,
    quant_fp8_reference,
)
KERNELS = (
    sort_tokens_triton,
    grouped_mm_fp8_triton,
    silu_mul_quant_triton,
    combine_triton,
    quant_fp8_triton,
)


def experts_fp8_reference(*args: Any, **kwargs: Any) -> Tensor:
    """What `experts_fp8` means: its stages one after the other, by their references."""
    return _by_stages(REFERENCES, *args, **kwargs)


def _by_stages(
    stages: Any,
    x_TH: Tensor,
    x_scale_TL: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_up_scale: Tensor,
    w_down_EFO: Tensor,
    w_down_scale: Tensor,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_silu: bool = False,
    power_of_two: bool = False,
    amax_floor: float = 1e-10,
    dtype: torch.dtype = torch.bfloat16,
    residual_TO: Tensor | None = None,
) -> Tensor:
    sort, mm, activate, add_up, quantise = stages
    if x_scale_TL is None:
        x_TH, x_scale_TL = quantise(x_TH, power_of_two=power_of_two, amax_floor=amax_floor)
    rows_R, offsets_E, position_TK = sort(ids_TK, w_up_EHG.shape[0])
    routing = (offsets_E, rows_R, ids_TK.shape[1])
    g_RG = mm(x_TH, x_scale_TL, w_up_EHG, w_up_scale, *routing, None, dtype)
    q, scale = activate(
        g_RG, offsets_E=offsets_E, alpha=alpha, limit=limit, up_shift=up_shift,
        round_silu=round_silu, round_product=True, power_of_two=power_of_two, amax_floor=amax_floor,
    )  # fmt: skip
    y_RO = mm(q, scale, w_down_EFO, w_down_scale, offsets_E, None, 1, None, dtype)
    return add_up(y_RO, position_TK, weights_TK, None, residual_TO)  # type: ignore[no-any-return]


def _fake(
    x_TH: Tensor,
    x_scale_TL: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_up_scale: Tensor,
    w_down_EFO: Tensor,
    w_down_scale: Tensor,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_silu: bool = False,
    power_of_two: bool = False,
    amax_floor: float = 1e-10,
    dtype: torch.dtype = torch.bfloat16,
    residual_TO: Tensor | None = None,
) -> Tensor:
    op = "experts_fp8"
    check_dims(op, "ids", ids_TK, "[T, K]")
    check_dims(op, "w_up", w_up_EHG, "[E, H, 2F]")
    check_dims(op, "w_down", w_down_EFO, "[E, F, O]")
    check_dims(op, "x", x_TH, "[T, H]")
    (E, F, out), (T, H) = w_down_EFO.shape, x_TH.shape
    q, scale = x_TH, x_scale_TL
    if scale is None:  # what is not quantised yet is checked by what it will be
        check_float(op, "x", x_TH)
        q = x_TH.new_empty(0, H, dtype=FP8)
        scale = x_TH.new_empty(0, (H + 127) // 128, dtype=torch.float32)
    check_fp8(op, q, scale, w_up_EHG, w_up_scale, dtype)
    check(group_of_scales(H, scale) == 128, op, "x_scale of groups of 128", scale.shape)
    check(w_up_EHG.shape[0] == E, op, "w_down with w_up's E", w_down_EFO.shape)
    check(w_up_EHG.shape[2] == 2 * F, op, "w_down [E, F, O] with half of w_up's last dim", F)
    check(F % 128 == 0, op, "F a multiple of 128", F)
    # The second product's rows do not exist yet; what they are checked with is of their shape.
    h = x_TH.new_empty(0, F, dtype=FP8)
    h_scale = scale.new_empty(0, F // 128)
    check_fp8(op, h, h_scale, w_down_EFO, w_down_scale, dtype)
    check(ids_TK.dtype in (torch.int32, torch.int64), op, "ids int32 or int64", ids_TK.dtype)
    check(ids_TK.shape[0] == T, op, "as many ids as tokens", ids_TK.shape)
    check(weights_TK.shape == ids_TK.shape, op, "weights of ids' shape", weights_TK.shape)
    check_float(op, "weights", weights_TK)
    check(amax_floor >= 0, op, "amax_floor of 0 or more", amax_floor)
    check_same_device(
        op, x=x_TH, x_scale=x_scale_TL, ids=ids_TK, weights=weights_TK, w_up=w_up_EHG,
        w_up_scale=w_up_scale, w_down=w_down_EFO, w_down_scale=w_down_scale,
    )  # fmt: skip
    out_TO = x_TH.new_empty(T, out, dtype=dtype)
    check_residual(op, residual_TO, out_TO.shape, dtype, x_TH)
    return out_TO


def experts_fp8_triton(
    x_TH: Tensor,
    x_scale_TL: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_up_scale: Tensor,
    w_down_EFO: Tensor,
    w_down_scale: Tensor,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    round_silu: bool = False,
    power_of_two: bool = False,
    amax_floor: float = 1e-10,
    dtype: torch.dtype = torch.bfloat16,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """Launch two kernels for few tokens, or one for each stage."""
    inputs = (x_TH, x_scale_TL, ids_TK, weights_TK)
    up, down = (w_up_EHG, w_up_scale), (w_down_EFO, w_down_scale)
    out_TO = _fake(*inputs, *up, *down, amax_floor=amax_floor, dtype=dtype, residual_TO=residual_TO)
    if not are_few(ids_TK.numel(), w_up_EHG, w_down_EFO):
        activation = (alpha, limit, up_shift, round_silu, power_of_two, amax_floor)
        given: tuple[Any, ...] = (*inputs, *up, *down, *activation, dtype, residual_TO)
        return _by_stages(KERNELS, *given)
    gate = Gate(False, alpha, limit, up_shift, round_silu)
    how = (dtype, gate, (amax_floor, power_of_two))
    launch_few_fp8(*inputs, up, down, out_TO, *how, residual_TO=residual_TO)
    return out_TO


def _cpu(*args: Any, **kwargs: Any) -> Tensor:
    _fake(*args, **kwargs)
    return experts_fp8_reference(*args, **kwargs)


experts_fp8 = define(
    "experts_fp8(Tensor x, Tensor? x_scale, Tensor ids, Tensor weights, Tensor w_up,"
    " Tensor w_up_scale, Tensor w_down, Tensor w_down_scale, float alpha=1.0, float? limit=None,"
    " float up_shift=0.0, bool round_silu=False, bool power_of_two=False, float amax_floor=1e-10,"
    " ScalarType dtype=bfloat16, Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    cuda=experts_fp8_triton,
    fake=_fake,
)
