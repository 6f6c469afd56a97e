import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from helpers import FLOATS, assert_close

from moe_compile.passes.choose_linear import LEAST_WEIGHT, MOST_ROWS, choose_linear
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


@pytest.mark.gpu
def test_other_devices():
    gm = capture(linear, torch.randn(1, K, device="cuda"), weight().cuda())
    assert rewrites(gm) == []
