"""Multiply each expert's rows by that expert's gate and up, and gate them before they are stored.

As `silu_mul(grouped_mm(x, w, offsets, rows, top_k, bias), ...)` in one kernel: the product is
rounded to x's dtype as if it had been stored, and gated in float32. Rows from offsets[E - 1] on
belong to no expert: exact zeros.

Letters: N rows of x, R output rows, E experts, H features in, F features out, G = 2 * F.
Shapes: x [N, H], w [E, H, 2F], offsets [E], rows [R], bias [E, 2F] -> [R, F]; without rows R is N.
    Gate and up are the halves of w's last dim, or every other column where `interleaved`. w may
    have any strides; halves are fast where w is the transpose of [E, 2F, H], interleaved ones in
    both layouts.
Dtypes: as `grouped_mm`.
Errors: ValueError as `grouped_mm`, and for an odd last dim of w.
Source: as `grouped_mm` and `silu_mul`; the epilogue is that of CUTLASS's and vLLM's gated GEMMs,
    here without an interleaved copy of the weight.
"""

from typing import Any

from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_kernel import Gate, launch
from moe_compile.ops._library import define
from moe_compile.ops.grouped_mm import check_grouped_mm, grouped_mm, grouped_mm_reference
from moe_compile.ops.silu_mul import silu_mul, silu_mul_reference


def grouped_mm_silu_mul_reference(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """What `grouped_mm_silu_mul` means: its two stages by their references."""
    y_RG = grouped_mm_reference(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    return silu_mul_reference(y_RG, interleaved, alpha, limit, up_shift)


def grouped_mm_silu_mul_triton(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernel of `grouped_mm` with a gate."""
    y_RF = _fake(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    gate = Gate(interleaved, alpha, limit, up_shift)
    launch(x_NH, w_EHG, y_RF, offsets_E, rows_R, top_k, bias_EG, gate, blocks)
    return y_RF


def _fake(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    op = "grouped_mm_silu_mul"
    check_grouped_mm(op, x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    G = w_EHG.shape[2]
    check(G % 2 == 0, op, "w [E, H, 2F]", list(w_EHG.shape))
    R = x_NH.shape[0] if rows_R is None else rows_R.shape[0]
    return x_NH.new_empty(R, G // 2)


def _cpu(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    *activation: Any,
) -> Tensor:
    _fake(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    return silu_mul(  # type: ignore[no-any-return]
        grouped_mm(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG), *activation
    )


grouped_mm_silu_mul = define(
    "grouped_mm_silu_mul(Tensor x, Tensor w, Tensor offsets, Tensor? rows=None, int top_k=1,"
    " Tensor? bias=None, bool interleaved=False, float alpha=1.0, float? limit=None,"
    " float up_shift=0.0) -> Tensor",
    cpu=_cpu,
    cuda=grouped_mm_silu_mul_triton,
    fake=_fake,
)
