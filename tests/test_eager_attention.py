"""An attention that a model wrote out reads the cache, too, with the sinks that it adds."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.ops.attend import attend_reference
from moe_compile.passes._graph import prims
from moe_compile.passes.read_cache import read_cache
from moe_compile.testing import render, run_passes

aten = torch.ops.aten
B, A, G, S, D = 2, 8, 4, 6, 8
SCALE = 0.25


def repeat(x):
    """As transformers' repeat_kv does."""
    b, g, s, d = x.shape
    x = aten.expand(aten.unsqueeze(x, 2), [b, g, A // g, s, d])
    return aten.reshape(aten.clone(x), [b, A, s, d])


def product(a, b):
    """A matmul over heads as it is decomposed."""
    (b0, heads, rows, _), columns = a.shape, b.shape[3]
    a, b = (aten.expand(x, list(x.shape)) for x in (a, b))
    a, b = (aten.reshape(x, [b0 * heads, *x.shape[2:]]) for x in (a, b))
    return aten.reshape(aten.bmm(a, b), [b0, heads, rows, columns])


def softmax(x):
    wide = prims.convert_element_type(x, torch.float32) if x.dtype != torch.float32 else x
    powers = aten.exp(aten.sub(wide, aten.amax(wide, [-1], True)))
    out = aten.div(powers, aten.sum(powers, [-1], True))
    return prims.convert_element_type(out, x.dtype) if x.dtype != torch.float32 else out


def numbers(is_open, like):
    least = torch.finfo(like.dtype).min
    yes, no = (aten.full([], x, dtype=like.dtype, device=like.device) for x in (0.0, least))
    return aten.where(is_open, yes, no)


def scores(k, is_open, q):
    scaled = aten.mul(product(q, aten.permute(repeat(k), [0, 1, 3, 2])), SCALE)
    return aten.add(scaled, numbers(is_open, q))


def eager(k, v, is_open, q):
    return product(softmax(scores(k, is_open, q)), repeat(v))


def with_sinks(k, v, is_open, q, sinks):
    """As gpt-oss of transformers 5.17."""
    sinks = aten.expand(aten.reshape(sinks, [1, -1, 1, 1]), [q.shape[0], -1, q.shape[2], -1])
    x = aten.cat([scores(k, is_open, q), sinks], -1)
    weights = softmax(aten.sub(x, aten.max(x, -1, True)[0]))
    return product(aten.clone(aten.slice(weights, 3, 0, -1)), repeat(v))


def inputs(queries=1, dtype=torch.bfloat16, batch=B):
    k, v = torch.randn(2, batch, G, S, D).to(dtype)
    is_open = torch.rand(batch, 1, 1, S) < 0.5
    is_open[..., 0] = True
    return k, v, is_open, torch.randn(batch, A, queries, D).to(dtype)


def all_inputs(**how):
    k, v, is_open, q = inputs(**how)
    return k, v, is_open, q, torch.randn(A).to(q.dtype)


def rewritten(gm):
    """The `attend` that the pass made; nothing is left for a second run."""
    (outcome,) = run_passes(gm, read_cache)
    assert (len(outcome.rewrites), outcome.declined) == (1, [])
    (again,) = run_passes(gm, read_cache)
    assert (again.rewrites, again.declined) == ([], [])
    (line,) = (line for line in render(gm.graph).splitlines() if "= moe_compile.attend(" in line)
    return line


def declined(fn, *args):
    (outcome,) = run_passes(graph_on_gpu(fn, *args), read_cache)
    assert not outcome.rewrites
    return [e.detail for e in outcome.declined]


def test_graph_of_gpt_oss():
    gm = graph_on_gpu(with_sinks, *all_inputs())
    rewritten(gm)
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[2, 4, 6, 8]
arg1_1: bf16[2, 4, 6, 8]
arg2_1: b8[2, 1, 1, 6]
arg3_1: bf16[2, 8, 1, 8]
arg4_1: bf16[8]
view: bf16[1, 8, 1, 1] = aten.view(arg4_1, [1, -1, 1, 1])
reshape: bf16[1, 8] = aten.reshape(view, [1, -1])
attend: bf16[2, 8, 1, 8] = moe_compile.attend(arg3_1, arg0_1, arg1_1, arg2_1, scale=0.25, sinks=reshape)
reshape_1: bf16[16, 1, 8] = aten.reshape(attend, [16, 1, 8])
view_1: bf16[2, 8, 1, 8] = aten.view(reshape_1, [2, 8, 1, 8])
return [view_1]""",  # noqa: E501
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [eager, with_sinks])
def test_same_values(fn, dtype):
    args = all_inputs(dtype=dtype)[: 4 + (fn is with_sinks)]
    gm = graph_on_gpu(fn, *args)
    assert ("sinks=" in rewritten(gm)) == (fn is with_sinks)
    k, v, is_open, q = args[:4]
    sinks = args[4].double()[None] if fn is with_sinks else None
    exact = attend_reference(q.double(), k.double(), v.double(), is_open, SCALE, sinks=sinks)
    (actual,) = gm(*args)
    assert (actual.double() - exact).abs().max() <= (fn(*args).double() - exact).abs().max() + 1e-6


def test_without_a_mask():
    def unmasked(k, v, q):
        x = aten.div(product(q, aten.permute(k, [0, 1, 3, 2])), 4.0)
        return product(softmax(x), v)

    k, v, q = (torch.randn(B, A, n, D) for n in (S, S, 1))
    gm = graph_on_gpu(unmasked, k, v, q)
    assert rewritten(gm).endswith("attend(arg2_1, arg0_1, arg1_1, scale=0.25)")


def test_a_mask_of_other_numbers_is_added():
    def added(k, v, mask, q):
        scaled = product(q, aten.permute(repeat(k), [0, 1, 3, 2]))
        return product(softmax(aten.add(mask, scaled)), repeat(v))

    k, v, _, q = inputs()
    gm = graph_on_gpu(added, k, v, torch.randn(B, 1, 1, S).bfloat16(), q)
    assert rewritten(gm).endswith("attend(arg3_1, arg0_1, arg1_1, arg2_1, scale=1.0)")


def other_values(k, v, is_open, q):
    return product(softmax(scores(k, is_open, q)), aten.mul(aten.slice(repeat(v), 3, 0, 4), 2))


def of_keys(k, v, is_open, q):
    """Over heads, not over positions."""
    x = aten.permute(scores(k, is_open, q), [0, 3, 2, 1])
    return product(aten.permute(softmax(x), [0, 3, 2, 1]), repeat(v))


def keeps_the_sink(k, v, is_open, q, sinks):
    x = aten.cat([aten.expand(aten.reshape(sinks, [1, -1, 1, 1]), [B, A, 1, 1]),
                  scores(k, is_open, q)], -1)  # fmt: skip
    return product(aten.clone(aten.slice(softmax(x), 3, 0, -1)), repeat(v))


def squared(k, v, is_open, q):
    x = scores(k, is_open, q)
    return product(softmax(aten.mul(x, x)), repeat(v))


def whole_weights(k, v, is_open, q):
    weights = softmax(scores(k, is_open, q))
    return product(prims.convert_element_type(weights, torch.int32).to(q.dtype), repeat(v))


def test_near_misses():
    for fn in of_keys, squared, keeps_the_sink, whole_weights:
        args = all_inputs()[: 5 if fn is keeps_the_sink else 4]
        assert declined(fn, *args) == [], fn
    for fn in eager, with_sinks:
        assert declined(fn, *all_inputs(queries=2)[: 4 + (fn is with_sinks)]) == []


def test_weights_that_are_returned():
    def both(k, v, is_open, q):
        weights = softmax(scores(k, is_open, q).float())
        return product(weights.to(q.dtype), repeat(v)), weights * 2

    assert declined(both, *inputs()) == ["the attention's weights are read by others, too"]


def test_other_values_are_read_as_they_are():
    assert "attend(" in rewritten(graph_on_gpu(other_values, *inputs()))


def test_dynamic_batch():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, torch.no_grad():
        b = mode.from_tensor(torch.empty(5, 3)).shape[0]
        like = {"device": "cuda", "dtype": torch.bfloat16}
        k, v = (torch.empty(b, G, S, D, **like) for _ in range(2))
        q = torch.empty(b, A, 1, D, **like)
        is_open = torch.empty(b, 1, 1, S, dtype=torch.bool, device="cuda")
        args = k, v, is_open, q, torch.empty(A, **like)
        gm = make_fx(lambda *args: [with_sinks(*args)], tracing_mode="symbolic")(*args)
    assert "attend(arg3_1, arg0_1, arg1_1, arg2_1, scale=0.25, sinks=" in rewritten(gm)


def test_a_cpu_is_left_alone():
    gm = make_fx(lambda *args: [eager(*args)], tracing_mode="fake")(*inputs())
    assert run_passes(gm, read_cache)[0].rewrites == []
