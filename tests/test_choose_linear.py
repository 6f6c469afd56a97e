import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from helpers import FLOATS, assert_close, graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.ops import moe
from moe_compile.passes.choose_linear import (
    LEAST_WEIGHT,
    MOST_COLUMNS_CUDA,
    MOST_ROWS,
    MOST_ROWS_CUDA,
    choose_linear,
)
from moe_compile.testing import assert_documented, capture, render, run_passes

K = N = 256
assert K * N == LEAST_WEIGHT


def weight(dtype=torch.float32, n=N, k=K):
    return torch.nn.Parameter(torch.randn(n, k, dtype=dtype), requires_grad=False)


def rewrites(gm):
    (outcome,) = run_passes(gm, choose_linear)
    assert not outcome.declined
    return [e.detail for e in outcome.rewrites]


def linear(x, w, bias=None):
    return F.linear(x, w, bias)


def test_docstring():
    assert_documented(choose_linear, capture(lambda x, w: x @ w.t(), torch.randn(2, K), weight()))


def test_bias_and_batch():
    gm = capture(linear, torch.randn(3, 1, K), weight(), torch.randn(N))
    assert rewrites(gm) == ["skinny_mm: 3 rows times a weight of 256 x 256"]
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: f32[3, 1, 256]
arg1_1: f32[256, 256]
arg2_1: f32[256]
reshape: f32[3, 256] = aten.reshape(arg0_1, [3, 256])
permute: f32[256, 256] = aten.permute(arg1_1, [1, 0])
skinny_mm: f32[3, 256] = moe_compile.skinny_mm(reshape, permute, arg2_1)
reshape_1: f32[3, 1, 256] = aten.reshape(skinny_mm, [3, 1, 256])
return [reshape_1]""",
    )
    assert rewrites(gm) == []  # twice = once


def test_columns_contiguous():
    gm = capture(lambda x, w: x @ w, torch.randn(1, K), weight())
    assert rewrites(gm) == ["skinny_mm: 1 rows times a weight of 256 x 256"]
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: f32[1, 256]
arg1_1: f32[256, 256]
skinny_mm: f32[1, 256] = moe_compile.skinny_mm(arg0_1, arg1_1)
return [skinny_mm]""",
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 2, MOST_ROWS])
def test_values(M, dtype, has_bias):
    args = [torch.randn(M, K, dtype=dtype), weight(dtype)]
    args += [torch.randn(N, dtype=dtype)] if has_bias else []
    gm = capture(linear, *args)
    inputs = [next(a for a in args if a.shape == n.meta["val"].shape) for n in placeholders(gm)]
    assert len(rewrites(gm)) == 1
    assert_close(gm(*inputs)[0], linear, *args)


def placeholders(gm):
    return gm.graph.find_nodes(op="placeholder")


@torch.no_grad()
@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype, M):
    def layers(x, w, bias, w2, bias2):
        return linear(linear(x, w, bias).relu(), w2, bias2)

    torch._dynamo.reset()
    args = [weight(dtype), torch.randn(N, dtype=dtype)] * 2
    args = [torch.randn(M, K, dtype=dtype), *args]
    options = {"require": {"choose_linear": 2}}
    fn = torch.compile(layers, backend="moe_compile", fullgraph=True, options=options)
    assert_close(fn(*args), layers, *args)


def scaled(x, w):
    return torch.addmm(torch.ones(N), x, w.t(), beta=0.5)


def bias_of_rows(x, w):
    return torch.addmm(torch.ones(x.shape[0], 1), x, w.t())


