"""Multiply each expert's rows by that expert's weight.

    for e in range(E):
        for r in range(offsets[e - 1], offsets[e]):           # from 0 for the first expert
            y[r] = x[rows[r] // top_k] @ w[e] + bias[e]       # x[r] without rows; bias if given

Rows from offsets[E - 1] on belong to no expert: they are exact zeros, and their x is not read.

Letters: N rows of x, R output rows, E experts, H features in, G features out.
Shapes: x [N, H], w [E, H, G], offsets [E], rows [R], bias [E, G] -> [R, G]; without rows R is N.
    w may have any strides; [E, H, G] and the transpose of [E, G, H] are the fast ones. R may be 0.
Dtypes: x, w and bias float32, float16 or bfloat16, all the same; offsets and rows int32; summed in
    float32 (true float32, no TF32), rounded once, returned in x's dtype.
Errors: ValueError for other ranks, dtypes or shapes, tensors on several devices, or top_k < 1.
Source: the grouped product of MegaBlocks, Gale et al. 2022, arXiv:2211.15841, section 5.
"""

from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_int32,
    check_same_device,
)
from moe_compile.ops._cpu import grouped_mm_cpu
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_kernel import launch
from moe_compile.ops._library import define


def grouped_mm_reference(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
) -> Tensor:
    """What `grouped_mm` means, in plain PyTorch and in the dtype it is given."""
    x_RH = x_NH if rows_R is None else x_NH[rows_R.long() // top_k]
    y_RG = x_RH.new_zeros(x_RH.shape[0], w_EHG.shape[2])
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        y_RG[start:end] = x_RH[start:end] @ w_EHG[expert]
        if bias_EG is not None:
            y_RG[start:end] += bias_EG[expert]
        start = end
    return y_RG


def grouped_mm_triton(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernel."""
    y_RG = _fake(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    launch(x_NH, w_EHG, y_RG, offsets_E, rows_R, top_k, bias_EG, blocks=blocks)
    return y_RG


def check_grouped_mm(
    op: str,
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None,
    top_k: int,
    bias_EG: Tensor | None,
) -> None:
    check_dims(op, "x", x_NH, "[N, H]")
    check_dims(op, "w", w_EHG, "[E, H, G]")
    check_dims(op, "offsets", offsets_E, "[E]")
    check_float(op, "x", x_NH)
    if w_EHG.dtype != x_NH.dtype:
        check(False, op, f"w in x's dtype {x_NH.dtype}", w_EHG.dtype)
    check_int32(op, "offsets", offsets_E)
    check_same_device(op, x=x_NH, w=w_EHG, offsets=offsets_E, rows=rows_R, bias=bias_EG)
    E, H, G = w_EHG.shape
    if (same := x_NH.shape[1] == H) is not True:
        check(same, op, f"x [N, {H}] for w {list(w_EHG.shape)}", x_NH.shape)
    if (same := offsets_E.shape[0] == E) is not True:
        check(same, op, f"offsets [{E}]", offsets_E.shape)
    check(top_k >= 1, op, "top_k >= 1", top_k)
    if bias_EG is not None:
        check(bias_EG.shape == (E, G), op, f"bias [{E}, {G}]", bias_EG.shape)
        check(bias_EG.dtype == x_NH.dtype, op, f"bias in x's dtype {x_NH.dtype}", bias_EG.dtype)
    if rows_R is not None:
        check_dims(op, "rows", rows_R, "[R]")
        check_int32(op, "rows", rows_R)


def _fake(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
) -> Tensor:
    check_grouped_mm("grouped_mm", x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    R = x_NH.shape[0] if rows_R is None else rows_R.shape[0]
    return x_NH.new_empty(R, w_EHG.shape[2])


def _cpu(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
) -> Tensor:
    check_grouped_mm("grouped_mm", x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    return grouped_mm_cpu(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)


grouped_mm = define(
    "grouped_mm(Tensor x, Tensor w, Tensor offsets, Tensor? rows=None, int top_k=1,"
    " Tensor? bias=None) -> Tensor",
    cpu=_cpu,
    cuda=grouped_mm_triton,
    fake=_fake,
)
