"""The product of a router chooses the experts."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from test_fuse_norm import half, normed
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.ops import moe
from moe_compile.passes.choose_linear import choose_linear
from moe_compile.passes.fuse_norm import fuse_norm
from moe_compile.passes.fuse_routing import fuse_routing
from moe_compile.testing import assert_documented, capture, render, run_passes

T, H, E = 2, 64, 32
INPUTS = half(T, H), half(H), half(H, E)


def router(x, norm, w):
    logits, rows = moe.rms_norm_mms(x, norm, 1e-6, [w], [None], keep=True)
    return rows, *moe.route(logits, 4)


def rewrites(gm, *passes):
    """What the pass says it did, behind those that make what it looks for; twice is once."""
    *_, outcome = run_passes(gm, *passes, fuse_routing)
    assert not outcome.declined
    (again,) = run_passes(gm, fuse_routing)
    assert (again.rewrites, again.declined) == ([], [])
    return [e.detail for e in outcome.rewrites]


def assert_same(gm, fn, *args):
    for y, want in zip(gm(*args), fn(*args), strict=True):
        assert torch.equal(y, want)


def test_docstring():
    gm = graph_on_gpu(router, *INPUTS)
    assert_documented(fuse_routing, gm)
    assert_same(gm, router, *INPUTS)


def test_mixtral():
    """A weight too small to be worth an op of its own, and a norm whose rows the experts read."""

    def fn(h, norm, w):
        x = normed(h, norm)
        logits = torch.ops.aten.mm(x.view(T, H), w.t())
        return x, *moe.route(logits, 2, renormalize=True)

    args = half(T, 1, H), half(H), half(E, H)
    gm = graph_on_gpu(fn, *args)
    detail = "2 rows choose 2 of 32 experts in the product"
    assert rewrites(gm, choose_linear, fuse_norm) == [detail]
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[3:]),
        """\
t: bf16[64, 32] = aten.t(arg2_1)
reshape: bf16[2, 64] = aten.reshape(arg0_1, [2, 64])
router = moe_compile.router(reshape, t, None, arg1_1, 1e-06, True, True, 2, 'softmax', True, None, 1, 1, 'max', True)
getitem: f32[2, 2] = router[0]
getitem_1: i64[2, 2] = router[1]
getitem_2: bf16[2, 64] = router[2]
reshape_1: bf16[2, 1, 64] = aten.reshape(getitem_2, [2, 1, 64])
return [reshape_1, getitem, getitem_1]""",  # noqa: E501
    )


def deepseek(x, w, bias):
    """Logits in float32, groups, and a bias that is made ready after the product."""
    logits = torch.ops.aten.mm(x.float(), w.t())
    how = (4, "sigmoid", True, bias, 8, 4, "top2_sum", True, 1e-20, 2.5)
    return moe.route(logits, *how)


def test_deepseek():
    args = half(T, H), torch.randn(E, H), torch.randn(E)
    gm = graph_on_gpu(deepseek, *args)
    rewrites(gm, choose_linear)
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[3:]),
        """\
_to_copy: f32[2, 64] = aten._to_copy(arg0_1, dtype=f32)
t: f32[64, 32] = aten.t(arg1_1)
router = moe_compile.router(_to_copy, t, None, None, 0.0, True, False, 4, 'sigmoid', True, arg2_1, 8, 4, 'top2_sum', True, 1e-20, 2.5)
getitem: f32[2, 4] = router[0]
getitem_1: i64[2, 4] = router[1]
return [getitem, getitem_1]""",  # noqa: E501
    )


def test_gpt_oss():
    def fn(x, w, bias):
        logits = torch.ops.aten.addmm(bias, x, w.t())
        return moe.route(logits, 4, score="softmax", score_first=False, dtype=torch.bfloat16)

    args = half(T, H), half(E, H), half(E)
    gm = graph_on_gpu(fn, *args)
    rewrites(gm, choose_linear)
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[3:]),
        """\
