"""Measure up to how many rows the fused all-reduce is faster, alike on all ranks."""

import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton

from moe_compile.ops import _measured
from moe_compile.ops._process_groups import process_group
from moe_compile.ops._symmetric_memory import Inbox, open_inbox
from moe_compile.ops.all_reduce_add_rms_norm import exchange
from moe_compile.pipeline import source_hash

_c10d = torch.ops._c10d_functional
_CALLS, _ROUNDS = 20, 7


def measure(hidden_size: int, dtype: torch.dtype, group_name: str, most_rows: int) -> int:
    """Open the group's inbox and fill in its `fastest`; see parallel.use_symmetric_memory."""
    group = process_group(group_name)
    _check(hidden_size, dtype, group, most_rows)
    try:
        inbox = open_inbox(group_name, most_rows, hidden_size * dtype.itemsize)
    except RuntimeError as error:
        raise RuntimeError(
            "use_symmetric_memory: expected GPUs that read and write each other's memory, "
            f"got {error}"
        ) from error
    family = repr((
        "all_reduce_add_rms_norm", torch.cuda.get_device_name(), torch.__version__,
        triton.__version__, torch.cuda.nccl.version(), source_hash(Path(__file__).parent),
    ))  # fmt: skip
    key = repr((group.size(), hidden_size, str(dtype), most_rows))
    kept = _from_first(_measured.load(family).get(key, -1), group)
    if kept < 0:
        kept = _fastest(hidden_size, dtype, inbox, group_name, most_rows)
        if dist.get_rank(group) == 0:
            _measured.save(family, key, kept)
    inbox.fastest[hidden_size, dtype] = kept
    return kept


def _check(hidden_size: int, dtype: torch.dtype, group: Any, most_rows: int) -> None:
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend(group):
        _refuse("a group of GPUs, with the NCCL backend", dist.get_backend(group))
    # First what may differ between ranks: one that raised alone would leave the others waiting.
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, (platform.node(), hidden_size, str(dtype), most_rows), group)
    if len(set(hosts)) > 1:
        _refuse("one host, and the same arguments on all ranks", hosts)
    if dtype not in (torch.bfloat16, torch.float16):
        _refuse("bfloat16 or float16", dtype)
    if hidden_size < 2 or hidden_size % 2:
        _refuse("an even hidden size", hidden_size)
    if not 0 < most_rows <= 1024:
        _refuse("most_rows from 1 to 1024", most_rows)


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"use_symmetric_memory: expected {expected}, got {got}")


def _fastest(
    hidden_size: int, dtype: torch.dtype, inbox: Inbox, group_name: str, most_rows: int
) -> int:
    """The most rows up to which, by doubling, the one kernel beat the group's all-reduce."""
    group, fastest, rows = process_group(group_name), 0, 1
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.ones(hidden_size, dtype=dtype, device="cuda")
    while rows <= most_rows:
        x = torch.randn(rows, hidden_size, device="cuda", generator=generator).to(dtype)

        def fused(x: torch.Tensor = x) -> Any:
            return exchange(x, x, weight, 1e-6, inbox, True)

        def plain(x: torch.Tensor = x) -> Any:
            total = _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group_name))
            return exchange(total, x, weight, 1e-6, None, True)

        first, second = times(fused, plain, group=group)
        if not _from_first(int(first < second), group):
            break
        fastest, rows = rows, rows * 2
    return fastest


def times(*fns: Callable[[], Any], group: Any) -> list[float]:
    """Median seconds of each function in CUDA graphs of many calls, in turn, on all ranks."""
    graphs = []
    for fn in fns:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        dist.barrier(group)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not "global": NCCL's watchdog asks for events in a thread of its own.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(_CALLS):
                fn()
        graphs.append(graph)
    spent: list[list[float]] = [[] for _ in fns]
    for _ in range(_ROUNDS):
        for graph, mine in zip(graphs, spent, strict=True):
            graph.replay()  # ranks meet in it
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            mine.append(start.elapsed_time(end) / _CALLS / 1e3)
    return [statistics.median(mine) for mine in spent]


def _from_first(value: int, group: Any) -> int:
    """The first rank's number, on all ranks."""
    shared = torch.tensor([value], device="cuda")
    dist.broadcast(shared, dist.get_global_rank(group, 0), group)
    return int(shared.item())
