"""Marks, own parts and the one place that decides; compiled programs on processes that talk."""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import (
    Mesh,
    all_gather,
    all_reduce,
    count_collectives,
    own_device,
    reduce_scatter,
    spawn,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import moe_compile
from moe_compile._facts import facts_of, mark_parameters, ranks_key
from moe_compile.parallel import (
    mark_parameters_replicated,
    mark_replicated,
    post_experts_all_reduce,
    shard,
    should_skip_post_experts_all_reduce,
)
from moe_compile.passes._collectives import resolve
from moe_compile.passes.elide_all_reduces import elide_all_reduces
from moe_compile.passes.lint_collectives import lint_collectives
from moe_compile.passes.placements import Placements
from moe_compile.testing import capture, run_passes

SWITCHES = (
    "should_allreduce_fusion",
    "use_reduce_scatter",
    "dp_reduce_scatterv",
    "fp4_all_gather",
)
TABLE = [  # as published; None: either. Fusion, reduce-scatter, scatterv, fp4: skip EP, skip TP
    ((True, None, None, None), (True, True)),
    ((False, True, None, None), (True, True)),
    ((False, False, True, False), (True, True)),
    ((False, False, False, True), (False, True)),
    ((False, False, False, False), (False, False)),
]


@pytest.fixture
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def rows():
    """Every row of the table, with each None as both, without those that exclude each other."""
    for given, skips in TABLE:
        for row in itertools.product(*[(False, True) if g is None else (g,) for g in given]):
            if not (row[2] and row[3]):
                yield row, skips


@pytest.mark.parametrize(("row", "skips"), list(rows()))
def test_who_reduces_after_the_experts(row, skips):
    given = dict(zip(SWITCHES, row, strict=True))
    for is_tp_path, expected in zip((False, True), skips, strict=True):
        got = should_skip_post_experts_all_reduce(is_tp_path=is_tp_path, **given)
        assert got is expected


def test_the_table_covers_every_combination_that_may_be():
    combinations = {c for c in itertools.product((False, True), repeat=4) if not (c[2] and c[3])}
    assert sorted(row for row, _ in rows()) == sorted(combinations)


def test_modes_that_exclude_each_other():
    with pytest.raises(ValueError, match="expected dp_reduce_scatterv or fp4_all_gather, got both"):
        should_skip_post_experts_all_reduce(
            is_tp_path=True, dp_reduce_scatterv=True, fp4_all_gather=True
        )


@pytest.mark.parametrize(("row", "skips"), list(rows()))
def test_post_experts_all_reduce_asks_it(mesh, row, skips):
    given = dict(zip(SWITCHES, row, strict=True))

    def fn(x):
        return post_experts_all_reduce(x.sin(), tp_group=mesh.row, ep_group=mesh.column, **given)

    gm = capture(fn, torch.randn(8, 4))
    groups = [n.args[2] for n in gm.graph.nodes if "all_reduce" in str(n.target)]
    names = (mesh.column.group_name, mesh.row.group_name)  # experts, features
    assert groups == [name for name, skip in zip(names, skips, strict=True) if not skip]
    run_passes(gm, elide_all_reduces)
    assert sum(count_collectives(gm).values()) == min(1, len(groups))


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 16, bias=False)
        self.down = torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x))).relu()


@torch.no_grad()
def test_facts_from_dtensor_parameters(mesh):
    """A tensor-parallel MLP by torch's own tools: its sum is seen, and reduced once."""
    tp = init_device_mesh("cpu", (4,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Mlp().requires_grad_(False), tp, plan)
    gm = capture(model, torch.randn(6, 8))
    group = resolve(tp.get_group().group_name)
    kinds = [str(Placements(gm.graph).of(n, group)) for n in gm.graph.nodes if "mm" in n.name]
    assert kinds == ["unknown", "unknown"]  # nothing says that x is the same on all ranks

    def fn(x):
        return model(mark_replicated(x, tp))

    gm = capture(fn, torch.randn(6, 8))
    kinds = [str(Placements(gm.graph).of(n, group)) for n in gm.graph.nodes if "mm" in n.name]
    assert kinds == ["shard of dim 1", "partial"]
    (outcome,) = run_passes(gm, lint_collectives)
    assert not outcome.mistakes
    assert not outcome.declined


@torch.no_grad()
def test_facts_from_marked_parameters(mesh):
    model = Mlp().requires_grad_(False)
    mark_parameters_replicated(model)

    def fn(x):
        return model(mark_replicated(x))

    gm = capture(fn, torch.randn(6, 8))
    placements = Placements(gm.graph)
    kinds = {str(placements.of(n, placements.groups[0])) for n in gm.graph.nodes if "mm" in n.name}
    assert kinds == {"replicated"}


def test_caches_tell_apart_what_graphs_do_not(mesh):
    """A graph holds the names of groups, and nothing of what is known of its inputs."""
    x = torch.nn.Parameter(torch.randn(4))
    plain = ranks_key(facts_of([x]))
    mark_parameters(torch.nn.ParameterList([x]), mesh.all)
    marked = ranks_key(facts_of([x]))
    dist.new_group([0, 3])
    assert len({plain, marked, ranks_key(facts_of([x]))}) == 3
    mesh.close()
    assert ranks_key([]) == ""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    assert ranks_key(facts_of([x])) not in (plain, marked)


# Real processes


def routed_and_shared(x):
    return x + 2.5 * all_reduce(x.tanh()) + all_reduce(x.sin())


def own_part_of_norm(x):
    y = all_reduce(x.sin())
    return shard(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def there_and_back(x):
    return all_gather(reduce_scatter(x.cos())) + all_reduce(x.sin())


def twice(x):
    return all_reduce(all_reduce(x))


def halves(x):
    n, rank = dist.get_world_size(), dist.get_rank()
    whole = all_reduce(x.sin())
    return all_gather(whole[rank * (8 // n) : (rank + 1) * (8 // n)].cos())


PROGRAMS = (routed_and_shared, own_part_of_norm, there_and_back, twice, halves)


def compiled_programs(rank, n):
    """Each gives what it gave uncompiled, and every rank issues the same collectives."""
    for fn in PROGRAMS:
        torch.manual_seed(100 + rank)
        x = torch.randn(8, 4).to(own_device())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", moe_compile.parallel.CollectivesWarning)
            want = fn(x.clone())
            got = torch.compile(fn, backend="moe_compile", fullgraph=True)(x)
            torch.testing.assert_close(got, want)
            gm = capture(fn, x)
            run_passes(gm)
            mine = [str(node.target) for node in gm.graph.nodes if "c10d" in str(node.target)]
        everyone = [None] * n
        dist.all_gather_object(everyone, mine)
        assert all(theirs == mine for theirs in everyone), (fn.__name__, everyone)


@pytest.mark.parametrize("n", [2])
def test_compiled_on_processes(n):
    spawn(compiled_programs, n)
