"""Placements through matrix products, attention, embeddings and the stages of experts."""

from torch import fx

from moe_compile.passes._graph import arg, args, val
from moe_compile.passes._here import Here, first, first_unknown, joined, kinds, name_of
from moe_compile.passes._placement import EXPERTS, Placement, partial, replicated, shard, unknown


def mm_rule(here: Here) -> Placement:
    a, b = args(here.node)[:2]
    return _product(here, here.of(a), here.of(b), val(a).ndim)


def addmm_rule(here: Here) -> Placement:
    bias, a, b = args(here.node)[:3]
    p, q = _product(here, here.of(a), here.of(b), 2), here.of(bias)
    if p.is_partial and q.is_replicated and not q.nth:
        here.counted_often(q)
        return p
    if p.is_partial or q.is_partial:
        return (
            p if p.is_partial and (q.is_partial or q.nth) else unknown("a bias and a partial sum")
        )
    if p.is_replicated and q.is_replicated:
        return replicated(sure=p.sure and q.sure)
    if p.is_shard and q.is_shard and q.dim == 0 and p.dim == 1:
        return p
    return first_unknown([p, q]) or unknown(f"a bias and a product, {kinds([q, p])}")


def _product(here: Here, p: Placement, q: Placement, ndim: int) -> Placement:
    """Of [.., M, K] and [.., K, N]; both may have a batch dim in front."""
    if p.is_partial and q.is_partial:
        return here.missing_reduce(p)
    if why := first_unknown([p, q]):
        return why
    if p.is_replicated and q.is_replicated:
        return replicated(p.origin or q.origin, sure=p.sure and q.sure)
    if p.is_partial or q.is_partial:
        one, other = (p, q) if p.is_partial else (q, p)
        return one if other.is_replicated else unknown(f"a product of {kinds([p, q])}")
    M, K = ndim - 2, ndim - 1
    if p.is_shard and q.is_shard:
        if (p.dim, q.dim) == (K, M):
            return partial(here.node)
        return p if p.dim == q.dim < M else unknown(f"a product of {p} and {q}")
    if p.is_shard and p.dim == M:
        return p
    if q.is_shard and q.dim == K:
        return q
    return unknown(f"a product of {kinds([p, q])}")


def attention_rule(here: Here) -> Placement:
    found = [here.of(n) for n in here.inputs]
    by_heads = all(p.is_shard and p.dim == 1 for p in found[:3])
    if by_heads and all(p.is_shard or p.is_replicated for p in found):
        return found[0]
    return strict_rule(here)


def embedding_rule(here: Here) -> Placement:
    w, ids = (here.of(n) for n in args(here.node)[:2])
    if why := first_unknown([w, ids]):
        return why
    if w.is_shard and w.dim == 1 and ids.is_replicated:
        return w.moved(val(here.node).ndim - 1)
    if w.is_replicated:
        return ids if not ids.is_replicated else replicated(sure=w.sure and ids.sure)
    return unknown(f"an embedding of {kinds([w, ids])}")


def grouped_mm_rule(here: Here) -> Placement:
    """x [N, H], w [E, H, G]: experts or features may be sharded."""
    x, w = (here.of(n) for n in args(here.node)[:2])
    if x.is_partial:
        return here.missing_reduce(x)
    if why := first_unknown([x, w]):
        return why
    if w.is_shard and w.dim == 0:
        return shard(EXPERTS, here.node) if x.is_replicated or x.dim == EXPERTS else unknown("rows")
    rest = [here.of(n) for n in here.inputs[2:]]
    if why := first_unknown(rest):
        return why
    if x.is_shard and x.dim == 1 and w.is_shard and w.dim == 1:
        bias = arg(here.node, 5, "bias")
        if isinstance(bias, fx.Node) and here.of(bias).is_replicated and not here.of(bias).nth:
            here.counted_often(here.of(bias))
        return partial(here.node)
    if x.is_replicated and w.is_shard and w.dim == 2:
        return w.moved(1)
    if x.is_replicated and w.is_replicated:
        return joined(here, [x, w, *rest])
    return unknown(f"grouped_mm of {kinds([x, w])}")


def combine_rule(here: Here) -> Placement:
    y, position, weights = (here.of(n) for n in args(here.node)[:3])
    if y.is_shard and y.dim == EXPERTS and not weights.is_partial:
        # Every rank adds up the rows of its own experts, whatever it holds for the others.
        return partial(here.node)
    if y.is_unknown or y.is_partial:
        return y if weights.is_replicated else first_unknown([y, weights]) or unknown("a combine")
    if why := first_unknown([y, position, weights]):
        return why
    return y if y.is_shard else joined(here, [y, position, weights])


def strict_rule(here: Here) -> Placement:
    """Ops of ours that make no sense of a partial sum."""
    found = [here.of(n) for n in here.inputs]
    if (p := first(found, "partial")) is not None:
        return here.missing_reduce(p)
    if why := first_unknown(found):
        return why
    if all(p.is_replicated for p in found):
        return joined(here, found)
    return found[0] if len(found) == 1 else unknown(f"{name_of(here.node)} of {kinds(found)}")
