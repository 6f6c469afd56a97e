"""Which blocks a launch takes: those measured for its shape or one near, else the analytic model's.

`_tune.py` measures, when it is asked to; a launch only looks up. What was measured stays on disk
(`_measured.py`) under the kernel, the device's family (its name and number of SMs), the version of
Triton and a hash of the kernel's source file: where one of these is another, it is not found.

Blocks decide in which order a sum is added up. So that ranks which compute the same get the same to
the bit, a process that is one of several of a job when it first launches reads nothing by itself:
`_tune.share` gives all ranks what the first one has.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import triton

from moe_compile.ops import _measured

log = logging.getLogger("moe_compile")

Kind = tuple[Any, ...]
Sizes = tuple[int, ...]
Table = dict[tuple[str, Sizes], tuple[int, ...]]  # blocks by the kind, as it prints, and the sizes
B = TypeVar("B", bound=tuple[Any, ...])

_MOST_CHOSEN = 4096  # of which each prompt length is one


class Tuned:
    """A kernel whose blocks may have been measured.

    name, source: what it is called, and the file in this folder that it is in.
    takes: whether blocks measured for other sizes serve these; blocks measured for a kind serve
        every launch of that kind otherwise.
    """

    def __init__(
        self, name: str, source: str, takes: Callable[[Sizes, Any], bool] | None = None
    ) -> None:
        self.name, self.source, self.takes = name, source, takes
        self._chosen: dict[tuple[int | None, Kind, Sizes], Any] = {}
        self._tables: dict[str, Table] = {}
        KERNELS[name] = self

    def chosen(
        self, device: torch.device, kind: Kind, sizes: Sizes, choose: Callable[..., B], *args: Any
    ) -> B:
        """Blocks for a launch; `choose(*args)` is the analytic model.

        kind: what has to be equal (dtypes, layouts, what is compiled into the kernel).
        sizes: what may be up to twice as large or small; the nearest are taken.
        """
        key = (device.index, kind, sizes)
        blocks: B | None = self._chosen.get(key)
        if blocks is None:
            if len(self._chosen) >= _MOST_CHOSEN:
                self._chosen.clear()
            blocks = self._chosen[key] = self._choose(device, kind, sizes, choose(*args))
        return blocks

    def _choose(self, device: torch.device, kind: Kind, sizes: Sizes, analytic: B) -> B:
        if _asked is not None:
            _asked[Asked(self, device, kind, sizes)] = analytic
        found = self._nearest(self.table(family_of(device)), kind, sizes, analytic)
        return analytic if found is None else found

    def _nearest(self, table: Table, kind: Kind, sizes: Sizes, analytic: B) -> B | None:
        if not table:
            return None
        same, near = repr(kind), []
        as_analytic: Any = type(analytic)  # a named tuple
        for (other, measured), blocks in table.items():
            if other != same or len(blocks) != len(analytic) or len(measured) != len(sizes):
                continue
            far = list(map(_factors_of_two, sizes, measured))
            whole: Any = as_analytic(*blocks)
            takes = sizes == measured or self.takes is None or self.takes(sizes, whole)
            if max(far) <= 1 and takes:
                near.append((sum(far), measured, whole))
        return min(near)[2] if near else None

    def table(self, family: str) -> Table:
        """What is known of a family of devices."""
        if family not in self._tables:
            self._tables[family] = {} if is_one_of_several() else self.read(family)
        return self._tables[family]

    def read(self, family: str) -> Table:
        """What the disk has of it."""
        table: Table = {}
        for key, value in _measured.load(self._folder(family)).items():
            try:
                kind, sizes = json.loads(key)
                blocks = tuple(value["blocks"])
                if not all(isinstance(number, int) for number in (*sizes, *blocks)):
                    raise ValueError(f"expected whole numbers, got {sizes}, {blocks}")
                table[str(kind), tuple(sizes)] = blocks
            except (ValueError, TypeError, KeyError) as error:
                log.warning("ignored blocks of %s: %s: %s", self.name, key, error)
        return table

    def keep(
        self,
        family: str,
        kind: Kind,
        sizes: Sizes,
        blocks: tuple[Any, ...],
        us: float,
        on_disk: bool = True,
    ) -> None:
        """Take these blocks from the next launch on, and with `on_disk` in later processes."""
        self.table(family)[repr(kind), sizes] = tuple(blocks)
        self._chosen.clear()
        if on_disk:
            value = {"blocks": list(blocks), "us": round(us, 3)}
            _measured.save(self._folder(family), json.dumps([repr(kind), sizes]), value)

    def replace(self, family: str, table: Table) -> None:
        """Take these measurements, whatever was known of the family."""
        self._tables[family] = table
        self._chosen.clear()

    def forget(self) -> None:
        """Look everything up again, on disk too."""
        self._tables.clear()
        self._chosen.clear()

    def _folder(self, family: str) -> str:
        return repr((self.name, family, triton.__version__, _hash_of(self.source)))


class Asked(NamedTuple):
    """A kernel and what it was launched with."""

    kernel: Tuned
    device: torch.device
    kind: Kind
    sizes: Sizes

    def is_measured(self) -> bool:
        """For these very sizes?"""
        return (repr(self.kind), self.sizes) in self.kernel.table(family_of(self.device))


KERNELS: dict[str, Tuned] = {}  # by name
_asked: dict[Asked, Any] | None = None


@contextlib.contextmanager
def recording() -> Iterator[dict[Asked, Any]]:
    """Gather what launches ask for, with the analytic model's blocks."""
    global _asked
    for kernel in KERNELS.values():
        kernel._chosen.clear()  # what is in there does not ask
    _asked, before = {}, _asked
    try:
        yield _asked
    finally:
        _asked = before


@functools.cache
def family_of(device: torch.device) -> str:
    """Devices on which the same blocks are the fastest."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} SMs"


def _factors_of_two(size: int, other: int) -> float:
    return abs(math.log2(max(size, 1) / max(other, 1)))


def is_one_of_several() -> bool:
    """Is this process a rank of a job of several?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def _hash_of(source: str) -> str:
    return hashlib.sha256((Path(__file__).parent / source).read_bytes()).hexdigest()
