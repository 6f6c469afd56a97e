"""Keep the own part of a value that all ranks of a group hold: what a reduce-scatter would leave.

The rank is looked up when the op runs, so that the graph is the same on every rank and passes may
rewrite around it (`x[rank * k : (rank + 1) * k]` is another graph on each, and proves nothing).

Shapes: x [.., D, ..] -> [.., D / n, ..] for a group of n ranks, in the order of the group's ranks.
Dtypes: any.
Errors: ValueError if `dim` is out of range, or D is not a multiple of n.
"""

import torch.distributed as dist
from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._library import define
from moe_compile.ops._process_groups import process_group


def shard_reference(x: Tensor, dim: int, group_size: int, rank: int) -> Tensor:
    """What `shard` means on one rank of the group."""
    return x.chunk(group_size, dim)[rank].clone()


def _check(x: Tensor, dim: int, group_size: int) -> None:
    if not -x.ndim <= dim < x.ndim:
        check(False, "shard", f"dim within the {x.ndim} of x", dim)
    holds = x.shape[dim] % group_size == 0
    check(holds, "shard", f"x.shape[{dim}] as a multiple of {group_size} ranks", x.shape[dim])


def _shard(x: Tensor, dim: int, group_size: int, group_name: str) -> Tensor:
    _check(x, dim, group_size)
    rank = dist.get_rank(process_group(group_name))
    length = x.shape[dim] // group_size
    return x.narrow(dim, rank * length, length).clone()


def _fake(x: Tensor, dim: int, group_size: int, group_name: str) -> Tensor:
    _check(x, dim, group_size)
    shape = list(x.shape)
    shape[dim] = shape[dim] // group_size
    return x.new_empty(shape)


shard = define(
    "shard(Tensor x, int dim, int group_size, str group_name) -> Tensor",
    cpu=_shard,
    cuda=_shard,
    fake=_fake,
)
"""`shard` of one group; moe_compile.parallel.shard finds size and name of the group."""
