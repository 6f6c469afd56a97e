"""Add up what the experts made of each token, weighted.

Letters: T tokens, K experts per token, R rows, H features.
"""

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float, check_same_device
from moe_compile.ops._library import define


def combine_reference(
    y_RH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """What `combine` means, in plain PyTorch and in the dtype it is given."""
    T, K = position_TK.shape
    if y_RH.shape[0] == 0:
        return y_RH.new_zeros(T, y_RH.shape[1], dtype=dtype)
    y_TKH = y_RH[position_TK.clamp(min=0).long()]
    owned_TK1 = (position_TK >= 0).unsqueeze(-1)
    product_TKH = torch.where(owned_TK1, y_TKH * weights_TK.unsqueeze(-1), 0)
    return product_TKH.sum(1).to(dtype or y_RH.dtype)


def _fake(
    y_RH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    op = "combine"
    check_dims(op, "y", y_RH, "[R, H]")
    check_dims(op, "position", position_TK, "[T, K]")
    check_float(op, "y", y_RH)
    check_float(op, "weights", weights_TK)
    check(position_TK.dtype == torch.int32, op, "int32 position", position_TK.dtype)
    check(
        weights_TK.shape == position_TK.shape,
        op,
        f"weights of position's shape {list(position_TK.shape)}",
        list(weights_TK.shape),
    )
    check_same_device(op, y=y_RH, position=position_TK, weights=weights_TK)
    return y_RH.new_empty(position_TK.shape[0], y_RH.shape[1], dtype=dtype)


def _cpu(
    y_RH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    _fake(y_RH, position_TK, weights_TK, dtype)
    total = combine_reference(y_RH.float(), position_TK, weights_TK.float())
    return total.to(dtype or y_RH.dtype)


combine = define(
    "combine(Tensor y, Tensor position, Tensor weights, ScalarType? dtype=None) -> Tensor",
    cpu=_cpu,
    cuda=_cpu,
    fake=_fake,
)
