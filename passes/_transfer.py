"""What an op makes of the placements of its inputs, for one group of ranks.

Where a rule knows nothing it says unknown: a wrong "replicated" would become a wrong rewrite or a
false alarm, an unknown only a silence. Whole numbers are treated with suspicion, since tracing
leaves a rank's index as a literal: an integer tensor with one is unknown, and so is a slice that
could be a rank's own part.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._collectives import Group
from moe_compile.passes._graph import (
    CASTS,
    COPIES,
    RESHAPES,
    SQUEEZES,
    arg,
    args,
    aten,
    constant,
    has_val,
    is_call,
    is_parameter,
    prims,
    same,
    strip,
    strip_views,
    val,
)
from moe_compile.passes._outcome import trail_of
from moe_compile.passes._placement import (
    EXPERTS,
    Placement,
    partial,
    replicated,
    shard,
    unknown,
)

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
        self.report(self.node, "missing reduce", text + _name(self.node) + _made(p))
        return unknown("it comes after a missing reduce")

    def counted_often(self, p: Placement) -> None:
        text = f"a value equal on all of {self.group} is added to a partial sum, "
        text += f"and counted {self.group.size} times once that is reduced"
        self.report(self.node, "replicated term", text + _made(p))


def transfer(here: Here) -> Placement:
    """The placement of `here.node`'s value."""
    node = here.node
    found = [here.of(n) for n in here.inputs]
    if any(p.whole for p in found):
        return _with_whole_numbers(here, found)
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(here)
    if not found:
        return _made_from_nothing(node)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags:
        return _pointwise(here)
    if torch.Tag.nondeterministic_seeded in tags:
        return unknown("it is random")
    if all(p.is_replicated for p in found) and _is_known(node.target):
        return _all_replicated(here, found)
    if (p := _first(found, "partial")) and str(node.target).startswith(_NONLINEAR):
        return here.missing_reduce(p)
    return _why(found) or unknown(f"no rule for {_name(node)} of {_kinds(found)}")


def _with_whole_numbers(here: Here, found: list[Placement]) -> Placement:
    """Positions stay what they are until they become floats; a rank's index must not pass."""
    node, like = here.node, _all_replicated(here, found).unsure()
    if _all(found):
        if is_call(node, *CASTS) and val(node).is_floating_point():
            return like
        if is_call(node, *_INTEGER, *RESHAPES, *COPIES, *SQUEEZES, aten.expand.default):
            return replace(like, whole=True)
        if like.table and is_call(node, aten.slice.Tensor, aten.cat.default):
            return replace(like, whole=True)
        if like.table and is_call(node, aten.index.Tensor):
            return replace(like, whole=found[0].whole)
        if _is_distance(node) or (like.table and _is_order(node)):
            return like
    return unknown("an integer with a whole number in it, which could be a rank's")


def _is_distance(node: fx.Node) -> bool:
    """Is this a comparison of how far positions are apart, as in a causal mask?

    A rank's offset drops out where both come from the same positions (`p[1:] - p[:-1] != 1`); in an
    order of two different ones it is no mask of a rank.
    """
    source = args(node)[0] if node.args else None
    if not is_call(source, aten.sub.Tensor) or not all(map(has_val, args(source)[:2])):
        return False
    a, b = (strip(x, aten.slice.Tensor) for x in args(source)[:2])
    same_base = a is b and is_call(node, aten.eq.Scalar, aten.ne.Scalar)
    ordered = is_call(node, aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.gt.Scalar)
    return same_base or (ordered and val(source).ndim > 1)


def _is_order(node: fx.Node) -> bool:
    """Are two tables of positions compared, each with each?"""
    ordered = is_call(node, aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor)
    return ordered and val(node).ndim > 1


def _made_from_nothing(node: fx.Node) -> Placement:
    return replace(_constant(node), table=True)