NEAR_MISSES = {
    "many rows": (linear, MOST_ROWS + 1, weight()),
    "small weight": (linear, 2, weight(n=N - 1)),
    "computed weight": (lambda x, w: linear(x, w * 2), 2, weight()),
    "no dim contiguous": (linear, 2, weight(k=2 * K)[:, ::2]),
    "float64": (linear, 2, weight(torch.float64)),
    "scaled bias": (scaled, 2, weight()),
    "bias of rows": (bias_of_rows, 2, weight()),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_left_alone(case):
    fn, M, w = NEAR_MISSES[case]
    gm = capture(fn, torch.randn(M, K, dtype=w.dtype), w)
    before = render(gm.graph)
    assert "mm" in before
    assert rewrites(gm) == []
    assert render(gm.graph) == before


def test_dynamic_rows():
    gm = capture(linear, torch.randn(4, K), weight(), dynamic=True)
    before = render(gm.graph)
    assert rewrites(gm) == []
    assert render(gm.graph) == before


def half(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def attention(x, q, k, v, bias, o, gate):
    """Three layers of x, one of what comes of them, and a cast and a reshape on the way."""
    x = x.relu()
    y = linear(x, q) + linear(x, k, bias) * linear(x, v)
    return linear(y, o), x.float(), linear(x.reshape(-1, K), gate)


def test_layers_of_one_x_on_a_gpu():
    weights = [half(N, K) for _ in range(3)]
    gm = graph_on_gpu(attention, half(1, 1, K), *weights, half(N), half(512, K), half(300, K))
    assert rewrites(gm) == [
        "skinny_mms: 1 rows times weights of 256 x 256, 256, 256, 300",
        "skinny_mm: 1 rows times a weight of 256 x 512",
    ]
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[1, 1, 256]
arg1_1: bf16[256, 256]
arg2_1: bf16[256, 256]
arg3_1: bf16[256, 256]
arg4_1: bf16[256]
arg5_1: bf16[512, 256]
arg6_1: bf16[300, 256]
relu: bf16[1, 1, 256] = aten.relu(arg0_1)
t: bf16[256, 256] = aten.t(arg1_1)
view: bf16[1, 256] = aten.view(relu, [1, 256])
t_1: bf16[256, 256] = aten.t(arg2_1)
t_2: bf16[256, 256] = aten.t(arg3_1)
t_3: bf16[256, 300] = aten.t(arg6_1)
skinny_mms = moe_compile.skinny_mms(view, [t, t_1, t_2, t_3], [None, arg4_1, None, None])
getitem: bf16[1, 256] = skinny_mms[0]
getitem_1: bf16[1, 256] = skinny_mms[1]
getitem_2: bf16[1, 256] = skinny_mms[2]
getitem_3: bf16[1, 300] = skinny_mms[3]
_unsafe_view: bf16[1, 1, 256] = aten._unsafe_view(getitem, [1, 1, 256])
view_1: bf16[1, 1, 256] = aten.view(getitem_1, [1, 1, 256])
_unsafe_view_1: bf16[1, 1, 256] = aten._unsafe_view(getitem_2, [1, 1, 256])
mul: bf16[1, 1, 256] = aten.mul.Tensor(view_1, _unsafe_view_1)
add: bf16[1, 1, 256] = aten.add.Tensor(_unsafe_view, mul)
t_4: bf16[256, 512] = aten.t(arg5_1)
view_2: bf16[1, 256] = aten.view(add, [1, 256])
skinny_mm: bf16[1, 512] = moe_compile.skinny_mm(view_2, t_4)
_unsafe_view_2: bf16[1, 1, 512] = aten._unsafe_view(skinny_mm, [1, 1, 512])
_to_copy: f32[1, 1, 256] = aten._to_copy(relu, dtype=f32)
return [_unsafe_view_2, _to_copy, getitem_3]""",
    )
    assert rewrites(gm) == []  # twice = once


def test_one_layer_on_a_gpu():
    gm = graph_on_gpu(linear, half(MOST_ROWS_CUDA, K), half(N, K), half(N))
    assert rewrites(gm) == ["skinny_mm: 16 rows times a weight of 256 x 256"]
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[16, 256]
arg1_1: bf16[256, 256]
arg2_1: bf16[256]
t: bf16[256, 256] = aten.t(arg1_1)
skinny_mm: bf16[16, 256] = moe_compile.skinny_mm(arg0_1, t, arg2_1)
return [skinny_mm]""",
    )


def on_gpu(fn, *args):
    """What the pass does to `fn`, and that the shapes and strides of its results stay."""
    gm = graph_on_gpu(fn, *args)
    (output,) = gm.graph.find_nodes(op="output")
    before = [(n.meta["val"].shape, n.meta["val"].stride()) for n in output.args[0]]
    details = rewrites(gm)
    after = [(n.meta["val"].shape, n.meta["val"].stride()) for n in output.args[0]]
    assert before == after
    return [d.partition(" times ")[2] for d in details]


def test_at_most_four_together():
    details = on_gpu(lambda x, *ws: tuple(linear(x, w) for w in ws), half(2, K), *[half(N, K)] * 6)
    assert details == ["weights of 256 x 256, 256, 256, 256", "weights of 256 x 256, 256"]


SINGLE = "a weight of 256 x 256"
APART = {
    "different x": (lambda x, a, b: (linear(x, a), linear(x + 1, b)), ()),
    "different order": (lambda x, a, b: (linear(x, a), x @ b), ()),
    "a bias that is computed": (lambda x, a, b, c: (linear(x, a), linear(x, b, c + 1)), (half(N),)),
}


@pytest.mark.parametrize("case", APART)
def test_apart_on_a_gpu(case):
    fn, more = APART[case]
    assert on_gpu(fn, half(2, K), half(N, K), half(N, K), *more) == [SINGLE, SINGLE]


def test_different_dtypes_on_a_gpu():
    def layers(x, a, b):
        return linear(x, a), linear(x.half(), b)

    assert on_gpu(layers, half(2, K), half(N, K), half(N, K).half()) == [SINGLE, SINGLE]


NEAR_MISSES_ON_A_GPU = {
    "17 rows": (linear, half(MOST_ROWS_CUDA + 1, K), half(N, K)),
    "no rows": (linear, half(0, K), half(N, K)),
    "small weight": (linear, half(2, K), half(N - 1, K)),
    "head of a vocabulary": (linear, half(1, 8), half(MOST_COLUMNS_CUDA + 1, 8)),
    "computed weight": (lambda x, w: linear(x, w * 2), half(2, K), half(N, K)),
    "columns at odd places": (linear, half(2, K + 1), half(N, K + 1)),
    "no dim contiguous": (linear, half(2, K), half(N, 2 * K)[:, ::2]),
    "float32": (linear, torch.randn(2, K), torch.randn(N, K)),
}


@pytest.mark.parametrize("case", NEAR_MISSES_ON_A_GPU)
def test_left_alone_on_a_gpu(case):
    assert on_gpu(*NEAR_MISSES_ON_A_GPU[case]) == []


def test_another_reshape_of_x_on_a_gpu():
    def layers(x, a, b, c):
        return linear(x, a), linear(x.reshape(1, -1), b), linear(x.reshape(2, 1, K), c)

    details = on_gpu(layers, half(2, K), half(N, K), half(N, 2 * K), half(N, K))
    assert details == ["weights of 256 x 256, 256", "a weight of 512 x 256"]


def routed(x, w):
    return moe.route(F.linear(x, w), 2)


def also_read(x, w):
    logits = F.linear(x, w)
    return moe.route(logits, 2), logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("fn", "rows", "taken"), [(routed, 4, True), (routed, 5, False), (also_read, 4, False)]
)
def test_a_router_may_be_small_and_of_float32_on_a_gpu(fn, rows, taken, dtype):
    args = torch.randn(rows, K).to(dtype), weight(dtype, n=8)
    found = rewrites(graph_on_gpu(fn, *args))
    assert found == [f"skinny_mm: {rows} rows times a weight of 256 x 8"] * taken


def test_unknown_rows_on_a_gpu():
    gm = graph_on_gpu(linear, half(2, K), half(N, K))
    x = gm.graph.find_nodes(op="placeholder")[0]
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        rows = shape_env.create_unbacked_symint()
        x.meta["val"] = torch.empty(rows, K, device="cuda", dtype=torch.bfloat16)
    assert rewrites(gm) == []


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("M", [1, 4, 16])
def test_compiled_on_a_gpu(M):
    torch._dynamo.reset()
    weights = [half(n, K) / 16 for n in (N, N, N, 512, 300)]
    args = half(M, 1, K), *weights[:3], half(N), *weights[3:]
    args = [a.cuda() for a in args]
    options = {"require": {"choose_linear": 2}}
    fn = torch.compile(attention, backend="moe_compile", fullgraph=True, options=options)
    for got, want in zip(fn(*args), attention(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
