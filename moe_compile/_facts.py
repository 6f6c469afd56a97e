"""What the inputs of a compile say of how they lie on the ranks: DTensors, marked parameters."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_compile.ops._process_groups import known_groups
from moe_compile.ops._symmetric_memory import inbox_of
from moe_compile.passes._collectives import Group
from moe_compile.passes._placement import Placement, partial, replicated, shard, unknown
from moe_compile.passes.placements import set_facts

_KEY = "_moe_compile_placements"
Facts = list[tuple[Group, Placement]]


def facts_of(inputs: Sequence[Any]) -> list[tuple[Any, Facts]]:
    """Each tensor or number that the inputs come down to in a graph, with its facts."""
    found: list[tuple[Any, Facts]] = []
    for x in inputs:
        found += _flat(x, [])
    return found


def _flat(x: Any, facts: Facts) -> list[tuple[Any, Facts]]:
    if isinstance(x, Tensor) and is_traceable_wrapper_subclass(x):
        mine = _of_dtensor(x) or facts
        return [
            leaf for name in x.__tensor_flatten__()[0] for leaf in _flat(getattr(x, name), mine)
        ]
    return [(x, getattr(x, _KEY, None) or facts)]


def _of_dtensor(x: Any) -> Facts:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(x, DTensor):
        return []
    facts: Facts = []
    for index, placement in enumerate(x.placements):
        known: Placement
        if isinstance(placement, Replicate):
            known = replicated()
        elif isinstance(placement, Partial):
            known = partial(None) if placement.reduce_op == "sum" else unknown("a partial maximum")
        elif (dim := getattr(placement, "dim", None)) is not None:
            known = shard(dim % x.ndim)
        else:
            continue
        facts.append((_group(x.device_mesh.get_group(index)), known))
    return facts


def _group(group: Any) -> Group:
    return Group(tuple(dist.get_process_group_ranks(group)), group.group_name)


def place_inputs(gm: fx.GraphModule, facts: Sequence[tuple[Any, Facts]]) -> None:
    """Hand the facts to the graph's placeholders, where these are the inputs one by one."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(facts) or not any(mine for _, mine in facts):
        return
    if all(_is_of(p, x) for p, (x, _) in zip(placeholders, facts, strict=True)):
        for placeholder, (_, mine) in zip(placeholders, facts, strict=True):
            if mine:
                set_facts(placeholder, mine)


def _is_of(placeholder: fx.Node, x: Any) -> bool:
    value = placeholder.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(x, Tensor):
        return isinstance(value, Tensor) == isinstance(x, Tensor)
    return value.dtype == x.dtype and value.ndim == x.ndim


def ranks_key(facts: Sequence[tuple[Any, Facts]]) -> str:
    """Names what passes know of ranks, for cache keys: graphs hold the names of groups alone."""
    if not dist.is_initialized():
        return ""
    named = [
        (str(g.group_name), *dist.get_process_group_ranks(g), _fastest(g)) for g in known_groups()
    ]
    mine = [[(g.ranks, p.kind, p.dim) for g, p in found] for _, found in facts]
    return repr((sorted(named), mine))


def _fastest(group: Any) -> str:
    """Up to how many rows an all-reduce is fused, which decides graphs, too."""
    inbox = inbox_of(str(group.group_name))
    return "" if inbox is None else repr(sorted(inbox.fastest.items(), key=repr))


def mark_parameters(module: nn.Module, group: Any) -> None:
    """Note on each plain parameter and buffer that all ranks of the group hold the same."""
    fact = (_group(group), replicated())
    for x in (*module.parameters(), *module.buffers()):
        if not is_traceable_wrapper_subclass(x):
            others = [f for f in getattr(x, _KEY, []) if f[0] != fact[0]]
            setattr(x, _KEY, [*others, fact])
