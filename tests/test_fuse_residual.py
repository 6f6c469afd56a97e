"""What ends a layer adds the residual."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.ops import moe
from moe_compile.passes.fuse_residual import fuse_residual
from moe_compile.testing import assert_documented, capture, render, run_passes

aten = torch.ops.aten
T, K, H, E = 2, 64, 32, 4
BF16 = torch.bfloat16


def half(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype) / 4


def o(x, w, residual):
    return residual + moe.skinny_mm(x, w).view(T, 1, H)


INPUTS = half(T, K), half(K, H), half(T, 1, H)


def rewrites(gm, count=1):
    (outcome,) = run_passes(gm, fuse_residual)
    assert (len(outcome.rewrites), outcome.declined) == (count, [])
    (again,) = run_passes(gm, fuse_residual)
    assert (again.rewrites, again.declined) == ([], [])
    return [e.detail for e in outcome.rewrites]


def declined(fn, *args):
    gm = graph_on_gpu(fn, *args)
    before = render(gm.graph)
    (outcome,) = run_passes(gm, fuse_residual)
    assert not outcome.rewrites
    assert render(gm.graph) == before
    return [e.detail for e in outcome.declined]


def test_docstring():
    assert_documented(fuse_residual, graph_on_gpu(o, *INPUTS))


def experts(x, ids, weights, up, down, residual):
    return moe.experts(x, ids, weights, up, down, limit=2.0) + residual


def combine(y, position, weights, residual):
    return moe.combine(y, position, weights, BF16) + residual


def with_bias(x, w, bias, residual):
    return moe.skinny_mm(x, w, bias) + residual


IDS = torch.tensor([[0, 3], [1, 2]])
CASES = {
    "skinny_mm": (o, *INPUTS),
    "skinny_mm with a bias": (with_bias, half(T, K), half(K, H), half(H), half(T, H)),
    "experts": (
        *(experts, half(T, K), IDS, torch.rand(T, 2)),
        *(half(E, K, 16), half(E, 8, H), half(T, H)),
    ),
    "combine": (
        combine,
        half(4, H),
        torch.arange(4).int().view(T, 2),
        torch.rand(T, 2),
        half(T, H),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_values(case):
    fn, *args = CASES[case]
    gm = graph_on_gpu(fn, *args)
    assert rewrites(gm) == [f"{case.split()[0]} adds the residual, 32 columns"]
    assert torch.equal(gm(*args)[0], fn(*args))
    assert aten.add.Tensor not in {n.target for n in gm.graph.nodes}


def test_float8_experts():
    def fn(x, x_scale, ids, weights, up, up_scale, down, down_scale, residual):
        y = moe.experts_fp8(x, x_scale, ids, weights, up, up_scale, down, down_scale, 1.5)
        return residual + y

    def float8(*shape):
        return torch.zeros(shape, dtype=torch.float8_e4m3fn).mT

    args = (
        *(float8(128, T).contiguous(), torch.ones(T, 1), IDS, torch.rand(T, 2)),
        *(float8(E, 256, 128), torch.ones(E, 1, 2), float8(E, H, 128), torch.ones(E, 1, 1)),
    )
    gm = graph_on_gpu(fn, *args, half(T, H))
    assert rewrites(gm) == ["experts_fp8 adds the residual, 32 columns"]
    assert render(gm.graph).splitlines()[-2].endswith("arg7_1, 1.5, residual=arg8_1)")


def test_float8_products():
    """Of a single weight; where there are several, none adds."""

    def fn(x, w, scale, residual):
        (y,) = moe.skinny_mms_fp8(x, [w], [scale], [None])
        q, k = moe.skinny_mms_fp8(x, [w, w], [scale, scale], [None, None])
        return residual + y.view(T, 1, H), residual + q.view(T, 1, H), k

    w = torch.randn(H, K).to(torch.float8_e4m3fn)
    args = half(T, K), w, torch.ones(1, 1), half(T, 1, H)
    gm = graph_on_gpu(fn, *args)
    assert rewrites(gm) == ["skinny_mms_fp8 adds the residual, 32 columns"]
    assert all(map(torch.equal, gm(*args), fn(*args)))
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[4:]),
        """\
skinny_mms_fp8 = moe_compile.skinny_mms_fp8(arg0_1, [arg1_1, arg1_1], [arg2_1, arg2_1], [None, None])
getitem: bf16[2, 32] = skinny_mms_fp8[0]
getitem_1: bf16[2, 32] = skinny_mms_fp8[1]
reshape: bf16[2, 32] = aten.reshape(arg3_1, [2, 32])
skinny_mms_fp8_1 = moe_compile.skinny_mms_fp8(arg0_1, [arg1_1], [arg2_1], [None], residual=reshape)
getitem_2: bf16[2, 32] = skinny_mms_fp8_1[0]
reshape_1: bf16[2, 1, 32] = aten.reshape(getitem_2, [2, 1, 32])
view: bf16[2, 1, 32] = aten.view(getitem, [2, 1, 32])
add: bf16[2, 1, 32] = aten.add.Tensor(arg3_1, view)
return [reshape_1, add, getitem_1]""",  # noqa: E501
    )


def test_a_whole_layer():
    """The residual after the MLP is the sum after attention, reshaped only once."""

    def layer(h, x, w, ids, weights, up, down):
        h = h + moe.skinny_mm(x, w).view(T, 1, K)
        out = moe.experts(h.view(T, K), ids, weights, up, down)
        return h + out.view(T, 1, K)

    args = half(T, 1, K), half(T, H), half(H, K), IDS, torch.rand(T, 2)
    args = *args, half(E, K, 16), half(E, 8, K)
    gm = graph_on_gpu(layer, *args)
    assert len(rewrites(gm, 2)) == 2
    assert torch.equal(gm(*args)[0], layer(*args))
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[7:]),
        """\