def _constant(node: fx.Node) -> Placement:
    if is_call(node, prims.iota.default):
        start = node.kwargs.get("start", 0)
        return replace(replicated(sure=False), whole=start != 0)
    if is_call(node, aten.full.default, aten.scalar_tensor.default):
        value = constant(node)
        if isinstance(value, float) and not value.is_integer():
            return replicated()
        if isinstance(value, float) or val(node).is_floating_point() or value is True:
            return replicated(sure=False)
        return unknown("a whole number, which could be a rank's")
    if is_call(node, aten.empty.memory_format):
        return replicated(sure=False)
    return unknown(f"nothing says how {node.name} lies on the ranks")


def _all_replicated(here: Here, found: list[Placement]) -> Placement:
    sure = all(p.sure for p in found) and not _literals(here.node)
    origin = next((p.origin for p in found if p.origin is not None), None)
    pairs = zip(here.inputs, found, strict=False)  # those asked about come first
    of_table = [p.table or is_parameter(strip_views(n)) for n, p in pairs]
    table = all(of_table) and any(p.table for p in found)
    return replace(replicated(origin, sure=sure), table=table)


# Pointwise


def _pointwise(here: Here) -> Placement:
    node = here.node
    found = [here.of(n) for n in here.inputs]
    if _is_suspicious(node) and not (_is_distance(node) and _all(found)):
        return _with_whole_numbers(here, found)
    if (p := _first(found, "partial")) is not None:
        return _linear(here, p)
    if why := _why(found):
        return why
    if shards := [(n, p) for n, p in zip(here.inputs, found, strict=True) if p.is_shard]:
        dims = {_aligned(n, p.dim, node) for n, p in shards}
        return shards[0][1].moved(dims.pop()) if len(dims) == 1 else unknown("shards of two dims")
    return _nth_part(here, _all_replicated(here, found))


def _linear(here: Here, p: Placement) -> Placement:
    """Pointwise ops with a partial sum: sums and multiples of it are partial sums too."""
    node, values = here.node, args(here.node)
    others = [v for v in values if not (isinstance(v, fx.Node) and here.of(v).is_partial)]
    known = [here.of(v) for v in others if isinstance(v, fx.Node)]
    if is_call(node, *_SUMS):
        for v in others:
            if isinstance(v, fx.Node) and constant(v) != 0:
                if here.of(v).is_replicated and not here.of(v).nth:
                    here.counted_often(here.of(v))
            elif isinstance(v, (int, float)) and v != 0:
                here.counted_often(p)
        partials = [here.of(v) for v in values if isinstance(v, fx.Node) and here.of(v).is_partial]
        if any(q.inner != p.inner for q in partials):
            return unknown("partial sums that are reduced over different ranks")
        return p if all(k.is_replicated for k in known) else _why(known) or unknown("a mixed sum")
    if is_call(node, *_UNARY):
        return p
    products = is_call(node, aten.mul.Tensor, aten.mul.Scalar) and len(known) + 1 == len(
        here.inputs
    )
    quotients = is_call(node, aten.div.Tensor, aten.div.Scalar) and here.of(values[0]) is p
    if (products or quotients) and not any(k.is_partial for k in known):
        both = len(here.inputs) == 2 and values[0] is values[1]
        if not both:
            return p if all(k.is_replicated for k in known) else _why(known) or unknown("a product")
    if is_call(node, aten.where.self):
        condition, *branches = values
        zero_or_p = [b for b in branches if constant(b) == 0 or here.of(b).is_partial]
        if here.of(condition).is_replicated and len(zero_or_p) == 2:
            return p
        return unknown("a choice between partial sums and others")
    return here.missing_reduce(p)


def _nth_part(here: Here, p: Placement) -> Placement:
    """v / n, or v * (1 / n), of a group of n ranks: meant to be added on each of them."""
    node, values = here.node, args(here.node)
    n = here.group.size
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and constant(values[1]) == n:
        return replace(p, nth=True)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        factors = [constant(v) for v in values]
        if any(isinstance(f, float) and f > 0 and math.isclose(f * n, 1) for f in factors):
            return replace(p, nth=True)
    kept = is_call(node, *_UNARY) and here.of(values[0]).nth
    return replace(p, nth=kept)


