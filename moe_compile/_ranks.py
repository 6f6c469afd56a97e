"""Run graphs with collectives for all ranks in one process: for tests of what passes do."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.ops import moe
from moe_compile.ops.all_reduce_add_rms_norm import add_rms_norm_reference
from moe_compile.ops.shard import shard_reference
from moe_compile.passes._collectives import (
    _PLAIN,
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    COLLECTIVES,
    REDUCE_SCATTER,
    SHARD,
    WAIT,
    c10d,
)
from moe_compile.passes._constants import constants_of

Call = tuple[Any, list[Any]]  # the op and its arguments, on one rank
Steps = Generator[Call, Any, Any]


def run_ranks(
    gms: fx.GraphModule | Sequence[fx.GraphModule],
    inputs: Sequence[Sequence[Any]],
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> list[Any]:
    """Run a graph, or one a rank, on each rank's inputs; what each rank returns.

    groups: the ranks of each group by its name in the graph, as a list of lists: a rank takes part
    in the list that it stands in. Names not given are all ranks.
    Errors: RuntimeError where the ranks do not issue the same collectives and real ones would hang.
    """
    n = len(inputs)
    graphs = [gms] * n if isinstance(gms, fx.GraphModule) else list(gms)
    runs = [_steps(gm, values) for gm, values in zip(graphs, inputs, strict=True)]
    results: list[Any] = [None] * n
    waiting: dict[int, Call] = {}

    def resume(rank: int, value: Any) -> None:
        try:
            waiting[rank] = runs[rank].send(value)
        except StopIteration as done:
            results[rank] = done.value

    for rank in range(n):
        resume(rank, None)
    while waiting:
        for ranks in _ready(waiting, n, groups or {}):
            calls = [waiting.pop(rank) for rank in ranks]
            for rank, value in zip(ranks, _together(calls), strict=True):
                resume(rank, value)
            break
        else:
            shown = ", ".join(f"rank {r} in {_shown(c)}" for r, c in sorted(waiting.items()))
            raise RuntimeError(
                f"run_ranks: expected the same collectives on all ranks, got {shown}"
            )
    return results


def _steps(gm: fx.GraphModule, inputs: Sequence[Any]) -> Steps:
    """The nodes of one rank, stopping at each collective for what it returns."""
    constants = [c.recipe(*[inputs[i] for i in c.sources]) for c in constants_of(gm.graph)]
    rest = iter([*inputs, *constants])
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(rest)
        elif node.op == "get_attr":
            env[node] = getattr(gm, node.target)
        elif node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        else:
            given = fx.map_arg(node.args, env.__getitem__)
            named = fx.map_arg(node.kwargs, env.__getitem__)
            if node.target is WAIT:
                env[node] = given[0]
            elif node.target in COLLECTIVES or node.target is SHARD:
                env[node] = yield node.target, list(given)
            elif node.target is moe.all_reduce_add_rms_norm.default:
                x, residual, weight, eps, group, round_first = given
                x = yield ALL_REDUCE, [x, "sum", group]
                env[node] = add_rms_norm_reference(x, residual, weight, eps, round_first)
            else:
                env[node] = node.target(*given, **named)
    return None


def _ready(
    waiting: Mapping[int, Call], n: int, groups: Mapping[str, Sequence[Sequence[int]]]
) -> Generator[list[int], None, None]:
    """The groups of which all ranks wait in the same collective."""
    for rank, (target, given) in waiting.items():
        parts = groups.get(_group(given), [range(n)])
        ranks = next((list(p) for p in parts if rank in p), None)
        if ranks is None:
            raise ValueError(f"run_ranks: expected rank {rank} in group {_group(given)!r}")
        others = [waiting.get(r) for r in ranks]
        if all(o is not None and _static((target, given)) == _static(o) for o in others):
            yield ranks


def _group(given: list[Any]) -> str:
    return str(given[-1])


def _static(call: Call) -> tuple[Any, ...]:
    """What has to be equal on all ranks."""
    target, given = call
    shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(given[0])]
    fixed = () if target is c10d.all_to_all_single.default else (tuple(shapes), *given[1:])
    return target, fixed, _group(given)


def _together(calls: list[Call]) -> list[Any]:
    """What each rank of a group gets, in the group's order."""
    target = calls[0][0]
    own = [c[1][0] for c in calls]
    if target in _PLAIN:
        columns = [_one(_PLAIN[target], list(xs), calls) for xs in zip(*own, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]
    return _one(target, own, calls)


def _one(target: Any, own: list[Tensor], calls: list[Call]) -> list[Tensor]:
    given, n = calls[0][1], len(own)
    if target is ALL_REDUCE:
        total = _REDUCE[given[1]](torch.stack(own))
        return [total.clone() for _ in own]
    if target is REDUCE_SCATTER:
        return [part.clone() for part in _REDUCE[given[1]](torch.stack(own)).chunk(n)]
    if target is ALL_GATHER:
        return [torch.cat(own) for _ in own]
    if target is BROADCAST:
        return [own[given[1]].clone() for _ in own]
    if target is SHARD:
        return [shard_reference(x, given[1], n, rank) for rank, x in enumerate(own)]
    parts = [x.split(c[1][2]) for x, c in zip(own, calls, strict=True)]  # all_to_all_single
    return [torch.cat([parts[source][rank] for source in range(n)]) for rank in range(n)]


def _shown(call: Call) -> str:
    return f"{call[0]}{list(_static(call)[1:])}"


_REDUCE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(0),
    "avg": lambda x: x.mean(0),
    "max": lambda x: x.amax(0),
    "min": lambda x: x.amin(0),
    "product": lambda x: x.prod(0),
}
