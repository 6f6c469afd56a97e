"""The pass on every form that it rewrites, and on those that it must not touch.

Each program runs for four ranks in one process before and after, and gives the same on each.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from expecttest import assert_expected_inline
from ranks import (
    RANKS,
    Mesh,
    all_gather,
    all_reduce,
    before_and_after,
    count_collectives,
    reduce_scatter,
    trace,
)

from moe_compile.parallel import mark_replicated, shard
from moe_compile.passes._settings import Settings, set_settings
from moe_compile.passes.drop_marks import drop_marks
from moe_compile.passes.elide_all_reduces import elide_all_reduces
from moe_compile.testing import assert_documented, capture, render, run_passes

AR, RS, AG = "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def legacy(x):
    a, b = x.sin(), x.cos()
    dist.all_reduce(a)
    dist.all_reduce(b)
    return a + b


def coalesced(x):
    a, b = funcol.all_reduce_coalesced([x.sin(), x.cos()], "sum", dist.group.WORLD)
    return a + b


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def shard_after_residual_and_norm(x):
    residual = all_reduce(x.tanh())
    hidden = all_reduce(x.sin()) + residual
    return shard(rms_norm(hidden)), shard(hidden)


def scaled_by_gate(x):
    gate = mark_replicated(torch.ones(8, 1, dtype=x.dtype)).sigmoid()
    return gate * all_reduce(x.sin()) + all_reduce(x.cos())


def in_a_view(x):
    return all_reduce(x.sin()).view(2, 4, 4) + all_reduce(x.cos().view(2, 4, 4))


def dead(x):
    all_reduce(x.sin())
    return x + 1


def batch_of_one(x):
    return shard(all_reduce(x.sin()[None]), 1)


REWRITTEN = {  # program: collectives before, collectives after
    "routed + shared + residual": (
        lambda x: x + 2.5 * all_reduce(x.tanh()) + all_reduce(x.sin()),
        {AR: 2},
        {AR: 1},
    ),
    "in place": (legacy, {AR: 2}, {AR: 1}),
    "coalesced": (coalesced, {"all_reduce_coalesced": 1}, {AR: 1}),
    "three, one taken away": (
        lambda x: all_reduce(x.sin()) + (all_reduce(x.cos()) - all_reduce(x.tanh())),
        {AR: 3},
        {AR: 1},
    ),
    "all taken away": (
        lambda x: x - all_reduce(x.cos()) - all_reduce(x.tanh()),
        {AR: 2},
        {AR: 1},
    ),
    "in views": (in_a_view, {AR: 2}, {AR: 1}),
    "times what all ranks hold": (scaled_by_gate, {AR: 2}, {AR: 1}),
    "averages": (
        lambda x: all_reduce(x.sin(), op="avg") + all_reduce(x, op="avg"),
        {AR: 2},
        {AR: 1},
    ),
    "reduce-scatters": (
        lambda x: reduce_scatter(x.sin()) + reduce_scatter(x.cos()),
        {RS: 2},
        {RS: 1},
    ),
    "one value twice": (lambda x: all_reduce(x) * all_reduce(x).relu(), {AR: 2}, {AR: 1}),
    "all-reduce twice": (lambda x: all_reduce(all_reduce(x)), {AR: 2}, {AR: 1}),
    "greatest twice": (
        lambda x: all_reduce(all_reduce(x, op="max"), op="max"),
        {AR: 2},
        {AR: 1},
    ),
    "greatest of a sum": (lambda x: all_reduce(all_reduce(x), op="max"), {AR: 2}, {AR: 1}),
    "gather of scatter": (lambda x: all_gather(reduce_scatter(x)), {RS: 1, AG: 1}, {AR: 1}),
    "scatter of gather": (lambda x: reduce_scatter(all_gather(x)), {RS: 1, AG: 1}, {}),
    "scatter of all-reduce": (lambda x: reduce_scatter(all_reduce(x)), {AR: 1, RS: 1}, {RS: 1}),
    "gather of all-reduce": (lambda x: all_gather(all_reduce(x)), {AR: 1, AG: 1}, {AR: 1}),
    "unused": (dead, {AR: 1}, {}),
    "own part of all-reduce": (lambda x: shard(all_reduce(x)), {AR: 1}, {RS: 1}),
    "own part of gather": (lambda x: shard(all_gather(x)), {AG: 1}, {}),
    "own part, batch of one": (batch_of_one, {AR: 1}, {RS: 1}),
    "own part of a sum with another": (lambda x: shard(all_reduce(x.sin()) + x), {AR: 1}, {RS: 1}),
    "own part of norm": (lambda x: shard(rms_norm(all_reduce(x))), {AR: 1}, {RS: 1}),
    "own part of residual and norm": (shard_after_residual_and_norm, {AR: 2}, {RS: 1}),
}


COMPILED = ("in place", "routed + shared + residual", "times what all ranks hold")


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewrites(mesh, name):
    fn, before, after = REWRITTEN[name]
    gm, (outcome, _), was, now = before_and_after(
        fn, mesh.parts, elide_all_reduces, drop_marks, compiled=name in COMPILED
    )
    assert (was, now) == (before, after), outcome
    assert outcome.rewrites
    text = render(gm.graph)
    (again,) = run_passes(gm, elide_all_reduces)
    assert not again.rewrites
    assert render(gm.graph) == text


def test_two_groups_become_their_product(mesh):
    def fn(x):
        return all_reduce(all_reduce(x, mesh.row), mesh.column)

    _, _, was, now = before_and_after(fn, mesh.parts, elide_all_reduces)
    assert (was, now) == ({AR: 2}, {AR: 1})


@pytest.mark.parametrize("name", REWRITTEN)
def test_bitwise_rewrites_only_what_is_bitwise(mesh, name):
    fn = REWRITTEN[name][0]
    gm = (capture if name in COMPILED else trace)(fn, torch.randn(8, 4))
    set_settings(gm, Settings(exactness="bitwise"))
    before = count_collectives(gm)
    (outcome,) = run_passes(gm, elide_all_reduces)
    exact = (
        "one value twice",
        "greatest twice",
        "greatest of a sum",
        "all-reduce twice",  # 4 v is exact
        "scatter of gather",
        "scatter of all-reduce",
        "gather of all-reduce",
        "unused",
        "own part of gather",
    )
    if name in exact:
        assert outcome.rewrites
    else:
        assert count_collectives(gm) == before
        assert outcome.declined
        assert all("exactness=bitwise" in e.detail for e in outcome.declined)


def used_elsewhere(x):
    a = all_reduce(x.sin())
    return a + all_reduce(x.cos()), a.relu()


def own_slice(x):  # the literal of rank 0: on rank 1 another graph
    return all_reduce(x)[:2]


def times_rank(x):
    return 3 * all_reduce(x.sin()) + all_reduce(x.cos())  # 3 may be a rank's index


def part_and_whole(x):
    y = all_reduce(x.sin())
    return shard(y), y.relu()


def over_the_tokens(x):
    return shard(all_reduce(x.sin()).cumsum(0))


def parts_by_rank(x):  # on rank 1 the two are the other way round
    mine, other = all_reduce(x).chunk(2, 1)
    return all_reduce(mine) * other


def padded_by_rank(x):
    whole = all_reduce(x)
    return all_reduce(torch.slice_scatter(whole.cos(), whole[:2], 0, 0, 2))


LEFT = {  # program: the reason told, or ""
    "parts in places by rank": (parts_by_rank, ""),
    "scattered to a place by rank": (padded_by_rank, ""),
    "greatest + greatest": (lambda x: all_reduce(x.sin(), op="max") + all_reduce(x, op="max"), ""),
    "sum + greatest": (lambda x: all_reduce(x.sin()) + all_reduce(x, op="max"), ""),
    "used elsewhere": (used_elsewhere, "used elsewhere, too"),
    "nonlinear between": (lambda x: all_reduce(x.sin()).relu() + all_reduce(x.cos()), ""),
    "product of sums": (lambda x: all_reduce(x.sin()) * all_reduce(x.cos()), ""),
    "own slice by a literal": (own_slice, ""),
    "times a whole number": (times_rank, ""),
    "a replicated term outside": (lambda x: all_reduce(x.sin()) + x, ""),
    "cast between": (lambda x: all_reduce(x.sin()).float() + all_reduce(x.cos()).float(), ""),
    "part and whole": (part_and_whole, ""),
    "part of a running sum": (over_the_tokens, ""),
    "part along the features": (lambda x: shard(all_reduce(x.sin()), 1), "goes along the first"),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_alone(mesh, name):
    fn, reason = LEFT[name]
    _, (outcome,), was, now = before_and_after(fn, mesh.parts, elide_all_reduces)
    assert was == now
    assert not outcome.rewrites
    assert reason in " ".join(e.detail for e in outcome.declined)


def test_different_groups_are_not_merged(mesh):
    def fn(x):
        return all_reduce(x.sin(), mesh.row) + all_reduce(x.cos(), mesh.column)

    _, (outcome,), was, now = before_and_after(fn, mesh.parts, elide_all_reduces)
    assert was == now
    assert not outcome.rewrites


def test_two_names_of_one_group_are_one_group(mesh):
    other = dist.new_group(list(range(RANKS)))
    assert other.group_name != mesh.all.group_name

    def fn(x):
        return all_reduce(x.sin(), other) + all_reduce(x.cos())

    _, _, _was, now = before_and_after(fn, mesh.parts, elide_all_reduces)
    assert now == {AR: 1}


def test_documented(mesh):
    def fn(a, b):
        return all_reduce(a) + all_reduce(b)

    assert_documented(elide_all_reduces, capture(fn, torch.randn(4, 8), torch.randn(4, 8)))


def test_norm_on_own_part(mesh):
    gm = trace(lambda x: shard(rms_norm(all_reduce(x))), torch.randn(8, 4))
    run_passes(gm, elide_all_reduces)
    assert_expected_inline(
        render(gm.graph),
        """\
