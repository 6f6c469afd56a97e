"""The activation of experts without a gate: y = relu(x) ** 2.

Letters: R rows, F features.
"""

from torch import Tensor

from moe_compile.ops._check import check_dims, check_float
from moe_compile.ops._library import define


def relu2_reference(x_RF: Tensor) -> Tensor:
    """What `relu2` means, in plain PyTorch and in the dtype it is given."""
    return x_RF.relu().square()


def _fake(x_RF: Tensor) -> Tensor:
    check_dims("relu2", "x", x_RF, "[R, F]")
    check_float("relu2", "x", x_RF)
    return x_RF.new_empty(x_RF.shape)


def _cpu(x_RF: Tensor) -> Tensor:
    _fake(x_RF)
    return relu2_reference(x_RF.float()).to(x_RF.dtype)


relu2 = define("relu2(Tensor x) -> Tensor", cpu=_cpu, cuda=_cpu, fake=_fake)
