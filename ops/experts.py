"""All stages of the experts of a layer in one op, for a few tokens at a time.

`find_experts` gives each stage its op, so that passes can reason about them; `choose_kernels` puts
them together again where launching each costs more than what it does. On a GPU the op takes two
kernels where hardly two tokens share an expert (`_experts_kernel.py`), and its stages' otherwise.

Shapes: x [T, H], ids [T, K], weights [T, K], w_up [E, H, 2F], w_down [E, F, O], bias_up [E, 2F],
    bias_down [E, O], residual [T, O] -> [T, O]. Any id outside [0, E) is no expert and adds exactly
    0. T may be 0.
Dtypes: x, w_up, w_down and biases in one of float32, float16, bfloat16; weights in any of these;
    ids int32 or int64. GEMMs accumulate in float32 and round once, as their stages do, or not at
    all before the sum over K; the activation and that sum are float32, rounded once. Returned in
    `dtype`, or in x's; the residual, of that dtype, is added to that, and rounded again.
Errors: ValueError for other ranks, dtypes or devices and for sizes that do not fit.

Letters: T tokens, K experts per token, E experts, H features in, F expert features, G = 2 * F,
O features out.
"""

from typing import Any

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
from moe_compile.ops._cpu import experts_cpu
from moe_compile.ops._experts_kernel import are_few, launch_few
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._library import define
from moe_compile.ops.combine import combine, combine_reference, combine_triton
from moe_compile.ops.grouped_mm import grouped_mm, grouped_mm_reference, grouped_mm_triton
from moe_compile.ops.grouped_mm_silu_mul import grouped_mm_silu_mul_triton
from moe_compile.ops.silu_mul import silu_mul, silu_mul_reference, silu_mul_triton
from moe_compile.ops.sort_tokens import (
    sort_tokens,
    sort_tokens_reference,
    sort_tokens_triton,
)

STAGES = (sort_tokens, grouped_mm, silu_mul, combine)
REFERENCES = (sort_tokens_reference, grouped_mm_reference, silu_mul_reference, combine_reference)


def experts_reference(*args: Any, **kwargs: Any) -> Tensor:
    """What `experts` means: its stages one after the other, by their references."""
    return _by_stages(REFERENCES, *args, **kwargs)


def _by_stages(
    stages: Any,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    bias_up_EG: Tensor | None = None,
    bias_down_EO: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    dtype: torch.dtype | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    sort, mm, activate, add_up = stages
    rows_R, offsets_E, position_TK = sort(ids_TK, w_up_EHG.shape[0])
    g_RG = mm(x_TH, w_up_EHG, offsets_E, rows_R, ids_TK.shape[1], bias_up_EG)
    h_RF = activate(g_RG, interleaved, alpha, limit, up_shift)
    y_RO = mm(h_RF, w_down_EFO, offsets_E, None, 1, bias_down_EO)
    return add_up(y_RO, position_TK, weights_TK, dtype, residual_TO)  # type: ignore[no-any-return]


def _check(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    bias_up_EG: Tensor | None,
    bias_down_EO: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    op = "experts"
    check_dims(op, "x", x_TH, "[T, H]")
    check_dims(op, "ids", ids_TK, "[T, K]")
    check_dims(op, "w_up", w_up_EHG, "[E, H, 2F]")
    check_dims(op, "w_down", w_down_EFO, "[E, F, O]")
    check_float(op, "x", x_TH)
    check_float(op, "weights", weights_TK)
    check_float_dtype(op, dtype)
    check(ids_TK.dtype in (torch.int32, torch.int64), op, "ids int32 or int64", ids_TK.dtype)
    (T, H), (E, H_up, G) = x_TH.shape, w_up_EHG.shape
    E_down, F, out = w_down_EFO.shape
    check(ids_TK.shape[0] == T, op, "as many ids as tokens", ids_TK.shape)
    check(weights_TK.shape == ids_TK.shape, op, "weights of ids' shape", weights_TK.shape)
    check(H_up == H, op, "w_up [E, H, 2F] with x's H", w_up_EHG.shape)
    check(E_down == E, op, "w_down with w_up's E", w_down_EFO.shape)
    check(G == 2 * F, op, "w_down [E, F, O] with half of w_up's last dim", w_down_EFO.shape)
    for name, w in (("w_up", w_up_EHG), ("w_down", w_down_EFO)):
        check(w.dtype == x_TH.dtype, op, f"{name} in x's dtype", w.dtype)
    for name, bias, size in (("bias_up", bias_up_EG, G), ("bias_down", bias_down_EO, out)):
        if bias is not None:
            check(bias.shape == (E, size), op, f"{name} [E, {size}]", bias.shape)
            check(bias.dtype == x_TH.dtype, op, f"{name} in x's dtype", bias.dtype)
    given = {"weights": weights_TK, "w_up": w_up_EHG, "w_down": w_down_EFO}
    check_same_device(op, x=x_TH, ids=ids_TK, bias_up=bias_up_EG, bias_down=bias_down_EO, **given)


def _fake(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    bias_up_EG: Tensor | None = None,
    bias_down_EO: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    dtype: torch.dtype | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    _check(x_TH, ids_TK, weights_TK, w_up_EHG, w_down_EFO, bias_up_EG, bias_down_EO, dtype)
    out_TO = x_TH.new_empty(x_TH.shape[0], w_down_EFO.shape[2], dtype=dtype)
    check_residual("experts", residual_TO, out_TO.shape, out_TO.dtype, x_TH)
    return out_TO


def _cpu(*args: Any) -> Tensor:
    out_TO: Tensor = _fake(*args)
    args, residual = args[:12], args[12:]
    if not experts_cpu(out_TO, *args):
        return _by_stages(STAGES, *args, *residual)
    return out_TO + residual[0] if residual and residual[0] is not None else out_TO


def experts_triton(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    bias_up_EG: Tensor | None = None,
    bias_down_EO: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    dtype: torch.dtype | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """Launch two kernels for few tokens, or one for each stage."""
    experts = (w_up_EHG, w_down_EFO)
    biases = (bias_up_EG, bias_down_EO)
    inputs = (x_TH, ids_TK, weights_TK)
    out_TO = _fake(*inputs, *experts, *biases, dtype=dtype, residual_TO=residual_TO)
    if are_few(ids_TK.numel(), *experts):
        gate = Gate(interleaved, alpha, limit, up_shift)
        launch_few(*inputs, *experts, out_TO, *biases, gate, residual_TO=residual_TO)
        return out_TO
    rows_R, offsets_E, position_TK = sort_tokens_triton(ids_TK, w_up_EHG.shape[0])
    up = (x_TH, w_up_EHG, offsets_E, rows_R, ids_TK.shape[1], bias_up_EG)
    activation = (interleaved, alpha, limit, up_shift)
    if interleaved or w_up_EHG.stride(1) == 1:
        h_RF = grouped_mm_silu_mul_triton(*up, *activation)
    else:
        h_RF = silu_mul_triton(grouped_mm_triton(*up), *activation)
    y_RO = grouped_mm_triton(h_RF, w_down_EFO, offsets_E, None, 1, bias_down_EO)
    return combine_triton(y_RO, position_TK, weights_TK, dtype, residual_TO)


experts = define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor w_up, Tensor w_down,"
    " Tensor? bias_up=None, Tensor? bias_down=None, bool interleaved=False, float alpha=1.0,"
    " float? limit=None, float up_shift=0.0, ScalarType? dtype=None,"
    " Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    cuda=experts_triton,
    fake=_fake,
    cpp=True,
)