x_1: f32[8, 4]
reduce_scatter_tensor: f32[2, 4] = _c10d_functional.reduce_scatter_tensor(x_1, 'sum', 4, '0')
wait_tensor: f32[2, 4] = _c10d_functional.wait_tensor(reduce_scatter_tensor)
pow: f32[2, 4] = aten.pow.Tensor_Scalar(wait_tensor, 2)
mean: f32[2, 1] = aten.mean.dim(pow, [-1], True)
add: f32[2, 1] = aten.add.Tensor(mean, 1e-06)
rsqrt: f32[2, 1] = aten.rsqrt(add)
mul: f32[2, 4] = aten.mul.Tensor(wait_tensor, rsqrt)
return [mul]""",
    )


def test_dynamic_tokens(mesh):
    fn = REWRITTEN["routed + shared + residual"][0]
    _, _, was, now = before_and_after(
        fn, mesh.parts, elide_all_reduces, shape=(6, 4), dynamic=True, compiled=True
    )
    assert (was, now) == ({AR: 2}, {AR: 1})


def test_no_output_shares_memory_with_an_input(mesh):
    """scatter of gather is the input itself: the caller gets a copy."""
    gm = trace(lambda x: shard(all_gather(x)), torch.randn(8, 4))
    run_passes(gm, elide_all_reduces)
    x = torch.randn(8, 4)
    assert gm(x)[0].data_ptr() != x.data_ptr()
