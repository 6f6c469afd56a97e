"""Each expert's rows times that expert's weight.

Letters: N rows of x, R output rows, E experts, H features in, G features out.
"""

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float, check_same_device
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


def _fake(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
) -> Tensor:
    op = "grouped_mm"
    check_dims(op, "x", x_NH, "[N, H]")
    check_dims(op, "w", w_EHG, "[E, H, G]")
    check_dims(op, "offsets", offsets_E, "[E]")
    check_float(op, "x", x_NH)
    check(w_EHG.dtype == x_NH.dtype, op, f"w in x's dtype {x_NH.dtype}", w_EHG.dtype)
    check(offsets_E.dtype == torch.int32, op, "int32 offsets", offsets_E.dtype)
    check_same_device(op, x=x_NH, w=w_EHG, offsets=offsets_E, rows=rows_R, bias=bias_EG)
    E, H, G = w_EHG.shape
    check(x_NH.shape[1] == H, op, f"x [N, {H}] for w {list(w_EHG.shape)}", list(x_NH.shape))
    check(offsets_E.shape[0] == E, op, f"offsets [{E}]", list(offsets_E.shape))
    if bias_EG is not None:
        check(bias_EG.shape == (E, G), op, f"bias [{E}, {G}]", list(bias_EG.shape))
        check(bias_EG.dtype == x_NH.dtype, op, f"bias in x's dtype {x_NH.dtype}", bias_EG.dtype)
    if rows_R is None:
        return x_NH.new_empty(x_NH.shape[0], G)
    check_dims(op, "rows", rows_R, "[R]")
    check(rows_R.dtype == torch.int32, op, "int32 rows", rows_R.dtype)
    check(top_k >= 1, op, "top_k >= 1", top_k)
    return x_NH.new_empty(rows_R.shape[0], G)


def _cpu(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None = None,
    top_k: int = 1,
    bias_EG: Tensor | None = None,
) -> Tensor:
    _fake(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)
    return grouped_mm_reference(x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG)


grouped_mm = define(
    "grouped_mm(Tensor x, Tensor w, Tensor offsets, Tensor? rows=None, int top_k=1,"
    " Tensor? bias=None) -> Tensor",
    cpu=_cpu,
    cuda=_cpu,
    fake=_fake,
)
