"""Sum over the ranks of a group, add the residual stream, and normalise: the step after attention
and after the MLP of a tensor- or expert-parallel model.

    sum = residual + (x of rank 0 + ... + x of rank n - 1)
    normed = sum * rsqrt(mean(sum ** 2) + eps) * weight, over the last dim

Rounded to x's dtype after the sum over ranks, after the addition, and at the end; with
`round_first` also before the weight, as transformers' models do. On GPUs that read each other's
memory, after `moe_compile.parallel.use_symmetric_memory`, up to the rows measured to be faster,
that is one kernel; elsewhere an all-reduce of the group's backend, and the rest. All ranks call it
together, on one stream, like any collective.

Letters: T tokens (any leading dims), H hidden size.
Shapes: x [.., H], residual [.., H], weight [H] -> sum [.., H], normed [.., H]. T may be 0.
Dtypes: float32, float16, bfloat16, one for all.
Errors: ValueError if shapes or dtypes differ, or the group is unknown.
Source: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; words that carry their own flag
    are NCCL's LL protocol.
"""

import torch
from torch import Tensor

from moe_compile.ops._all_reduce_kernel import launch
from moe_compile.ops._check import check, check_float, check_same_device
from moe_compile.ops._library import define
from moe_compile.ops._process_groups import process_group
from moe_compile.ops._symmetric_memory import Inbox, inbox_of

_c10d = torch.ops._c10d_functional


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool = True
) -> tuple[Tensor, Tensor]:
    """What the op means on one rank, x being the sum over ranks: float32 inside (float64 kept)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = residual + x
    normed = total.to(wide) * torch.rsqrt(total.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).to(wide)
    return total, (normed * weight.to(wide)).to(x.dtype)


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    op = "all_reduce_add_rms_norm"
    check_float(op, "x", x)
    if x.ndim < 1 or residual.ndim != x.ndim:
        check(False, op, "x and residual [.., H]", [list(x.shape), list(residual.shape)])
    for size, theirs in zip(x.shape, residual.shape, strict=True):
        check(size == theirs, op, f"residual {list(x.shape)} as x", residual.shape)
    if weight.ndim != 1:
        check(False, op, "weight [H]", weight.shape)
    check(weight.shape[0] == x.shape[-1], op, f"weight [{x.shape[-1]}]", weight.shape)
    for name, other in (("residual", residual), ("weight", weight)):
        check(other.dtype == x.dtype, op, f"{name} in x's {x.dtype}", other.dtype)
    check_same_device(op, x=x, residual=residual, weight=weight)


def _group(group_name: str) -> None:
    try:
        process_group(group_name)
    except (RuntimeError, KeyError, ValueError):
        check(False, "all_reduce_add_rms_norm", "the name of a process group", repr(group_name))


def _plain(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str, round_first: bool
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    _group(group_name)
    total = _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group_name))
    return add_rms_norm_reference(total, residual, weight, eps, round_first)


def _cuda(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str, round_first: bool
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    _group(group_name)
    H = x.shape[-1]
    rows = x.numel() // H if H else 0
    if rows == 0 or H % 2 or x.dtype == torch.float32:
        return _plain(x, residual, weight, eps, group_name, round_first)
    inbox = inbox_of(group_name)
    if inbox is None or rows > inbox.fastest.get((H, x.dtype), 0):
        inbox, x = None, _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", group_name))
    elif x.device != inbox.words.device:
        check(False, "all_reduce_add_rms_norm", f"x on {inbox.words.device}", x.device)
    return exchange(x, residual, weight, eps, inbox, round_first)


def exchange(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, inbox: Inbox | None, round_first: bool
) -> tuple[Tensor, Tensor]:
    """The one kernel over this inbox; without one, x is summed already."""
    H = x.shape[-1]
    parts = (x.reshape(-1, H).contiguous(), residual.reshape(-1, H).contiguous())
    total, normed = launch(*parts, weight.contiguous(), eps, round_first, inbox)
    return total.view(x.shape), normed.view(x.shape)


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str, round_first: bool
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


all_reduce_add_rms_norm = define(
    "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, str group_name,"
    " bool round_first) -> (Tensor, Tensor)",
    cpu=_plain,
    cuda=_cuda,
    fake=_fake,
)
"""The op; passes/fuse_all_reduce.py puts it into graphs."""
