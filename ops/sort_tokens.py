"""Group (token, slot) pairs by expert: a stable counting sort that never leaves the device.

Letters: T tokens, K experts per token, R = T * K rows, E experts.
"""

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims
from moe_compile.ops._library import define


def sort_tokens_reference(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `sort_tokens` means, in plain PyTorch."""
    ids_R = ids_TK.reshape(-1)
    owned_R = (ids_R >= 0) & (ids_R < num_experts)
    keys_R = torch.where(owned_R, ids_R, num_experts)
    sorted_R, rows_R = keys_R.sort(stable=True)
    experts_E = torch.arange(num_experts, device=ids_R.device, dtype=sorted_R.dtype)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True)
    position_R = torch.empty_like(rows_R)
    position_R[rows_R] = torch.arange(rows_R.numel(), device=ids_R.device)
    position_R = torch.where(owned_R, position_R, -1)
    return rows_R.int(), offsets_E.int(), position_R.int().view(ids_TK.shape)


def _fake(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    check_dims("sort_tokens", "ids", ids_TK, "[T, K]")
    check(ids_TK.dtype in (torch.int32, torch.int64), "sort_tokens", "int ids", ids_TK.dtype)
    check(num_experts >= 1, "sort_tokens", "num_experts >= 1", num_experts)
    T, K = ids_TK.shape
    new = lambda *shape: ids_TK.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return new(T * K), new(num_experts), new(T, K)


def _cpu(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _fake(ids_TK, num_experts)
    return sort_tokens_reference(ids_TK, num_experts)


sort_tokens = define(
    "sort_tokens(Tensor ids, int num_experts) -> (Tensor rows, Tensor offsets, Tensor position)",
    cpu=_cpu,
    cuda=_cpu,
    fake=_fake,
)
