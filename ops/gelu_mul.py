"""Gated activation of the GeGLU family: gelu(gate) * up, where x = [gate | up].

Letters: R rows, F features of one half, G = 2 * F.
"""

from torch import Tensor
from torch.nn.functional import gelu

from moe_compile.ops._check import check, check_dims, check_float
from moe_compile.ops._library import define


def gelu_mul_reference(x_RG: Tensor, approximate: str = "none") -> Tensor:
    """What `gelu_mul` means, in plain PyTorch and in the dtype it is given."""
    gate_RF, up_RF = x_RG.chunk(2, dim=-1)
    return gelu(gate_RF, approximate=approximate) * up_RF


def _fake(x_RG: Tensor, approximate: str = "none") -> Tensor:
    check_dims("gelu_mul", "x", x_RG, "[R, 2F]")
    check_float("gelu_mul", "x", x_RG)
    check(x_RG.shape[1] % 2 == 0, "gelu_mul", "x [R, 2F]", list(x_RG.shape))
    check(approximate in ("none", "tanh"), "gelu_mul", "approximate none or tanh", approximate)
    return x_RG.new_empty(x_RG.shape[0], x_RG.shape[1] // 2)


def _cpu(x_RG: Tensor, approximate: str = "none") -> Tensor:
    _fake(x_RG, approximate)
    return gelu_mul_reference(x_RG.float(), approximate).to(x_RG.dtype)


gelu_mul = define(
    'gelu_mul(Tensor x, str approximate="none") -> Tensor', cpu=_cpu, cuda=_cpu, fake=_fake
)
