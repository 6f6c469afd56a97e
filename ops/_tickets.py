"""Counters by which a kernel's programs learn which of them is the last.

What several programs share, as the parts of a sum or the logits of a row, the last of them to come
can finish, and no second kernel is launched for it. The counters are zero before and after every
launch, so that nothing has to clear them.

No two launches that run at once may have the same ones. Launches of a stream run one after another
(one that starts early waits before it counts), so they share the stream's. A captured launch is
replayed in any stream, beside anything but itself: it gets counters that no other launch ever has.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 2**14  # counters of one launch
_CAPTURED = 2**20  # and of all captured ones, until there is room for as many again


@triton.jit
def is_last(ticket_ptr, programs):  # type: ignore[no-untyped-def]
    """Is this the last of so many programs to come here? It sees what they wrote before they did.

    What it reads of theirs it should read past L1 (`cache_modifier=".cg"`).
    """
    tl.debug_barrier()  # all threads have written
    before = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    last = before == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@dataclass
class _Counters:
    """Of one device."""

    of_streams: dict[int, Tensor] = field(default_factory=dict)
    of_captured: Tensor | None = None
    given: int = 0


_COUNTERS: dict[torch.device, _Counters] = {}
_OUTGROWN: list[Tensor] = []  # graphs still count with them


def tickets(x: Tensor, count: int) -> Tensor | None:
    """`count` int32 zeros on x's device for the launch that comes next in the current stream.

    None where there are none: more than MOST, or a capture before the first launch outside of one.
    """
    if not x.is_cuda:  # the interpreter runs one launch at a time
        return torch.zeros(count, dtype=torch.int32)
    if count > MOST:
        return None
    mine = _COUNTERS.setdefault(x.device, _Counters())
    if torch.cuda.is_current_stream_capturing():
        return _captured(mine, count)
    if mine.of_captured is None or mine.given > _CAPTURED // 2:
        if mine.of_captured is not None:
            _OUTGROWN.append(mine.of_captured)
        mine.of_captured, mine.given = _zeros(_CAPTURED, x.device), 0
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if stream not in mine.of_streams:
        mine.of_streams[stream] = _zeros(MOST, x.device)
    return mine.of_streams[stream]


def _captured(mine: _Counters, count: int) -> Tensor | None:
    if mine.of_captured is None or mine.given + count > _CAPTURED:
        return None
    mine.given += count
    return mine.of_captured[mine.given - count : mine.given]


def _zeros(count: int, device: torch.device) -> Tensor:
    """Made by another thread: in this one a CUDA graph's pool may be the one that is allocated of,
    and that takes its memory back."""

    def make() -> Tensor:
        with torch.cuda.device(device):
            zeros = torch.zeros(count, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
            return zeros

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
