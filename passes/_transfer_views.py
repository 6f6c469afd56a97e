"""Placements through views, and through reductions within a rank: where do the shards go?"""

import math
import operator
from dataclasses import replace

from torch import fx

from moe_compile.passes._graph import RESHAPES, arg, args, aten, is_call, same, val
from moe_compile.passes._here import Here, first_unknown, kinds, unsure_if_replicated
from moe_compile.passes._placement import EXPERTS, Placement, partial, unknown


def same_rule(here: Here) -> Placement:
    return here.of(args(here.node)[0])


def copy_rule(here: Here) -> Placement:
    destination, source = args(here.node)[:2]
    if val(destination).dtype == val(source).dtype:
        return here.of(source)
    return here.of(source) if not here.of(source).is_replicated else here.of(source).unsure()


def reshape_rule(here: Here) -> Placement:
    p, source = same_rule(here), args(here.node)[0]
    if not p.is_shard or p.dim == EXPERTS:
        return p
    old, new = list(val(source).shape), list(val(here.node).shape)
    before = math.prod(old[: p.dim])
    dims = [d for d in range(len(new)) if same(math.prod(new[:d]), before)]
    if not dims:
        return unknown("shards of a dim that is split or merged")
    asked = args(here.node)[1] if is_call(here.node, *RESHAPES) else ()
    # Of several, as when 16 become 1 x 16, the one that the model left open: it is the local one.
    open_ones = [d for d in dims if d < len(asked) and isinstance(asked[d], int) and asked[d] == -1]
    return p.moved(
        next((d for d in (*open_ones, *dims) if d in open_ones or not same(new[d], 1)), dims[0])
    )


def permute_rule(here: Here) -> Placement:
    p = same_rule(here)
    if not p.is_shard or p.dim == EXPERTS:
        return p
    order = list(range(val(here.node).ndim))
    if is_call(here.node, aten.permute.default):
        order = [d % len(order) for d in args(here.node)[1]]
    else:
        a, b = (d % len(order) for d in args(here.node)[1:3])
        order[a], order[b] = order[b], order[a]
    return p.moved(order.index(p.dim))


def expand_rule(here: Here) -> Placement:
    p, source = same_rule(here), args(here.node)[0]
    if not p.is_shard or p.dim == EXPERTS:
        return p
    return p.moved(p.dim + val(here.node).ndim - val(source).ndim)


def split_rule(here: Here) -> Placement:
    """Parts along a dim. One part out of n alone could be the own part of a rank.

    Where all are used, each in a place of its own, a rank could still choose the places.
    """
    p, source = same_rule(here), args(here.node)[0]
    dim = arg(here.node, 2, "dim", 0) % val(source).ndim
    used = {args(u)[1] for u in here.node.users if is_call(u, operator.getitem)}
    parts = len(here.node.meta["val"])
    if p.is_shard and p.dim == dim and parts != 2:
        return unknown("parts of shards")  # two: gate and up, each sharded, one behind the other
    if parts == here.group.size and len(used) < parts and not p.is_shard:
        return unknown("a part that could be the rank's own")
    return unsure_if_replicated(p)


def slice_rule(here: Here) -> Placement:
    p, source = same_rule(here), args(here.node)[0]
    dim = arg(here.node, 1, "dim", 0) % val(source).ndim
    whole, part = val(source).shape[dim], val(here.node).shape[dim]
    if same(whole, part):
        return p
    if p.is_shard:
        return p if p.dim != dim else unknown("a slice of shards")
    if p.table:
        return p.unsure()
    step = arg(here.node, 4, "step", 1)
    if step == 1 and same(part * here.group.size, whole):
        others = [u for u in source.users if u is not here.node and u.target is here.node.target]
        covered = sum(1 for u in others if same(val(u).shape[dim], part)) + 1
        if covered != here.group.size:
            return unknown("a slice that could be the rank's own")
    return unsure_if_replicated(p)


def select_rule(here: Here) -> Placement:
    p, source = same_rule(here), args(here.node)[0]
    dim = args(here.node)[1] % val(source).ndim
    if p.is_shard:
        return unknown("one of the shards") if p.dim == dim else p.moved(p.dim - (dim < p.dim))
    if same(val(source).shape[dim], here.group.size):
        return unknown("a part that could be the rank's own")
    return unsure_if_replicated(p)


def cat_rule(here: Here) -> Placement:
    found = [here.of(n) for n in args(here.node)[0]]
    if why := first_unknown(found):
        return why
    if len({(p.kind, p.dim, p.inner) for p in found}) > 1:
        return unknown(f"joined from {kinds(found)}")
    dim = arg(here.node, 1, "dim", 0) % val(here.node).ndim
    if found[0].is_shard and found[0].dim == dim:
        return unknown("shards joined with others along their dim")
    return replace(found[0], sure=all(p.sure for p in found))


def getitem_rule(here: Here) -> Placement:
    source = args(here.node)[0]
    return here.of(source)


def sum_rule(here: Here) -> Placement:
    p, source = same_rule(here), args(here.node)[0]
    if not p.is_shard or p.dim == EXPERTS:
        return unsure_if_replicated(p) if p.is_replicated and not p.sure else p
    dims = _dims(here.node, val(source).ndim)
    if p.dim in dims:
        return (
            partial(here.node)
            if is_call(here.node, aten.sum.dim_IntList)
            else unknown("a mean of shards")
        )
    keep = bool(arg(here.node, 2, "keepdim", False))
    return p.moved(p.dim if keep else p.dim - sum(d < p.dim for d in dims))


def nonlinear_reduction_rule(here: Here) -> Placement:
    p = same_rule(here)
    if p.is_partial:
        return here.missing_reduce(p)
    if not p.is_shard or p.dim == EXPERTS:
        return p
    dims = _dims(here.node, val(args(here.node)[0]).ndim)
    if p.dim in dims:
        return unknown("a reduction over shards")
    keep = bool(arg(here.node, 2, "keepdim", False))
    return p.moved(p.dim if keep else p.dim - sum(d < p.dim for d in dims))


def _dims(node: fx.Node, ndim: int) -> set[int]:
    dims = arg(node, 1, "dim", None)
    if dims is None or dims == []:
        return set(range(ndim))
    return {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