t: bf16[64, 32] = aten.t(arg1_1)
router = moe_compile.router(arg0_1, t, arg2_1, None, 0.0, True, False, 4, 'softmax', False, None, 1, 1, 'max', False, 0.0, 1.0, bf16)
getitem: bf16[2, 4] = router[0]
getitem_1: i64[2, 4] = router[1]
return [getitem, getitem_1]""",  # noqa: E501
    )


def test_bias_of_the_choice_moves_before_the_product():
    """A view of an input, given by name as `find_routing` does; weights that nobody reads."""

    def fn(x, w, bias):
        logits = moe.skinny_mms(x, [w], [None])[0].view(1, T, E).view(T, E)
        return (moe.route(logits, 2, bias=bias.t())[1],)

    args = half(T, H), half(H, E), torch.randn(E)
    gm = graph_on_gpu(fn, *args)
    (route,) = gm.graph.find_nodes(op="call_function", target=moe.route.default)
    *given, bias = route.args
    route.args, route.kwargs = tuple(given[:2]), {"score": "softmax", "bias": bias}
    rewrites(gm)
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[3:]),
        """\
t: f32[32] = aten.t(arg2_1)
router = moe_compile.router(arg0_1, arg1_1, None, None, 0.0, True, False, 2, score='softmax', choice_bias=t)
getitem: i64[2, 2] = router[1]
return [getitem]""",  # noqa: E501
    )
    assert_same(gm, fn, *args)


def two_routes(x, w):
    logits = moe.skinny_mm(x, w)
    return *moe.route(logits, 2), *moe.route(logits, 3)


def logits_too(x, w):
    logits = moe.skinny_mm(x, w).view(1, T, E)
    return *moe.route(logits.view(T, E), 2), logits


def beside(x, w):
    logits, y = moe.skinny_mms(x, [w, w], [None, None])
    return *moe.route(logits, 2), y


def other_rows(x, w):
    return moe.route(moe.skinny_mm(x, w).view(2 * T, E // 2), 2)


def late_bias(x, w):
    logits = moe.skinny_mm(x, w)
    return moe.route(logits, 2, bias=w.sum(0))


def residual(x, w):
    return moe.route(moe.skinny_mm(x, w, None, x.view(T, 2, E).sum(1)), 2)


def plain(x, w):
    return moe.route(moe.skinny_mm(x, w), 2)


NEAR_MISSES = {
    "two routes": (two_routes, T, E, ["logits that others read, too"] * 2),
    "logits are returned": (logits_too, T, E, ["logits that others read, too"]),
    "other products": (beside, T, E, ["logits that are made beside other products"]),
    "other rows": (other_rows, T, E, ["logits that are put in other rows"]),
    "late bias": (late_bias, T, E, ["a bias of the choice that is computed after the product"]),
    "residual": (residual, T, E, ["logits to which a residual is added"]),
    "many rows": (plain, 17, E, ["17 rows in torch.bfloat16 of 32 experts"]),
    "many experts": (plain, 16, 512, ["16 rows in torch.bfloat16 of 512 experts"]),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
    fn, rows, experts, reasons = NEAR_MISSES[case]
    gm = graph_on_gpu(fn, half(rows, H), half(H, experts))
    before = render(gm.graph)
    (outcome,) = run_passes(gm, fuse_routing)
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == reasons
    assert render(gm.graph) == before


def test_few_rows_of_many_experts():
    rewrites(graph_on_gpu(plain, half(4, H), half(H, 512)))


def test_logits_that_another_op_makes_stay():
    gm = graph_on_gpu(lambda x, w: moe.route(torch.mm(x, w).sigmoid(), 2), half(T, H), half(H, E))
    assert rewrites(gm, choose_linear) == []


def test_cpu_is_left_alone():
    gm = capture(router, *INPUTS)
    (outcome,) = run_passes(gm, fuse_routing)
    assert not outcome.rewrites + outcome.declined


def test_unknown_rows():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    t = mode.from_tensor(torch.empty(5)).shape[0]
    with mode, torch.no_grad():
        args = (torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in ((t, H), (H, E)))
        gm = make_fx(lambda *args: list(plain(*args)), tracing_mode="symbolic")(*args)
    (outcome,) = run_passes(gm, fuse_routing)
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == ["a number of rows that is not known"]


def test_large_products_in_float32_stay():
    """Of a router with many rows, and of others."""

    def fn(x, w):
        return torch.mm(x, w.t())

    for rows in 2, 5:
        args = torch.randn(rows, H), torch.randn(E, H)
        gm = graph_on_gpu(lambda x, w: moe.route(fn(x, w), 2), *args)
        assert len(rewrites(gm, choose_linear)) == (rows == 2)
    gm = graph_on_gpu(fn, torch.randn(2, 256), torch.randn(256, 256))
    (outcome,) = run_passes(gm, choose_linear)
    assert not outcome.rewrites
