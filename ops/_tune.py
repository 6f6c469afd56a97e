"""Measure which blocks are the fastest for launches that were recorded, and keep them.

    share(device)
    with recording() as asked:
        ...  # launches
    keep([job.measured(device) for job in jobs(asked, device)], device)

All ranks of a job call these together: they know the same before and after, and share the work.
"""

import contextlib
import functools
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from triton.errors import TritonError

from moe_compile.ops import _candidates, _scratch
from moe_compile.ops._tuned import KERNELS, Asked, Kind, Sizes, family_of, is_one_of_several

log = logging.getLogger("moe_compile")

Timer = Callable[[Sequence[Callable[[], Any]]], float]
_LEAST_GAIN = 0.02  # less may be chance, and the analytic model's blocks stay
_MOST_ERROR = 0.02  # of the largest value: more than another order of summing makes in bfloat16


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """The median time of one call, replayed from a CUDA graph that makes them all in turn."""
    return statistics.median(times(calls, replays))


def times(calls: Sequence[Callable[[], Any]], replays: int) -> list[float]:
    """Microseconds of one call in each replay of that graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    found = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / len(calls))
    return found[2:]


class Measured(NamedTuple):
    """The fastest blocks of a kernel for one launch."""

    name: str
    kind: Kind
    sizes: Sizes
    blocks: tuple[Any, ...]
    us: float


class Job(NamedTuple):
    """A launch to measure, with the analytic model's blocks for it."""

    name: str
    kind: Kind
    sizes: Sizes
    analytic: Any

    def measured(self, device: torch.device, time: Timer = microseconds) -> Measured | None:
        """Time all candidates on tensors of their own. None where these do not fit in memory.

        Errors: RuntimeError while a CUDA graph is recorded, which would hold what is run here.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("tune: expected no CUDA graph being recorded, got one")
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        try:
            with torch.inference_mode(), on_device:
                return Measured(*self[:3], *self._fastest(device, time))
        except torch.OutOfMemoryError as error:
            log.warning("tune: left %s out: %s", self, str(error).splitlines()[0])
            return None

    def _fastest(self, device: torch.device, time: Timer) -> tuple[Any, float]:
        calls = getattr(_scratch, self.name)(self.kind, self.sizes, device)
        candidates = getattr(_candidates, self.name)(self.kind, self.sizes, self.analytic)
        want = _copied(calls[0](self.analytic))
        best, us = self.analytic, time(_with(calls, self.analytic))
        least = us * (1 - _LEAST_GAIN)
        takes = KERNELS[self.name].takes
        for blocks in candidates:
            if blocks == self.analytic or not (takes is None or takes(self.sizes, blocks)):
                continue
            try:
                if not _agree(calls[0](blocks), want):
                    log.warning("tune: %s computes something else with %s", self, blocks)
                    continue
                found = time(_with(calls, blocks))
            except torch.OutOfMemoryError:
                raise
            except (TritonError, RuntimeError) as error:  # more shared memory than there is, say
                log.debug("tune: %s does not run with %s: %s", self, blocks, error)
                continue
            if found < least:
                best, us, least = blocks, found, found
        log.info("tune: %s takes %s, %.2f us", self, tuple(best), us)
        return best, us


def jobs(asked: Mapping[Asked, Any], device: torch.device) -> list[Job]:
    """What was asked for and is not measured: of what all ranks were asked, this one's share."""
    family = family_of(device)
    own = [
        Job(a.kernel.name, a.kind, a.sizes, blocks)
        for a, blocks in asked.items()
        if family_of(a.device) == family and not a.is_measured()
    ]
    every = {job[:3]: job for rank in _from_all(own) for job in rank}
    found = sorted(every.values(), key=repr)
    return found[dist.get_rank() :: dist.get_world_size()] if is_one_of_several() else found


def keep(found: Iterable[Measured | None], device: torch.device) -> None:
    """Let all ranks take what all ranks found, and the first write it to disk."""
    is_first = not is_one_of_several() or dist.get_rank() == 0
    for rank in _from_all([one for one in found if one is not None]):
        for one in rank:
            kernel, what = KERNELS[one.name], (one.kind, one.sizes, one.blocks, one.us)
            kernel.keep(family_of(device), *what, on_disk=is_first)


def share(device: torch.device) -> None:
    """Let all ranks know what the first one does, from its disk too, and nothing else."""
    if not is_one_of_several():
        return
    family, first = family_of(device), dist.get_rank() == 0
    known = {name: kernel.read(family) for name, kernel in KERNELS.items()} if first else {}
    for name, table in _from_all(known)[0].items():
        KERNELS[name].replace(family, table)


def _from_all(value: Any) -> list[Any]:
    """Each rank's value; this one's, where it is alone."""
    if not is_one_of_several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _with(calls: Sequence[_scratch.Call], blocks: Any) -> list[Callable[[], Any]]:
    return [functools.partial(call, blocks) for call in calls]


def _copied(y: Any) -> list[Tensor]:
    return [y.clone()] if isinstance(y, Tensor) else [one.clone() for one in y]


def _agree(y: Any, want: Sequence[Tensor]) -> bool:
    """Not one in a compiler's thousand kernels is wrong, but it would be chosen for its speed."""
    pairs = zip([y] if isinstance(y, Tensor) else y, want, strict=True)
    return all((a.float() - b.float()).abs().max() <= _MOST_ERROR * b.abs().max() for a, b in pairs)
