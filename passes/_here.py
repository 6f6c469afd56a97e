"""One op under interpretation, and what its rule says."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_compile.passes._collectives import Group
from moe_compile.passes._graph import CASTS, COPIES, args, aten, is_parameter, strip_views, val
from moe_compile.passes._outcome import trail_of
from moe_compile.passes._placement import EXPERTS, Placement, replicated, unknown

Report = Callable[[fx.Node, str, str], None]  # the node, the kind of mistake, what is wrong


@dataclass(frozen=True)
class Here:
    """One node, one group, and what is known so far."""

    node: fx.Node
    group: Group
    of: Callable[[Any], Placement]
    report: Report

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if n.meta.get("val") is not None]

    def missing_reduce(self, p: Placement) -> Placement:
        """A partial sum where only the whole sum makes sense."""
        so_far = "".join(f", so far only over {g}" for g in p.inner)
        text = f"a sum over {self.group} that is still to be reduced{so_far} reaches "
        self.report(self.node, "missing reduce", text + name_of(self.node) + made_at(p))
        return unknown("it comes after a missing reduce")

    def counted_often(self, p: Placement) -> None:
        text = f"a value equal on all of {self.group} is added to a partial sum, "
        text += f"and counted {self.group.size} times once that is reduced"
        self.report(self.node, "replicated term", text + made_at(p))


def joined(here: Here, found: list[Placement]) -> Placement:
    sure = all(p.sure for p in found) and not whole_literals(here.node)
    origin = next((p.origin for p in found if p.origin is not None), None)
    pairs = zip(here.inputs, found, strict=False)  # those asked about come first
    of_table = [p.table or is_parameter(strip_views(n)) for n, p in pairs]
    table = all(of_table) and any(p.table for p in found)
    return replace(replicated(origin, sure=sure), table=table)


def all_replicated(found: list[Placement]) -> bool:
    return all(p.is_replicated for p in found)


def first(found: list[Placement], kind: str) -> Placement | None:
    return next((p for p in found if p.kind == kind), None)


def first_unknown(found: list[Placement]) -> Placement | None:
    return first(found, "unknown")


def kinds(found: list[Placement]) -> str:
    return ", ".join(map(str, found))


def name_of(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def made_at(p: Placement) -> str:
    source = trail_of(p.origin, 1) if p.origin is not None else ""
    return f" (made at {source})" if source else ""


def aligned(operand: fx.Node, dim: int, result: fx.Node) -> int:
    """A dim of an operand as that of the result that it is broadcast to."""
    return dim if dim == EXPERTS else dim + val(result).ndim - val(operand).ndim


def unsure_if_replicated(p: Placement) -> Placement:
    return p.unsure() if p.is_replicated else p


SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)


INTEGER = (*SUMS, aten.mul.Tensor, aten.mul.Scalar)


UNARY = (*CASTS, *COPIES, aten.neg.default)


def whole_literals(node: fx.Node) -> list[Any]:
    """Whole numbers among the operands, which could be a rank's index."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return []
    numbers = [a for a in args(node) if isinstance(a, (bool, int, float))]
    return [a for a in numbers if float(a).is_integer()]
