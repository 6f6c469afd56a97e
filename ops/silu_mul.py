"""Gated activation of the SwiGLU family.

Letters: R rows, F features of one half, G = 2 * F.
"""

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float
from moe_compile.ops._library import define


def silu_mul_reference(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    """What `silu_mul` means, in plain PyTorch and in the dtype it is given."""
    gate_RF, up_RF = (x_RG[:, ::2], x_RG[:, 1::2]) if interleaved else x_RG.chunk(2, dim=-1)
    if limit is not None:
        gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
    return gate_RF * torch.sigmoid(alpha * gate_RF) * (up_RF + up_shift)


def _fake(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    check_dims("silu_mul", "x", x_RG, "[R, 2F]")
    check_float("silu_mul", "x", x_RG)
    check(x_RG.shape[1] % 2 == 0, "silu_mul", "x [R, 2F]", list(x_RG.shape))
    return x_RG.new_empty(x_RG.shape[0], x_RG.shape[1] // 2)


def _cpu(
    x_RG: Tensor,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
) -> Tensor:
    _fake(x_RG, interleaved, alpha, limit, up_shift)
    return silu_mul_reference(x_RG.float(), interleaved, alpha, limit, up_shift).to(x_RG.dtype)


silu_mul = define(
    "silu_mul(Tensor x, bool interleaved=False, float alpha=1.0, float? limit=None,"
    " float up_shift=0.0) -> Tensor",
    cpu=_cpu,
    cuda=_cpu,
    fake=_fake,
)
