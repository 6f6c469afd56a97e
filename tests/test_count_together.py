import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu

from moe_compile.passes._graph import aten
from moe_compile.passes.count_together import count_together
from moe_compile.testing import assert_documented, capture, render, run_passes

copy_ = aten.copy_.default  # without the device guard of Tensor.copy_


def counter(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


def count(*counters):
    for c in counters:
        copy_(c, c + 1)
    return ()


def rewrites(gm):
    (outcome,) = run_passes(gm, count_together)
    assert not outcome.declined
    return [e.detail for e in outcome.rewrites]


def test_docstring():
    assert_documented(count_together, graph_on_gpu(count, counter(), counter()))


def test_positions_are_read_before():
    def step(a, b, x):
        y = x + a + b
        return count(a, b) or y

    gm = graph_on_gpu(step, counter(), counter(1), torch.zeros(3))
    assert rewrites(gm) == ["2 counters advanced by 1 in one kernel"]
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: i64[]
arg1_1: i64[1]
arg2_1: f32[3]
add: f32[3] = aten.add.Tensor(arg2_1, arg0_1)
add_1: f32[3] = aten.add.Tensor(add, arg1_1)
_foreach_add = aten._foreach_add.Scalar([arg0_1, arg1_1], 1)
getitem: i64[] = _foreach_add[0]
getitem_1: i64[1] = _foreach_add[1]
copy_: i64[] = aten.copy_(arg0_1, getitem)
copy__1: i64[1] = aten.copy_(arg1_1, getitem_1)
return [add_1]""",
    )
    assert rewrites(gm) == []


def test_near_misses():
    def another_number(a, b):
        copy_(a, a + 1)
        copy_(b, b + 2)
        return ()

    def sums_that_are_read(a, b):
        sums = a + 1, b + 1
        copy_(a, sums[0])
        copy_(b, sums[1])
        return sums

    def another_tensor(a, b):
        copy_(a, b + 1)
        copy_(b, b + 1)
        return ()

    for fn in (another_number, sums_that_are_read, another_tensor):
        assert rewrites(graph_on_gpu(fn, counter(), counter())) == []
    assert rewrites(graph_on_gpu(count, counter(), counter(dtype=torch.int32))) == []
    assert rewrites(graph_on_gpu(count, counter(2), counter(2))) == []
    floats = counter(dtype=torch.float32)
    assert rewrites(graph_on_gpu(count, floats, floats.clone())) == []
    assert rewrites(graph_on_gpu(count, counter())) == []


def test_a_cpu_is_left_alone():
    def step(a, b):
        a.add_(1)
        b.add_(1)
        return a + b

    gm = capture(step, counter(), counter())
    if gm.graph.find_nodes(op="placeholder")[0].meta["val"].device.type == "cpu":
        assert rewrites(gm) == []


def test_counts(device):
    """Compiled, as a cache counts: positions of this step, then those of the next."""
    counters = [counter().to(device) for _ in range(5)]

    def step(x):
        y = x + torch.stack(counters).float()
        for c in counters:
            c.add_(1)
        return y

    compiled = torch.compile(step, backend="moe_compile")
    x = torch.zeros(5, device=device)
    for i in range(3):
        assert torch.equal(compiled(x), torch.full((5,), float(i), device=device))
    assert [c.item() for c in counters] == [3] * 5
