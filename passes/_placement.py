"""How one value lies on the ranks of one group."""

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

from moe_compile.passes._collectives import Group

EXPERTS = -1  # the "dim" of rows that are whole on the rank that owns their expert


@dataclass(frozen=True)
class Placement:
    """What is known of a value, for one group of ranks.

    replicated: equal on all ranks. `sure`: by collectives and facts alone; else it also rests on
        whole numbers in the graph being the same on every rank, and no rank's index.
        `nth`: divided by the group's size, so that adding it on every rank adds it once.
        `whole`: an integer that a whole number of the graph went into, which could be a rank's
        index. As a position it is fine; compared or indexed with, it is unknown.
        `table`: computed from positions, constants and parameters, as rotary embeddings and masks
        are; a part of one is no part of anything that ranks would add up.
    partial: the sum over the ranks is the value meant. `exact`: of this group and no larger one.
        `inner`: subgroups over which it has been summed already.
    shard: the ranks hold its parts along `dim`; EXPERTS for rows of the experts that each owns.
    unknown: `why` says what is missing.
    """

    kind: Literal["replicated", "partial", "shard", "unknown"]
    dim: int = 0
    why: str = field(default="", compare=False)
    origin: fx.Node | None = field(default=None, compare=False)
    sure: bool = field(default=True, compare=False)
    nth: bool = False
    whole: bool = False
    table: bool = field(default=False, compare=False)
    exact: bool = field(default=False, compare=False)
    inner: tuple[Group, ...] = ()

    @property
    def is_replicated(self) -> bool:
        return self.kind == "replicated"

    @property
    def is_partial(self) -> bool:
        return self.kind == "partial"

    @property
    def is_shard(self) -> bool:
        return self.kind == "shard"

    @property
    def is_unknown(self) -> bool:
        return self.kind == "unknown"

    def unsure(self) -> "Placement":
        return replace(self, sure=False)

    def moved(self, dim: int) -> "Placement":
        """The same shards along another dim."""
        return replace(self, dim=dim)

    def __str__(self) -> str:
        where = "its expert" if self.dim == EXPERTS else f"dim {self.dim}"
        return f"shard of {where}" if self.is_shard else self.kind


def replicated(origin: fx.Node | None = None, *, sure: bool = True) -> Placement:
    return Placement("replicated", origin=origin, sure=sure)


def partial(origin: fx.Node | None, *, exact: bool = False) -> Placement:
    return Placement("partial", origin=origin, exact=exact)


def shard(dim: int, origin: fx.Node | None = None) -> Placement:
    return Placement("shard", dim, origin=origin)


def unknown(why: str) -> Placement:
    return Placement("unknown", why=why)