def is_divided(node: fx.Node, n: int) -> bool:
    """Is `node` used for nothing but its quotient by n, or by a multiple of n?"""
    users = list(node.users)
    return bool(users) and all(_divides(u, node, n) for u in users)


def _divides(user: fx.Node, node: fx.Node, n: int) -> bool:
    values = args(user)
    if is_call(user, aten.div.Tensor, aten.div.Scalar) and values[0] is node:
        d = constant(values[1])
        return isinstance(d, (int, float)) and d != 0 and d % n == 0
    if is_call(user, aten.mul.Tensor, aten.mul.Scalar):
        factors = [c for v in values if (c := constant(v)) is not None]
        return any(f > 0 and math.isclose((1 / f) % n, 0, abs_tol=1e-6) for f in factors)
    if is_call(user, *RESHAPES, *CASTS, *COPIES, aten.copy.default, operator.getitem) or str(
        user.target
    ).startswith("_c10d_functional.wait_tensor"):
        return is_divided(user, n)
    return False


# Views


def _same(here: Here) -> Placement:
    return here.of(args(here.node)[0])


def _copy(here: Here) -> Placement:
    destination, source = args(here.node)[:2]
    if val(destination).dtype == val(source).dtype:
        return here.of(source)
    return here.of(source) if not here.of(source).is_replicated else here.of(source).unsure()


def _reshape(here: Here) -> Placement:
    p, source = _same(here), args(here.node)[0]
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


def _permute(here: Here) -> Placement:
    p = _same(here)
    if not p.is_shard or p.dim == EXPERTS:
        return p
    order = list(range(val(here.node).ndim))
    if is_call(here.node, aten.permute.default):
        order = [d % len(order) for d in args(here.node)[1]]
    else:
        a, b = (d % len(order) for d in args(here.node)[1:3])
        order[a], order[b] = order[b], order[a]
    return p.moved(order.index(p.dim))


def _expand(here: Here) -> Placement:
    p, source = _same(here), args(here.node)[0]
    if not p.is_shard or p.dim == EXPERTS:
        return p
    return p.moved(p.dim + val(here.node).ndim - val(source).ndim)


def _split(here: Here) -> Placement:
    """Parts along a dim. One part out of n alone could be the own part of a rank."""
    p, source = _same(here), args(here.node)[0]
    dim = arg(here.node, 2, "dim", 0) % val(source).ndim
    used = {args(u)[1] for u in here.node.users if is_call(u, operator.getitem)}
    parts = len(here.node.meta["val"])
    if p.is_shard and p.dim == dim and parts != 2:
        return unknown("parts of shards")  # two: gate and up, each sharded, one behind the other
    if len(used) == parts or p.is_shard:
        return p
    return unknown("a part that could be the rank's own") if parts == here.group.size else _half(p)


def _slice(here: Here) -> Placement:
    p, source = _same(here), args(here.node)[0]
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
    return _half(p)


def _select(here: Here) -> Placement:
    p, source = _same(here), args(here.node)[0]
    dim = args(here.node)[1] % val(source).ndim
    if p.is_shard:
        return unknown("one of the shards") if p.dim == dim else p.moved(p.dim - (dim < p.dim))
    if same(val(source).shape[dim], here.group.size):
        return unknown("a part that could be the rank's own")
    return _half(p)


def _half(p: Placement) -> Placement:
    return p.unsure() if p.is_replicated else p


def _cat(here: Here) -> Placement:
    found = [here.of(n) for n in args(here.node)[0]]
    if why := _why(found):
        return why
    if len({(p.kind, p.dim, p.inner) for p in found}) > 1:
        return unknown(f"joined from {_kinds(found)}")
    dim = arg(here.node, 1, "dim", 0) % val(here.node).ndim
    if found[0].is_shard and found[0].dim == dim:
        return unknown("shards joined with others along their dim")
    return replace(found[0], sure=all(p.sure for p in found))


