"""What is known of every value of a graph, op by op."""

import pytest
import torch
import torch.distributed as dist
from ranks import Mesh, all_gather, all_reduce, reduce_scatter, trace

from moe_compile.ops import moe
from moe_compile.passes._collectives import resolve
from moe_compile.passes.placements import Placements

T, H = 8, 4


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def mark(x, kind, dim=0, group=None):
    name = (group or dist.group.WORLD).group_name
    return moe.mark_placement(x, kind, dim, name)


def last(fn, *inputs, group=None):
    """How the value returned lies on the ranks of the group."""
    gm = trace(fn, *inputs)
    group = resolve((group or dist.group.WORLD).group_name)
    (value,) = gm.graph.output_node().args[0]
    return str(Placements(gm.graph).of(value, group))


R = "replicated"
RULES = {  # what is computed from x (equal on all ranks), p (partial) and s (rows of a value)
    "x + x": (lambda x, p, s: x + x.sin(), R),
    "p + p": (lambda x, p, s: p + 0.5 * p, "partial"),
    "p * x": (lambda x, p, s: p * x.cos(), "partial"),
    "p / x": (lambda x, p, s: p / x.exp(), "partial"),
    "-p in bf16": (lambda x, p, s: (-p).bfloat16(), "partial"),
    "sum of p": (lambda x, p, s: p.sum(0), "partial"),
    "mean of p": (lambda x, p, s: p.mean(-1, keepdim=True), "partial"),
    "p chosen": (lambda x, p, s: torch.where(x > 0.5, p, 0.0), "partial"),
    "p @ x": (lambda x, p, s: p @ x.t(), "partial"),
    "x @ p": (lambda x, p, s: x.t() @ p, "partial"),
    "p @ x by our op": (lambda x, p, s: moe.skinny_mm(p, x.t()), "partial"),
    "p @ x + x": (lambda x, p, s: moe.skinny_mm(p, x.t(), None, x @ x.t()), "unknown"),
    "x @ x + x": (lambda x, p, s: moe.skinny_mm(x, x.t(), residual=x @ x.t()), R),
    "s": (lambda x, p, s: s.exp(), "shard of dim 0"),
    "s transposed": (lambda x, p, s: s.permute(1, 0).sin(), "shard of dim 1"),
    "s + row": (lambda x, p, s: s + x[:1], "shard of dim 0"),
    "s @ x": (lambda x, p, s: s @ x.t(), "shard of dim 0"),
    "x @ s": (lambda x, p, s: x @ s.permute(1, 0), "shard of dim 1"),
    "s' @ s": (lambda x, p, s: s.permute(1, 0) @ s, "partial"),
    "sum over shards": (lambda x, p, s: s.sum(0), "partial"),
    "sum within shards": (lambda x, p, s: s.sum(1), "shard of dim 0"),
    "greatest over shards": (lambda x, p, s: s.amax(0), "unknown"),
    "greatest within shards": (lambda x, p, s: s.amax(1), "shard of dim 0"),
    "shards in a view": (lambda x, p, s: s.view(1, 2 * 2, H // 2)[None], "shard of dim 2"),
    "shards unfolded": (lambda x, p, s: s[:, None].expand(-1, 3, -1), "shard of dim 0"),
    "joined": (lambda x, p, s: torch.cat([s, s.sin()], 1), "shard of dim 0"),
    "joined along": (lambda x, p, s: torch.cat([s, s.sin()]), "unknown"),
    "both halves": (lambda x, p, s: torch.cat(x.chunk(2, 1)[::-1], 1), R),
    "own part by a literal": (lambda x, p, s: x[:2] * 1.5, "unknown"),
    "chosen by a whole number": (lambda x, p, s: (x.long() == 3) * x, "unknown"),
    "times a whole number": (lambda x, p, s: x * 3, R),
    "random": (lambda x, p, s: torch.rand_like(x), "unknown"),
    "all-reduce": (lambda x, p, s: all_reduce(s), R),
    "reduce-scatter": (lambda x, p, s: reduce_scatter(p), "shard of dim 0"),
    "all-gather": (lambda x, p, s: all_gather(s), R),
    "after a missing reduce": (lambda x, p, s: p.relu(), "unknown"),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    rule, expected = RULES[name]

    def fn(x, p, s):
        return rule(mark(x, "replicated"), mark(p, "partial"), mark(s, "shard", 0))

    inputs = torch.randn(T, H), torch.randn(T, H), torch.randn(2, H)
    assert last(fn, *inputs) == expected


def test_groups_of_a_mesh(mesh):
    """Each group has a placement of its own; a collective over one leaves the other's."""

    def fn(x):
        both = mark(mark(x, "partial", 0, mesh.row), "partial", 0, mesh.column)
        return all_reduce(both, mesh.row)

    x = torch.randn(T, H)
    assert last(fn, x, group=mesh.row) == R
    assert last(fn, x, group=mesh.column) == "partial"


def test_part_of_a_larger_group(mesh):
    """Sums over rows, then over columns, are the sum over all."""

    def once(x):
        return all_reduce(mark(x, "partial"), mesh.row)

    def twice(x):
        return all_reduce(once(x), mesh.column)

    x = torch.randn(T, H)
    assert last(once, x) == "partial"
    assert last(twice, x) == R


def test_replicated_on_all_is_replicated_on_some(mesh):
    def fn(x):
        return all_reduce(all_reduce(x), mesh.row).sin()

    assert last(fn, torch.randn(T, H), group=mesh.row) == R
    assert last(fn, torch.randn(T, H)) == R
