"""Random programs of sums, products, views and collectives mean the same after the pass."""

import operator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RANKS, Mesh, count_collectives
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_compile.ops import moe
from moe_compile.passes import _collectives as c
from moe_compile.passes._graph import aten, call, clean
from moe_compile.passes.drop_marks import drop_marks
from moe_compile.passes.elide_all_reduces import elide_all_reduces
from moe_compile.testing import run_passes, run_ranks

T, H = 8, 4
MESH = []


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = Mesh()
    MESH.append(mesh)
    yield
    mesh.close()
    MESH.clear()


class Program:
    """A graph under construction; every step takes values of [T, H] and gives one."""

    def __init__(self, mesh):
        self.graph = fx.Graph()
        self.fake = FakeTensorMode()
        self.x = self.graph.placeholder("x")
        with self.fake:
            self.x.meta["val"] = torch.empty(T, H, dtype=torch.float64)
        groups = (mesh.all, mesh.row, mesh.column)
        self.all, self.row, self.column = (c.resolve(g.group_name) for g in groups)

    def op(self, target, *args, **kwargs):
        return call(self.graph, target, *args, like=self.x, **kwargs)

    def reduced(self, x, op="sum", group=None):
        return c.all_reduce(self.graph, x, op, group or self.all, self.x)

    def scattered(self, x):
        return c.reduce_scatter(self.graph, x, "sum", self.all, self.x)

    def gathered(self, x, group=None):
        group = group or self.all
        return self.op(c.WAIT, self.op(c.ALL_GATHER, x, group.size, group.arg))

    def own(self, x, group=None):
        group = group or self.all
        return self.op(c.SHARD, x, 0, group.size, group.arg)

    def normed(self, x):
        mean = self.op(aten.mean.dim, self.op(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        scale = self.op(aten.rsqrt.default, self.op(aten.add.Tensor, mean, 1e-3))
        return self.op(aten.mul.Tensor, x, scale)

    def coalesced(self, a, b):
        both = self.op(c.c10d.all_reduce_coalesced.default, [a, b], "sum", self.all.arg)
        parts = [self.op(c.WAIT, self.op(operator.getitem, both, i)) for i in range(2)]
        return self.op(aten.sub.Tensor, *parts)

    def viewed(self, x):
        flat = self.op(aten.reshape.default, self.reduced(x), [T * H])
        return self.op(aten.reshape.default, flat, [T, H])

    def returned(self, values):
        self.graph.output([v for v in values])
        return fx.GraphModule(torch.nn.Module(), self.graph)


def times(p, x, y):
    return p.op(aten.mul.Tensor, x, y)


def plus(p, x, y):
    return p.op(aten.add.Tensor, x, y)


def marked(p, x):
    """What all ranks hold, by a collective and a mark that says so."""
    return p.op(moe.mark_placement.default, p.reduced(x), "replicated", 0, p.all.arg)


STEPS = [
    lambda p, a, b: plus(p, a, b),
    lambda p, a, b: p.op(aten.sub.Tensor, a, times(p, b, 0.5)),
    lambda p, a, b: p.op(aten.tanh.default, a),
    lambda p, a, b: times(p, p.reduced(a), 0.25),
    lambda p, a, b: p.op(aten.sub.Tensor, a, times(p, p.reduced(b), 0.125)),
    lambda p, a, b: plus(p, p.reduced(a), p.reduced(b)),
    lambda p, a, b: plus(p, times(p, p.reduced(a), 2.5), plus(p, b, p.reduced(b))),
    lambda p, a, b: times(p, p.gathered(p.scattered(a)), 0.25),
    lambda p, a, b: times(p, p.scattered(p.gathered(a)), 0.25),
    lambda p, a, b: p.gathered(plus(p, p.scattered(a), p.scattered(b))),
    lambda p, a, b: p.reduced(a, "max"),
    lambda p, a, b: p.reduced(p.reduced(a, "min"), "max"),
    lambda p, a, b: p.reduced(a, "avg"),
    lambda p, a, b: plus(p, p.reduced(a, "max"), p.reduced(b, "max")),
    lambda p, a, b: times(p, p.reduced(a, group=p.row), 0.5),
    lambda p, a, b: plus(p, p.reduced(p.reduced(a, group=p.row), group=p.column), b),
    lambda p, a, b: p.gathered(p.own(p.normed(p.reduced(a)))),
    lambda p, a, b: p.gathered(p.own(plus(p, p.reduced(a), p.reduced(b)))),
    lambda p, a, b: p.gathered(p.own(plus(p, p.reduced(a), b))),
    lambda p, a, b: p.gathered(p.own(p.gathered(a, p.row)), p.column),
    lambda p, a, b: p.coalesced(a, b),
    lambda p, a, b: plus(p, p.viewed(a), p.viewed(b)),
    lambda p, a, b: plus(p, times(p, marked(p, b), p.reduced(a)), p.reduced(b)),
    lambda p, a, b: p.op(aten.div.Tensor, p.reduced(a), plus(p, times(p, b, b), 1.0)),
    lambda p, a, b: p.op(aten.relu.default, p.reduced(p.op(aten.neg.default, a))),
    lambda p, a, b: times(p, a, 3),
    lambda p, a, b: (p.reduced(b), a)[1],
]
PLANS = st.lists(
    st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 11), st.integers(0, 11)),
    min_size=2,
    max_size=8,
)


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
@given(plan=PLANS, returned=st.integers(1, 3))
def test_random_programs_keep_their_meaning(plan, returned):
    mesh = MESH[0]
    program = Program(mesh)
    pool = [program.x, program.op(aten.sin.default, program.x)]
    for kind, i, j in plan:
        value = STEPS[kind](program, pool[i % len(pool)], pool[j % len(pool)])
        if value.meta["val"].shape == (T, H):
            pool.append(value)
    gm = program.returned(pool[-returned:])
    clean(gm.graph)
    inputs = [[x] for x in INPUTS]
    want = run_ranks(gm, inputs, mesh.parts)
    before = count_collectives(gm)
    run_passes(gm, elide_all_reduces, drop_marks)
    got = run_ranks(gm, inputs, mesh.parts)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    parts_apart = before["all_reduce_coalesced"]  # of two tensors each
    assert sum(count_collectives(gm).values()) <= sum(before.values()) + parts_apart
    if program.x not in gm.graph.output_node().args[0]:
        mine = {x.data_ptr() for x in INPUTS}
        assert not any(v.data_ptr() in mine for values in got for v in values)


torch.manual_seed(0)
INPUTS = [torch.randn(T, H, dtype=torch.float64) for _ in range(RANKS)]