def _getitem(here: Here) -> Placement:
    source = args(here.node)[0]
    return here.of(source)


# Reductions within a rank


def _sum(here: Here) -> Placement:
    p, source = _same(here), args(here.node)[0]
    if not p.is_shard or p.dim == EXPERTS:
        return _half(p) if p.is_replicated and not p.sure else p
    dims = _dims(here.node, val(source).ndim)
    if p.dim in dims:
        return (
            partial(here.node)
            if is_call(here.node, aten.sum.dim_IntList)
            else unknown("a mean of shards")
        )
    keep = bool(arg(here.node, 2, "keepdim", False))
    return p.moved(p.dim if keep else p.dim - sum(d < p.dim for d in dims))


def _nonlinear_reduction(here: Here) -> Placement:
    p = _same(here)
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


# Products


def _mm(here: Here) -> Placement:
    a, b = args(here.node)[:2]
    return _product(here, here.of(a), here.of(b), val(a).ndim)


def _addmm(here: Here) -> Placement:
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
    return _why([p, q]) or unknown(f"a bias and a product, {_kinds([q, p])}")


def _product(here: Here, p: Placement, q: Placement, ndim: int) -> Placement:
    """Of [.., M, K] and [.., K, N]; both may have a batch dim in front."""
    if p.is_partial and q.is_partial:
        return here.missing_reduce(p)
    if why := _why([p, q]):
        return why
    if p.is_replicated and q.is_replicated:
        return replicated(p.origin or q.origin, sure=p.sure and q.sure)
    if p.is_partial or q.is_partial:
        one, other = (p, q) if p.is_partial else (q, p)
        return one if other.is_replicated else unknown(f"a product of {_kinds([p, q])}")
    M, K = ndim - 2, ndim - 1
    if p.is_shard and q.is_shard:
        if (p.dim, q.dim) == (K, M):
            return partial(here.node)
        return p if p.dim == q.dim < M else unknown(f"a product of {p} and {q}")
    if p.is_shard and p.dim == M:
        return p
    if q.is_shard and q.dim == K:
        return q
    return unknown(f"a product of {_kinds([p, q])}")


def _attention(here: Here) -> Placement:
    found = [here.of(n) for n in here.inputs]
    if (p := _first(found, "partial")) is not None:
        return here.missing_reduce(p)
    if why := _why(found):
        return why
    heads = found[:3]
    if all(p.is_shard and p.dim == 1 for p in heads):
        return found[0]
    if all(p.is_replicated for p in found):
        return _all_replicated(here, found)
    return unknown(f"attention over {_kinds(found)}")


def _embedding(here: Here) -> Placement:
    w, ids = (here.of(n) for n in args(here.node)[:2])
    if why := _why([w, ids]):
        return why
    if w.is_shard and w.dim == 1 and ids.is_replicated:
        return w.moved(val(here.node).ndim - 1)
    if w.is_replicated:
        return ids if not ids.is_replicated else replicated(sure=w.sure and ids.sure)
    return unknown(f"an embedding of {_kinds([w, ids])}")


# Experts


def _grouped_mm(here: Here) -> Placement:
    """x [N, H], w [E, H, G]: experts or features may be sharded."""
    x, w = (here.of(n) for n in args(here.node)[:2])
    if x.is_partial:
        return here.missing_reduce(x)
    if why := _why([x, w]):
        return why
    if w.is_shard and w.dim == 0:
        return shard(EXPERTS, here.node) if x.is_replicated or x.dim == EXPERTS else unknown("rows")
    rest = [here.of(n) for n in here.inputs[2:]]
    if why := _why(rest):
        return why
    if x.is_shard and x.dim == 1 and w.is_shard and w.dim == 1:
        bias = arg(here.node, 5, "bias")
        if isinstance(bias, fx.Node) and here.of(bias).is_replicated and not here.of(bias).nth:
            here.counted_often(here.of(bias))
        return partial(here.node)
    if x.is_replicated and w.is_shard and w.dim == 2:
        return w.moved(1)
    if x.is_replicated and w.is_replicated:
        return _all_replicated(here, [x, w, *rest])
    return unknown(f"grouped_mm of {_kinds([x, w])}")


