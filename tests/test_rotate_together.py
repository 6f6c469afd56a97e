"""Queries and keys are normed and turned by one kernel."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.passes._graph import prims
from moe_compile.passes.rotate_together import rotate_together
from moe_compile.testing import assert_documented, capture, render, run_passes

aten = torch.ops.aten
B, A, G, D = 2, 4, 2, 8
LAST = 9223372036854775807
BF16 = torch.bfloat16


def turned(x, cos, sin):
    """As a model of transformers is decomposed; cos and sin [B, 1, Q, R]."""
    half = cos.shape[-1] // 2
    first = aten.mul(x, cos)
    lower = aten.slice(x, 3, 0, half)
    neg = aten.neg(aten.slice(x, 3, half, LAST))
    return first + aten.cat([neg, lower], -1) * sin


def heads(x):
    return aten.permute(x, [0, 2, 1, 3])


def normed(x, weight, eps=1e-6):
    wide = prims.convert_element_type(x, torch.float32) if x.dtype != torch.float32 else x
    wide = wide * aten.rsqrt(aten.mean(aten.pow(wide, 2), [-1], True) + eps)
    if x.dtype != torch.float32:
        wide = prims.convert_element_type(wide, x.dtype)
    return weight * wide


def plain(q, k, cos, sin):
    q, k = heads(q), heads(k)
    cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
    return turned(q, cos, sin), turned(k, cos, sin)


def with_norms(q, k, cos, sin, q_weight, k_weight):
    return plain(normed(q, q_weight), normed(k, k_weight), cos, sin)


def inputs(tokens=1, features=D, turned=D, dtype=BF16):
    q, k = (torch.randn(B, tokens, n, features).to(dtype) for n in (A, G))
    angles = torch.randn(1, tokens, turned)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def weights(dtype=BF16):
    return tuple(torch.randn(2, D).to(dtype))


def rewritten(gm, count=1):
    """The rotations that the pass made; nothing is left for a second run."""
    (outcome,) = run_passes(gm, rotate_together)
    assert (len(outcome.rewrites), outcome.declined) == (count, [])
    (again,) = run_passes(gm, rotate_together)
    assert (again.rewrites, again.declined) == ([], [])
    lines = render(gm.graph).splitlines()
    return [line for line in lines if "= moe_compile.rotate(" in line]


def declined(fn, *args):
    (outcome,) = run_passes(graph_on_gpu(fn, *args), rotate_together)
    assert not outcome.rewrites
    return [e.detail for e in outcome.declined]


ALONE = "no other heads after these that the same angles turn"


def test_docstring():
    assert_documented(rotate_together, graph_on_gpu(plain, *inputs()))


def test_decode_of_qwen3():
    """The graph of transformers 5.17 on an H200, its projections and cache left out."""
    gm = graph_on_gpu(with_norms, *inputs(), *weights())
    assert rewritten(gm)
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[2, 1, 4, 8]
arg1_1: bf16[2, 1, 2, 8]
arg2_1: bf16[1, 1, 8]
arg3_1: bf16[1, 1, 8]
arg4_1: bf16[8]
arg5_1: bf16[8]
rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, arg5_1, eps=1e-06)
getitem: bf16[2, 4, 1, 8] = rotate[0]
getitem_1: bf16[2, 2, 1, 8] = rotate[1]
return [getitem, getitem_1]""",
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 8])
def test_same_values(tokens, dtype):
    args = *inputs(tokens, dtype=dtype), *weights(dtype)
    gm = graph_on_gpu(with_norms, *args)
    rewritten(gm)
    for out, expected in zip(gm(*args), with_norms(*args), strict=True):
        torch.testing.assert_close(out, expected)


def test_keys_come_later_and_are_stored():
    """The key's chain stands behind the query's, and each layer has its own."""

    def layers(cache, at, q, k, cos, sin, w):
        outs = []
        for _ in range(2):
            by = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
            q_turned = turned(heads(normed(q, w)), *by)
            k_turned = turned(heads(normed(k + 1, w)), *by)
            cache = aten.index_put(cache, [None, None, at], k_turned)
            outs.append(aten.matmul(q_turned, aten.sum(cache, [1], True).mT))
            q = q + aten.sum(outs[-1])
        return tuple(outs)

    args = torch.zeros(B, G, 6, D).to(BF16), torch.tensor([3]), *inputs(), weights()[0]
    gm = graph_on_gpu(layers, *args)
    assert rewritten(gm, 2) == [
        "rotate = moe_compile.rotate(arg2_1, add, arg4_1, arg5_1, arg6_1, arg6_1, eps=1e-06)",
        "rotate_1 = moe_compile.rotate(add_1, add_2, arg4_1, arg5_1, arg6_1, arg6_1, eps=1e-06)",
    ]
    for out, expected in zip(gm(*args), layers(*args), strict=True):
        torch.testing.assert_close(out, expected)