reshape: bf16[2, 64] = aten.reshape(arg0_1, [2, 64])
skinny_mm: bf16[2, 64] = moe_compile.skinny_mm(arg1_1, arg2_1, residual=reshape)
reshape_1: bf16[2, 1, 64] = aten.reshape(skinny_mm, [2, 1, 64])
view: bf16[2, 64] = aten.view(reshape_1, [2, 64])
experts: bf16[2, 64] = moe_compile.experts(view, arg3_1, arg4_1, arg5_1, arg6_1, residual=skinny_mm)
reshape_2: bf16[2, 1, 64] = aten.reshape(experts, [2, 1, 64])
return [reshape_2]""",
    )


def test_of_two_the_later_adds():
    def shared(x, w, ids, weights, up, down):
        out = moe.experts(x, ids, weights, up, down)
        return moe.skinny_mm(x, w) + out

    args = half(T, K), half(K, H), IDS, torch.rand(T, 2), half(E, K, 16), half(E, 8, H)
    gm = graph_on_gpu(shared, *args)
    assert rewrites(gm) == ["skinny_mm adds the residual, 32 columns"]
    assert torch.equal(gm(*args)[0], shared(*args))


def test_the_residual_may_come_later():
    def fn(x, w, z):
        y = moe.skinny_mm(x, w)
        return y + z * 2

    gm = graph_on_gpu(fn, half(T, K), half(K, H), half(T, H))
    rewrites(gm)


READ = "the rows to which it is added are read by others, too"
SHAPE = "a summand of another shape than the rows to which it is added"
X, W = half(T, K), half(K, H)
NEAR_MISSES = {
    "read": (lambda x, w, r: (y := moe.skinny_mm(x, w), y + r), X, W, half(T, H), READ),
    "reshaped and read": (
        lambda x, w, r: (y := moe.skinny_mm(x, w).view(T, 1, H), y * 2, y + r),
        *(X, W, half(T, 1, H), READ),
    ),
    "twice itself": (lambda x, w: (y := moe.skinny_mm(x, w)) + y, X, W, READ),
    "row for all": (lambda x, w, r: moe.skinny_mm(x, w) + r, X, W, half(1, H), SHAPE),
    "rows for one": (lambda x, w, r: moe.skinny_mm(x, w) + r, X[:1], W, half(T, H), SHAPE),
    "a bias": (lambda x, w, r: moe.skinny_mm(x, w) + r, X, W, half(H), SHAPE),
    "float32": (
        lambda x, w, r: moe.skinny_mm(x, w) + r,
        *(X, W, torch.randn(T, H)),
        "a summand in another dtype than the rows to which it is added",
    ),
    "alpha": (lambda x, w, r: aten.add(moe.skinny_mm(x, w), r, alpha=2), X, W, half(T, H), None),
    "a number": (lambda x, w: moe.skinny_mm(x, w) + 1, X, W, None),
    "transposed": (lambda x, w, r: moe.skinny_mm(x, w).t() + r, X, W, half(H, T), None),
    "has one": (lambda x, w, r: moe.skinny_mm(x, w, None, r) + r, X, W, half(T, H), None),
    "several products": (
        lambda x, w, r: moe.skinny_mms(x, [w], [None])[0] + r,
        *(X, W, half(T, H), None),
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
    *given, reason = NEAR_MISSES[case]
    reasons = declined(*given)
    assert set(reasons) == ({reason} if reason else set())


def test_cpu_is_left_alone():
    gm = capture(o, *INPUTS)
    (outcome,) = run_passes(gm, fuse_residual)
    assert not outcome.rewrites + outcome.declined


@pytest.mark.parametrize("is_reshaped", [False, True])
def test_unknown_rows(is_reshaped):
    def fn(x, w, residual):
        y = moe.skinny_mm(x, w)
        return [residual + (y.view(residual.shape) if is_reshaped else y)]

    mode = FakeTensorMode(shape_env=ShapeEnv())
    t = mode.from_tensor(torch.empty(5)).shape[0]
    assert isinstance(t, torch.SymInt)
    with mode, torch.no_grad():
        like = {"device": "cuda", "dtype": BF16}
        x, w = torch.empty(t, K, **like), torch.empty(K, H, **like)
        residual = torch.empty(t, 1, H, **like) if is_reshaped else torch.empty(t, H, **like)
        gm = make_fx(fn, tracing_mode="symbolic")(x, w, residual)
    if not is_reshaped:
        assert rewrites(gm) == ["skinny_mm adds the residual, 32 columns"]
        return
    (outcome,) = run_passes(gm, fuse_residual)
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == ["reshaped rows of a number that is not known"]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_compiled_on_a_gpu(tokens, device):
    """Bitwise what the ops and an addition give, with few experts for a token and with many."""
    for num_experts in 4, 64:

        def mlp(x, ids, weights, up, down, residual):
            return moe.experts(x, ids, weights, up, down) + residual

        torch._dynamo.reset()
        ids = torch.rand(tokens, num_experts, device=device).topk(2).indices
        w = [half(num_experts, n, k).to(device).mT for n, k in ((2 * H, K), (K, H))]
        x, residual = (half(tokens, K).to(device) for _ in range(2))
        args = x, ids, torch.rand(tokens, 2, device=device), *w, residual
        options = {"require": {"fuse_residual": 1}}
        fn = torch.compile(mlp, backend="moe_compile", fullgraph=True, options=options)
        assert torch.equal(fn(*args), mlp(*args))
