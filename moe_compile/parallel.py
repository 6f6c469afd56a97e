"""What a model says of its parallelism: marks, own parts, and who reduces after the experts.

`group` is a ProcessGroup, a one-dimensional DeviceMesh, a pair (mesh, dim), or a group's name; None
is all ranks of the job.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_compile._facts import mark_parameters
from moe_compile._symmetric_memory import measure
from moe_compile.ops import moe
from moe_compile.ops._process_groups import group_size, process_group, world_group
from moe_compile.ops.mark_placement import check_mark
from moe_compile.passes.lint_collectives import CollectivesWarning

__all__ = [
    "CollectivesWarning",
    "mark_parameters_replicated",
    "mark_partial",
    "mark_replicated",
    "mark_shard",
    "post_experts_all_reduce",
    "shard",
    "should_skip_post_experts_all_reduce",
    "use_symmetric_memory",
]


def mark_replicated(x: Tensor, group: Any = None) -> Tensor:
    """x, of which every rank of the group holds the same; says so to the compiler."""
    return _mark(x, "replicated", 0, group)


def mark_partial(x: Tensor, group: Any = None) -> Tensor:
    """x, the sum of which over just the ranks of this group is the value meant.

    Also for what only one rank adds (`if rank == 0: y = y + mark_partial(shared)`), and for a
    partial sum that is returned on purpose.
    """
    return _mark(x, "partial", 0, group)


def mark_shard(x: Tensor, dim: int, group: Any = None) -> Tensor:
    """x, the rank's part along `dim` of a value that the group holds together, in rank order."""
    return _mark(x, "shard", dim, group)


def mark_parameters_replicated(module: nn.Module, group: Any = None) -> None:
    """Say that all ranks of the group hold the same in the module's parameters and buffers.

    DTensors say for themselves, and are left out. `moe_compile.prepare` does this for transformers'
    models with a tensor- or expert-parallel plan. Call it before the compile.
    """
    mark_parameters(module, process_group(_name_of(group)))


def _mark(x: Tensor, kind: str, dim: int, group: Any) -> Tensor:
    check_mark(x, kind, dim)
    if not torch.compiler.is_compiling():
        return x
    marked: Tensor = moe.mark_placement(x, kind, dim, _name_of(group))
    return marked


def shard(x: Tensor, dim: int = 0, group: Any = None) -> Tensor:
    """The rank's own part along `dim` of a value that every rank of the group holds.

    Say this and not `x.chunk(n)[rank]`: the graph is then the same on every rank, and an all-reduce
    before it can become a reduce-scatter.
    Shapes: x [.., D, ..] -> [.., D / n, ..]. Errors: ValueError if n ranks do not divide D.
    """
    name = _name_of(group)
    part: Tensor = moe.shard(x, dim, group_size(name), name)
    return part


def use_symmetric_memory(
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    group: Any = None,
    most_rows: int = 256,
) -> int:
    """Let graphs compiled from now on all-reduce few rows in one kernel with the norm behind them.

    All ranks of the group call it together, before the compile. It opens memory that the group's
    GPUs write to (8 * ranks * most_rows * hidden_size bytes), measures up to how many rows
    `all_reduce_add_rms_norm` beats the group's own all-reduce followed by a norm, and keeps that on
    disk for this kind of machine; the first rank's times count. Returns that number, at most
    `most_rows`; 0 where it never did.
    Errors: ValueError for a group without NCCL, of several hosts, or arguments that differ between
    ranks; RuntimeError where the GPUs can't write to each other's memory.
    """
    return measure(hidden_size, dtype, _name_of(group), most_rows)


def _name_of(group: Any) -> str:
    """The name by which graphs call a group; in a form that Dynamo traces."""
    if isinstance(group, str):
        return group
    if group is None:
        group = world_group()
    elif isinstance(group, tuple):
        group = group[0].get_group(group[1])
    elif isinstance(group, DeviceMesh):
        group = group.get_group()
    name: str = group.group_name
    return name


def should_skip_post_experts_all_reduce(
    *,
    is_tp_path: bool,
    use_reduce_scatter: bool = False,
    should_allreduce_fusion: bool = False,
    dp_reduce_scatterv: bool = False,
    fp4_all_gather: bool = False,
) -> bool:
    """Does somebody else reduce what the experts return, so that the layer must not?

    is_tp_path: asked for the all-reduce over the ranks that share an expert's features; False for
        that over the ranks that own different experts.
    use_reduce_scatter: the layer's caller reduce-scatters.
    should_allreduce_fusion: the next layer's norm reduces.
    dp_reduce_scatterv: with attention on parts of the batch, a reduce-scatter gives each rank its
        own tokens back.
    fp4_all_gather: the dispatch all-gathers quantised tokens, and its combine reduce-scatters
        over tensor parallelism; ranks of other experts hold other tokens there.
    Source: SGLang 0.5.12, whose table this is; every row is a test.
    Errors: ValueError for dp_reduce_scatterv with fp4_all_gather, which exclude each other.
    """
    if dp_reduce_scatterv and fp4_all_gather:
        raise ValueError(
            "should_skip_post_experts_all_reduce: expected dp_reduce_scatterv or fp4_all_gather, "
            "got both"
        )
    if should_allreduce_fusion or use_reduce_scatter or dp_reduce_scatterv:
        return True
    return fp4_all_gather and is_tp_path


def post_experts_all_reduce(
    x: Tensor,
    *,
    tp_group: Any = None,
    ep_group: Any = None,
    use_reduce_scatter: bool = False,
    should_allreduce_fusion: bool = False,
    dp_reduce_scatterv: bool = False,
    fp4_all_gather: bool = False,
) -> Tensor:
    """The experts' output, reduced over the groups given unless somebody else reduces it.

    x: partial over `ep_group` (each rank computed its own experts), `tp_group` (each computed its
    own features of all experts), or both; a group of None, or of one rank, is none. The switches
    are those of `should_skip_post_experts_all_reduce`, the one place that decides. Under
    torch.compile over both groups, where the ranks of both are all ranks, one all-reduce does.
    """
    for group, is_tp_path in ((ep_group, False), (tp_group, True)):
        if group is None:
            continue
        if should_skip_post_experts_all_reduce(
            is_tp_path=is_tp_path,
            use_reduce_scatter=use_reduce_scatter,
            should_allreduce_fusion=should_allreduce_fusion,
            dp_reduce_scatterv=dp_reduce_scatterv,
            fp4_all_gather=fp4_all_gather,
        ):
            continue
        name = _name_of(group)
        if group_size(name) > 1:
            x = _all_reduce(x, name)
    return x


def _all_reduce(x: Tensor, name: str) -> Tensor:
    made = torch.ops._c10d_functional.all_reduce(x, "sum", name)
    reduced: Tensor = torch.ops._c10d_functional.wait_tensor(made)
    return reduced