def _combine(here: Here) -> Placement:
    y, position, weights = (here.of(n) for n in args(here.node)[:3])
    if y.is_shard and y.dim == EXPERTS and not weights.is_partial:
        # Every rank adds up the rows of its own experts, whatever it holds for the others.
        return partial(here.node)
    if y.is_unknown or y.is_partial:
        return y if weights.is_replicated else _why([y, weights]) or unknown("a combine")
    if why := _why([y, position, weights]):
        return why
    return y if y.is_shard else _all_replicated(here, [y, position, weights])


def _strict(here: Here) -> Placement:
    """Ops of ours that make no sense of a partial sum."""
    found = [here.of(n) for n in here.inputs]
    if (p := _first(found, "partial")) is not None:
        return here.missing_reduce(p)
    if why := _why(found):
        return why
    if all(p.is_replicated for p in found):
        return _all_replicated(here, found)
    return found[0] if len(found) == 1 else unknown(f"{_name(here.node)} of {_kinds(found)}")


# Helpers


def _all(found: list[Placement]) -> bool:
    return all(p.is_replicated for p in found)


def _first(found: list[Placement], kind: str) -> Placement | None:
    return next((p for p in found if p.kind == kind), None)


def _why(found: list[Placement]) -> Placement | None:
    return _first(found, "unknown")


def _kinds(found: list[Placement]) -> str:
    return ", ".join(map(str, found))


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _made(p: Placement) -> str:
    source = trail_of(p.origin, 1) if p.origin is not None else ""
    return f" (made at {source})" if source else ""


def _aligned(operand: fx.Node, dim: int, result: fx.Node) -> int:
    """A dim of an operand as that of the result that it is broadcast to."""
    return dim if dim == EXPERTS else dim + val(result).ndim - val(operand).ndim


def _literals(node: fx.Node) -> list[Any]:
    """Whole numbers among the operands, which could be a rank's index."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return []
    numbers = [a for a in args(node) if isinstance(a, (bool, int, float))]
    return [a for a in numbers if float(a).is_integer()]


def _is_suspicious(node: fx.Node) -> bool:
    if not (whole := _literals(node)) or is_call(node, *CASTS, aten.pow.Tensor_Scalar):
        return False
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar) and any(a in (0, 1) for a in whole):
        return not all(isinstance(a, float) for a in whole)
    source = args(node)[0]
    return has_val(source) and not val(source).is_floating_point()


def _is_known(target: Any) -> bool:
    """Does the op compute the same from the same on every rank?"""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in (
        "aten",
        "prims",
        "moe_compile",
    )


_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
_INTEGER = (*_SUMS, aten.mul.Tensor, aten.mul.Scalar)
_UNARY = (*CASTS, *COPIES, aten.neg.default)
_NONLINEAR = ("aten.topk", "aten.sort", "aten._softmax", "aten.argmax", "aten.max", "aten.min")
_RULES: dict[Any, Callable[[Here], Placement]] = {
    **dict.fromkeys((*COPIES, aten.detach.default), _same),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), _reshape),
    **dict.fromkeys((aten.squeeze.default,), _reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), _sum),
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.any.dim), _nonlinear_reduction),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, moe.skinny_mm.default), _mm),
    **dict.fromkeys((moe.silu_mul.default, moe.gelu_mul.default, moe.relu2.default), _strict),
    **dict.fromkeys((moe.route.default, moe.sort_tokens.default), _strict),
    aten.copy.default: _copy,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    operator.getitem: _getitem,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
    moe.grouped_mm.default: _grouped_mm,
    moe.combine.default: _combine,
    **{
        op: _attention
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
        if (op := getattr(getattr(aten, name, None), "default", None)) is not None
    },
}
