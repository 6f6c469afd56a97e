"""The kernel that turns keys moves a full window on, and writes them and the values to its end."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core

from moe_compile.ops import moe
from moe_compile.passes._graph import prims
from moe_compile.passes.store_together import store_together
from moe_compile.testing import render, run_passes

aten = torch.ops.aten
copy_ = aten.copy_.default  # without the device guard of Tensor.copy_
A, G, S, D = 4, 2, 6, 8


def inputs(B=1, S=S):
    q, k, v = (torch.randn(B, 1, n, D) for n in (A, G, G))
    angles = torch.randn(1, 1, D)
    return q, k, v, angles.cos(), angles.sin(), *torch.randn(2, B, G, S, D)


def moved(cache, by=1, size=None):
    """`roll`, as Inductor decomposes it."""
    S = cache.shape[2]
    like = {"dtype": torch.int64, "device": cache.device, "requires_grad": False}
    places = aten.add.Tensor(prims.iota(S, start=0, step=1, **like), by)
    return aten.index(cache, [None, None, aten.fmod.Scalar(places, size or S)])


def push(cache, x, at, move=moved):
    """As transformers 5.17 does; where there is one sequence, an assignment drops its dim."""
    x = aten.view(x, [G, 1, D]) if cache.shape[0] == 1 else x
    return aten.index_put(move(cache), [None, None, at], x)


def step(q, k, v, cos, sin, k_cache, v_cache, number=-1, move=moved, push_v=push, more=None):
    at = aten.full([1], number, dtype=torch.int64, device=q.device)
    q, k = moe.rotate(q, k, cos, sin)
    keys = push(k_cache, k, at, move)
    values = push_v(v_cache, aten.permute(v, [0, 2, 1, 3]), at)
    early = [] if more is None else [more(k_cache, k, keys)]
    out = moe.attend(q, keys, values)
    copy_(k_cache, keys)
    copy_(v_cache, values)
    return (out, *early)


def run(fn, *args):
    gm = graph_on_gpu(fn, *args)
    (outcome,) = run_passes(gm, store_together)
    (again,) = run_passes(gm, store_together)
    assert again.rewrites == []
    return gm, len(outcome.rewrites), [e.detail for e in outcome.declined]


def test_graph_of_gpt_oss():
    gm, count, declined = run(step, *inputs())
    assert (count, declined) == (1, [])
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[7:]),
        """\
auto_functionalized = auto_functionalized(moe_compile.rotate_and_push.default, q=arg0_1, k=arg1_1, v=arg2_1, cos=arg3_1, sin=arg4_1, k_cache=arg5_1, v_cache=arg6_1)
getitem: f32[1, 4, 1, 8] = auto_functionalized[0]
getitem_1: f32[1, 2, 6, 8] = auto_functionalized[1]
getitem_2: f32[1, 2, 6, 8] = auto_functionalized[2]
attend: f32[1, 4, 1, 8] = moe_compile.attend(getitem, getitem_1, getitem_2)
copy_: f32[1, 2, 6, 8] = aten.copy_(arg5_1, getitem_1)
copy__1: f32[1, 2, 6, 8] = aten.copy_(arg6_1, getitem_2)
return [attend]""",  # noqa: E501
    )


@pytest.mark.parametrize("number", [-1, S - 1])
@pytest.mark.parametrize("B", [1, 3])
def test_same_values(B, number):
    mine, theirs = inputs(B), None
    theirs = [x.clone() for x in mine]
    gm, count, _ = run(lambda *args: step(*args, number=number), *mine)
    assert count == 1
    (out,), (expected,) = gm(*mine), step(*theirs, number=number)
    for actual, right in zip((out, *mine), (expected, *theirs), strict=True):
        torch.testing.assert_close(actual, right)


def test_inductor_writes_in_place():
    """Its own pass clones no cache."""
    gm, count, _ = run(step, *inputs())
    assert count == 1
    reinplace_inplaceable_ops_core(gm.graph)
    (store,) = gm.graph.find_nodes(op="call_function", target=auto_functionalized)
    assert store.meta["only_clone_these_tensors"] == []
    assert copy_ not in {node.target for node in gm.graph.nodes}


def sliced(cache):
    return aten.cat([aten.slice(cache, 2, 1, S), aten.slice(cache, 2, 0, 1)], 2)


KEYS = "keys that are not just written to a static cache"
VALUES = "no values written to a static cache at the position of the keys"
NEAR_MISSES = {
    "other position": ({"number": S - 2}, KEYS),
    "moved back": ({"move": lambda cache: moved(cache, S - 1)}, KEYS),
    "moved by two": ({"move": lambda cache: moved(cache, 2)}, KEYS),
    "around another size": ({"move": lambda cache: moved(cache, size=S - 1)}, KEYS),
    "put together": ({"move": sliced}, KEYS),
    "of numbers changed": ({"move": lambda cache: moved(cache + 1)}, KEYS),
    "the old cache is read": ({"more": lambda cache, k, keys: cache * 2}, KEYS),
    "keys are read": ({"more": lambda cache, k, keys: k * 2}, KEYS),
    "values stay in place": (
        {"push_v": lambda cache, x, at: push(cache, x, at, lambda cache: cache)},
        VALUES,
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_left_alone(name):
    how, reason = NEAR_MISSES[name]
    assert run(lambda *args: step(*args, **how), *inputs())[1:] == (0, [reason])


def test_what_reads_the_moved_cache():
    """Before the new position is in it: the cache as it was is read, too."""

    def move(cache):
        kept.append(moved(cache))
        return kept[-1]

    kept = []
    fn = lambda *args: step(*args, move=move, more=lambda *_: kept[-1] * 2)  # noqa: E731
    assert run(fn, *inputs())[1:] == (0, [KEYS])


def test_a_long_window():
    reason = "a window of 8193 positions, which a program a head would move too slowly"
    assert run(step, *inputs(S=8193))[1:] == (0, [reason])
