"""Memory of each GPU that the other GPUs of a group write to, for kernels that exchange rows.

An inbox holds 64-bit words: 32 bits of payload and the number of the exchange that they belong to.
A word arrives whole, so who waits for the number needs no barrier and no fence. Exchanges
alternate between two halves: a rank writes into the half of exchange e + 2 only after it has read
what every peer sent in e + 1, which the peer sent after it had read all of e.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_compile.ops._process_groups import process_group


@dataclass
class Inbox:
    """What one rank holds for one group.

    words: int64 [2, ranks, rows, row_words], symmetric memory: what each rank sent to this one.
    addresses: int64 [ranks], where each rank's `words` lie as this GPU sees them.
    exchanges: int32 [rows], how many there were of each row.
    fastest: most rows for which the exchange beats NCCL, by hidden size and dtype; equal on all
        ranks.
    """

    rank: int
    words: Tensor
    addresses: Tensor
    exchanges: Tensor
    fastest: dict[tuple[int, torch.dtype], int] = field(default_factory=dict)
    handle: Any = None

    @property
    def rows(self) -> int:
        return self.words.shape[2]

    @property
    def row_words(self) -> int:
        return self.words.shape[3]

    @property
    def ranks(self) -> int:
        return self.words.shape[1]

    def takes(self, rows: int, row_bytes: int) -> bool:
        """Is there room for an exchange of this size?"""
        return rows <= self.rows and row_bytes <= 4 * self.row_words


_INBOXES: dict[str, tuple[Any, Inbox]] = {}
_OUTGROWN: list[Inbox] = []


def open_inbox(group_name: str, rows: int, row_bytes: int) -> Inbox:
    """The group's inbox, made if there is none of this size. All ranks call it together."""
    import torch.distributed._symmetric_memory as symmetric_memory

    old = inbox_of(group_name)
    if old is not None and old.takes(rows, row_bytes):
        return old
    if old is not None:  # CUDA graphs recorded before go on with the old one
        rows, row_bytes = max(rows, old.rows), max(row_bytes, 4 * old.row_words)
        _OUTGROWN.append(old)
    group, row_words = process_group(group_name), row_bytes // 4
    shape = (2, group.size(), rows, row_words)
    device = torch.device("cuda", torch.cuda.current_device())
    words = symmetric_memory.empty(*shape, dtype=torch.int64, device=device)
    words.zero_()
    handle = symmetric_memory.rendezvous(words, group)
    addresses = [handle.get_buffer(r, shape, torch.int64).data_ptr() for r in range(group.size())]
    inbox = Inbox(
        dist.get_rank(group),
        words,
        torch.tensor(addresses, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        {} if old is None else old.fastest,
        handle,
    )
    torch.cuda.synchronize()
    dist.barrier(group)  # nobody writes before everybody's words are zero
    _INBOXES[group_name] = (group, inbox)
    return inbox


def inbox_of(group_name: str) -> Inbox | None:
    """The group's inbox, if it was opened; a later group of the same name has none."""
    group, inbox = _INBOXES.get(group_name, (None, None))
    try:
        return inbox if inbox is not None and process_group(group_name) is group else None
    except (RuntimeError, KeyError, ValueError):
        return None