def partial(q, k, cos, sin):
    cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
    R, outs = cos.shape[-1], []
    for x in heads(q), heads(k):
        rest = aten.slice(x, 3, R, LAST)
        outs.append(aten.cat([turned(aten.slice(x, 3, 0, R), cos, sin), rest], -1))
    return tuple(outs)


def test_partial_rotary():
    args = inputs(features=16)
    gm = graph_on_gpu(partial, *args)
    assert rewritten(gm) == ["rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1)"]
    for out, expected in zip(gm(*args), partial(*args), strict=True):
        torch.testing.assert_close(out, expected)


def test_one_norm():
    def only_q(q, k, cos, sin, weight):
        return plain(normed(q, weight), k, cos, sin)

    def only_k(q, k, cos, sin, weight):
        return plain(q, normed(k, weight, 0.5), cos, sin)

    args = *inputs(), weights()[0]
    call = "rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1, "
    assert rewritten(graph_on_gpu(only_q, *args)) == [call + "arg4_1, eps=1e-06)"]
    assert rewritten(graph_on_gpu(only_k, *args)) == [call + "None, arg4_1, eps=0.5)"]


def test_angles_that_have_a_dim_of_heads():
    def fn(q, k, cos, sin):
        return turned(heads(q), cos, sin), turned(heads(k), cos, sin)

    q, k, cos, sin = inputs()
    gm = graph_on_gpu(fn, q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    assert rewritten(gm) == ["rotate = moe_compile.rotate(arg0_1, arg1_1, squeeze, squeeze_1)"]


def near_miss(swap):
    """`plain` with other halves of the query, so that the key is left alone."""

    def fn(q, k, cos, sin):
        q, k = heads(q), heads(k)
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        low, high = aten.slice(q, 3, 0, 4), aten.slice(q, 3, 4, LAST)
        swapped = swap(q, low, high)
        return aten.mul(q, cos) + swapped * sin, turned(k, cos, sin)

    return fn


HALVES = "not the upper half negated before the lower"
SWAPS = {
    "in order": lambda q, low, high: aten.cat([low, aten.neg(high)], -1),
    "lower negated": lambda q, low, high: aten.cat([aten.neg(low), high], -1),
    "same half": lambda q, low, high: aten.cat([aten.neg(high), high], -1),
    "other start": lambda q, low, high: aten.cat([aten.neg(aten.slice(q, 3, 3, 7)), low], -1),
    "other step": lambda q, low, high: aten.cat([aten.neg(aten.slice(q, 3, 0, 8, 2)), low], -1),
    "other heads": lambda q, low, high: aten.cat([aten.neg(aten.slice(q + 1, 3, 4, 8)), low], -1),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_other_halves(swap):
    assert declined(near_miss(SWAPS[swap]), *inputs()) == [HALVES, ALONE]


def test_other_angles():
    def other_cos(q, k, cos, sin):
        by = aten.unsqueeze(sin, 1)
        return (
            turned(heads(q), aten.unsqueeze(cos, 1), by),
            turned(heads(k), aten.unsqueeze(cos + 1, 1), by),
        )

    def only_q(q, k, cos, sin):
        return turned(heads(q), aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1))

    assert declined(other_cos, *inputs()) == [ALONE, ALONE]
    assert declined(only_q, *inputs()) == [ALONE]
    q, k, cos, sin = inputs()
    wide = "cosines in torch.float32, heads in torch.bfloat16"
    assert declined(plain, q, k, cos.float(), sin.float()) == [wide, wide]
    narrow = "cosines or sines of [1, 1, 1, 1]"
    assert declined(plain, q, k, cos, sin[..., :1]) == [narrow, narrow]


def test_read_on_the_way():
    def normed_q(q, k, cos, sin, weight):
        value = normed(q, weight)
        return *plain(value, k, cos, sin), value

    def swapped(q, k, cos, sin):
        q, k = heads(q), heads(k)
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        cat = aten.cat([aten.neg(aten.slice(q, 3, 4, LAST)), aten.slice(q, 3, 0, 4)], -1)
        return aten.mul(q, cos) + cat * sin, turned(k, cos, sin), cat

    read = "a value on the way is read elsewhere"
    assert declined(normed_q, *inputs(), weights()[0]) == [read, ALONE]
    assert declined(swapped, *inputs()) == [read, ALONE]


def test_queries_that_are_read_before_the_keys():
    def fn(q, k, cos, sin):
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        q = turned(heads(q), cos, sin)
        return turned(heads(k + aten.sum(q)), cos, sin), q

    before = "read before the other heads of the same angles are there"
    assert declined(fn, *inputs()) == [before, ALONE]


def test_what_reads_the_queries_early_moves_behind():
    """Views that an attention takes of them, as long as nothing is written in between."""

    def fn(q, k, cos, sin, more=lambda q: q):
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        q = aten.reshape(more(turned(heads(q), cos, sin)), [B * A, 1, D])
        return aten.neg(q), turned(heads(k), cos, sin)

    args = inputs()
    gm = graph_on_gpu(fn, *args)
    assert rewritten(gm) == ["rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1)"]
    for out, expected in zip(gm(*args), fn(*args), strict=True):
        torch.testing.assert_close(out, expected)

    def written(q, k, cos, sin, count):
        def more(q):
            q = q + count
            aten.copy_.default(count, aten.mul(count, 2))
            return q

        return fn(q, k, cos, sin, more)

    before = "read before the other heads of the same angles are there"
    assert declined(written, *args, torch.ones((), dtype=BF16)) == [before, ALONE]


def test_norms_of_another_kind():
    def other_eps(q, k, cos, sin, a, b):
        return plain(normed(q, a), normed(k, b, 0.5), cos, sin)

    def rounded_last(q, k, cos, sin, a, b):
        wide = prims.convert_element_type(q, torch.float32)
        scale = aten.rsqrt(aten.mean(aten.pow(wide, 2), [-1], True) + 1e-6)
        weight = prims.convert_element_type(a, torch.float32)
        return plain(prims.convert_element_type(wide * scale * weight, BF16), k, cos, sin)

    args = *inputs(), *weights()
    assert declined(other_eps, *args) == ["norms with 1e-06 and 0.5", ALONE]
    assert declined(rounded_last, *args) == ["a norm that is rounded after its weight", ALONE]


def test_what_is_no_norm_of_heads_is_left_before_the_op():
    def all_heads(q, k, cos, sin, weight):
        """As OLMoE does: over all heads together."""
        q = aten.reshape(normed(aten.reshape(q, [B, 1, A * D]), weight), q.shape)
        return plain(q, k, cos, sin)

    weight = torch.randn(A * D).to(BF16)
    (line,) = rewritten(graph_on_gpu(all_heads, *inputs(), weight))
    assert line == "rotate = moe_compile.rotate(view_1, arg1_1, arg2_1, arg3_1)"


def test_parts_of_heads():
    def without_the_rest(q, k, cos, sin):
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        q, k = (aten.slice(heads(x), 3, 0, D) for x in (q, k))
        return turned(q, cos, sin), turned(k, cos, sin)

    reason = "a part of the features, not put together with the others"
    assert declined(without_the_rest, *inputs(features=16)) == [reason, reason]

    def not_permuted(q, k, cos, sin):
        return turned(q, cos, sin), turned(k, cos, sin)

    q, k, cos, sin = inputs()
    args = heads(q), heads(k), cos.unsqueeze(1), sin.unsqueeze(1)
    assert declined(not_permuted, *args) == ["heads that were not beside each other"] * 2


def test_many_tokens_are_not_looked_at():
    assert declined(plain, *inputs(9)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pass is for GPUs")
def test_a_cpu_is_left_alone():
    (outcome,) = run_passes(capture(with_norms, *inputs(), *weights()), rotate_together)
    assert (outcome.rewrites, outcome.declined) == ([], [])


def test_dynamic_batch():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    b = mode.from_tensor(torch.empty(5, 3)).shape[0]
    assert isinstance(b, torch.SymInt)
    with mode, torch.no_grad():
        like = {"device": "cuda", "dtype": BF16}
        q, k = (torch.empty(b, 1, n, D, **like) for n in (A, G))
        cos, sin = (torch.empty(n, 1, D, **like) for n in (b, b))
        gm = make_fx(lambda *args: list(plain(*args)), tracing_mode="symbolic")(q, k, cos, sin)
    assert rewritten(gm) == ["rotate = moe_compile.rotate(arg0_1, arg1_1, arg2_1, arg3_1)"]


def halves(x, cos, sin):
    """As gpt-oss is decomposed; cos and sin [B, 1, Q, R / 2]."""
    low, high = aten.split(x, x.shape[-1] // 2, -1)
    lower = aten.sub(aten.mul(low, cos), aten.mul(high, sin))
    return aten.cat([lower, aten.add(aten.mul(high, cos), aten.mul(low, sin))], -1)


def of_gpt_oss(q, k, cos, sin):
    """Of two layers."""
    outs = []
    for _ in range(2):
        by = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        outs += [halves(heads(q), *by), halves(heads(k), *by)]
        q, k = q + 1, k + 1
    return tuple(outs)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_halves_that_are_turned_each_by_itself(dtype):
    """One kernel a layer, of angles put side by side once; equal to the bit."""
    args = inputs(3, turned=D // 2, dtype=dtype)
    gm = graph_on_gpu(of_gpt_oss, *args)
    assert rewritten(gm, 2) == [
        "rotate = moe_compile.rotate(arg0_1, arg1_1, cat_1, cat)",
        "rotate_1 = moe_compile.rotate(add, add_1, cat_1, cat)",
    ]
    for out, expected in zip(gm(*args), of_gpt_oss(*args), strict=True):
        assert torch.equal(out, expected)


def test_angles_of_halves_that_have_a_dim_of_heads():
    def fn(q, k, cos, sin):
        return halves(heads(q), cos, sin), halves(heads(k), cos, sin)

    q, k, cos, sin = inputs(turned=D // 2)
    gm = graph_on_gpu(fn, q, k, cos.unsqueeze(1), sin.unsqueeze(1))
    assert rewritten(gm) == ["rotate = moe_compile.rotate(arg0_1, arg1_1, squeeze, squeeze_1)"]


def near_miss_of_halves(lower, upper, cut=lambda x: aten.split(x, D // 2, -1)):
    def turn(x, cos, sin):
        low, high = cut(x)
        return aten.cat([lower(low, high, cos, sin), upper(low, high, cos, sin)], -1)

    return turn


def minus(low, high, cos, sin):
    return aten.sub(aten.mul(low, cos), aten.mul(high, sin))


def plus(low, high, cos, sin):
    return aten.add(aten.mul(high, cos), aten.mul(low, sin))


OTHER_HALVES = {
    "turned back": near_miss_of_halves(
        lambda low, high, cos, sin: aten.sub(aten.mul(high, sin), aten.mul(low, cos)), plus
    ),
    "sines for cosines": near_miss_of_halves(
        minus, lambda low, high, cos, sin: aten.add(aten.mul(high, sin), aten.mul(low, cos))
    ),
    "same half": near_miss_of_halves(minus, lambda low, high, cos, sin: plus(low, low, cos, sin)),
    "twice": near_miss_of_halves(
        minus,
        lambda low, high, cos, sin: aten.add(aten.mul(high, cos), aten.mul(low, sin), alpha=2),
    ),
    "halves swapped": near_miss_of_halves(minus, plus, lambda x: aten.split(x, D // 2, -1)[::-1]),
    "every other": near_miss_of_halves(
        minus, plus, lambda x: (aten.slice(x, 3, 0, D, 2), aten.slice(x, 3, 1, D, 2))
    ),
    "other heads": near_miss_of_halves(
        minus, plus, lambda x: (aten.slice(x, 3, 0, 4), aten.slice(x + 1, 3, 4, D))
    ),
}


@pytest.mark.parametrize("turn", OTHER_HALVES.values(), ids=OTHER_HALVES)
def test_halves_that_are_turned_otherwise(turn):
    def fn(q, k, cos, sin):
        by = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        return turn(heads(q), *by), halves(heads(k), *by)

    reason, alone = declined(fn, *inputs(turned=D // 2))
    assert reason.startswith("halves that are not ")
    assert alone == ALONE


def test_angles_of_one_half_are_not_those_of_all():
    """Keys of which half the features are turned, beside queries turned as halves."""

    def fn(q, k, cos, sin):
        cos, sin = aten.unsqueeze(cos, 1), aten.unsqueeze(sin, 1)
        k = heads(k)
        part = turned(aten.slice(k, 3, 0, D // 2), cos, sin)
        return halves(heads(q), cos, sin), aten.cat([part, aten.slice(k, 3, D // 2, D)], -1)

    assert declined(fn, *inputs(turned=D // 2)) == [ALONE, ALONE]
