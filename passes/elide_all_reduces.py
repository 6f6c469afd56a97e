"""Fewer collectives: redundant ones go, several become one, all-reduces become reduce-scatters."""

from torch import fx

from moe_compile.passes._collectives import (
    COLLECTIVES,
    SHARD,
    collective_of,
    collectives,
)
from moe_compile.passes._elide import ELISIONS, Rewriter
from moe_compile.passes._graph import clean, is_call
from moe_compile.passes._outcome import Outcome, exactness
from moe_compile.passes._reduce_sums import reduce_sums_once
from moe_compile.passes._settings import settings_of
from moe_compile.passes._shards import push_shards_up
from moe_compile.passes.placements import Placements


@exactness("bitwise")
def elide_all_reduces(graph: fx.Graph) -> Outcome:
    """Leave as few and as small collectives as what is known of placements allows.

    Before:
        arg0_1: f32[4, 8]
        arg1_1: f32[4, 8]
        all_reduce: f32[4, 8] = _c10d_functional.all_reduce(arg0_1, 'sum', '0')
        all_reduce_1: f32[4, 8] = _c10d_functional.all_reduce(arg1_1, 'sum', '0')
        wait_tensor: f32[4, 8] = _c10d_functional.wait_tensor(all_reduce)
        wait_tensor_1: f32[4, 8] = _c10d_functional.wait_tensor(all_reduce_1)
        add: f32[4, 8] = aten.add.Tensor(wait_tensor, wait_tensor_1)
        return [add]

    After:
        arg0_1: f32[4, 8]
        arg1_1: f32[4, 8]
        add: f32[4, 8] = aten.add.Tensor(arg0_1, arg1_1)
        all_reduce: f32[4, 8] = _c10d_functional.all_reduce(add, 'sum', '0')
        wait_tensor: f32[4, 8] = _c10d_functional.wait_tensor(all_reduce)
        return [wait_tensor]

    The rules, each with its proof, stand in _elide.py (single collectives), _reduce_sums.py (sums
    of several, as of routed and shared experts) and _shards.py (all-reduce, then the own part).
    Every rank decides alike: a rule looks at the graph, at sizes of groups and how they meet, and
    never at the own rank; literal slices are not taken for the own part.
    Numerics: unused and equal collectives, gathers of replicated values and shards of gathers are
    bitwise. The others add up in another order; exactness="bitwise" leaves them alone.
    """
    outcome = Outcome()
    if not any(is_call(n, *COLLECTIVES, SHARD) for n in graph.nodes):
        return outcome
    rewriter = Rewriter(graph, outcome, settings_of(graph).exactness != "bitwise")
    while _round(rewriter):
        clean(graph)
    rewriter.tell_declined()
    return outcome


def _round(rewriter: Rewriter) -> bool:
    """Apply every rule where it holds; False if none did."""
    rewriter.placements = Placements(rewriter.graph)
    before = rewriter.count
    rewriter.declined.clear()
    for rule in (*ELISIONS, push_shards_up, reduce_sums_once):
        for value in [c.value for c in collectives(rewriter.graph)]:
            # Looked at anew: a rewrite before may have changed what it is given.
            if not value._erased and (found := collective_of(value)) is not None:
                rule(rewriter, found)
    return rewriter.count > before
