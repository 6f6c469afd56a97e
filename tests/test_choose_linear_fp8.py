"""What `choose_linear` does to float8 on a GPU."""

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.fp8 import matmul
from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS
from moe_compile.passes.choose_linear import choose_linear
from moe_compile.passes.fuse_norm import fuse_norm
from moe_compile.passes.fuse_residual import fuse_residual
from moe_compile.testing import capture, render, run_passes

K = N = 256
FP8 = torch.float8_e4m3fn


def weight(n=N, k=K):
    w = (torch.randn(n, k) * 4).to(FP8)
    return w, torch.rand(-(-n // 128), -(-k // 128))


def half(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def linear(x, w, scale, bias=None, **how):
    return moe.linear_fp8(*moe.quant_fp8(x, **how), w, scale, bias)


def details(gm):
    (outcome,) = run_passes(gm, choose_linear)
    return [e.detail for e in outcome.rewrites], [e.detail for e in outcome.declined]


def on_gpu(fn, *args):
    """What the pass does to `fn`, and that the shapes and strides of its results stay."""
    gm = graph_on_gpu(fn, *args)
    (output,) = gm.graph.find_nodes(op="output")
    before = [(n.meta["val"].shape, n.meta["val"].stride()) for n in output.args[0]]
    found = details(gm)
    assert before == [(n.meta["val"].shape, n.meta["val"].stride()) for n in output.args[0]]
    return found


def attention(x, q, qs, k, ks, v, vs, bias, o, os):
    """As transformers' FP8Linear has them: q, k and v quantise the same x each."""
    one, two, three = (matmul(x, *w, [128, 128]) for w in ((q, qs), (k, ks), (v, vs)))
    return matmul(one + two * three, o, os, [128, 128]) + bias, x.float()


def test_layers_of_one_x():
    weights = [t for _ in range(3) for t in weight()]
    gm = graph_on_gpu(attention, half(1, 1, K), *weights, half(300), *weight(300))
    assert details(gm) == (
        [
            "skinny_mms_fp8: 1 rows times weights of 256 x 256, 256, 256",
            "skinny_mms_fp8: 1 rows times weights of 256 x 300",
        ],
        [],
    )
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[1, 1, 256]
arg1_1: f8e4m3[256, 256]
arg2_1: f32[2, 2]
arg3_1: f8e4m3[256, 256]
arg4_1: f32[2, 2]
arg5_1: f8e4m3[256, 256]
arg6_1: f32[2, 2]
arg7_1: bf16[300]
arg8_1: f8e4m3[300, 256]
arg9_1: f32[3, 2]
transpose: f8e4m3[256, 256] = aten.transpose.int(arg1_1, -1, -2)
transpose_1: f32[2, 2] = aten.transpose.int(arg2_1, -1, -2)
view: bf16[1, 256] = aten.view(arg0_1, [-1, 256])
t: f8e4m3[256, 256] = aten.t(transpose)
t_1: f32[2, 2] = aten.t(transpose_1)
transpose_2: f8e4m3[256, 256] = aten.transpose.int(arg3_1, -1, -2)
t_2: f8e4m3[256, 256] = aten.t(transpose_2)
transpose_3: f32[2, 2] = aten.transpose.int(arg4_1, -1, -2)
t_3: f32[2, 2] = aten.t(transpose_3)
transpose_4: f8e4m3[256, 256] = aten.transpose.int(arg5_1, -1, -2)
t_4: f8e4m3[256, 256] = aten.t(transpose_4)
transpose_5: f32[2, 2] = aten.transpose.int(arg6_1, -1, -2)
t_5: f32[2, 2] = aten.t(transpose_5)
skinny_mms_fp8 = moe_compile.skinny_mms_fp8(view, [t, t_2, t_4], [t_1, t_3, t_5], [None, None, None])
getitem: bf16[1, 256] = skinny_mms_fp8[0]
getitem_1: bf16[1, 256] = skinny_mms_fp8[1]
getitem_2: bf16[1, 256] = skinny_mms_fp8[2]
view_1: bf16[1, 1, 256] = aten.view(getitem, [1, 1, 256])
view_2: bf16[1, 1, 256] = aten.view(getitem_1, [1, 1, 256])
view_3: bf16[1, 1, 256] = aten.view(getitem_2, [1, 1, 256])
mul: bf16[1, 1, 256] = aten.mul.Tensor(view_2, view_3)
add: bf16[1, 1, 256] = aten.add.Tensor(view_1, mul)
transpose_6: f8e4m3[256, 300] = aten.transpose.int(arg8_1, -1, -2)
transpose_7: f32[2, 3] = aten.transpose.int(arg9_1, -1, -2)
view_4: bf16[1, 256] = aten.view(add, [-1, 256])
t_6: f8e4m3[300, 256] = aten.t(transpose_6)
t_7: f32[3, 2] = aten.t(transpose_7)
skinny_mms_fp8_1 = moe_compile.skinny_mms_fp8(view_4, [t_6], [t_7], [None])
getitem_3: bf16[1, 300] = skinny_mms_fp8_1[0]
view_5: bf16[1, 1, 300] = aten.view(getitem_3, [1, 1, 300])
add_1: bf16[1, 1, 300] = aten.add.Tensor(view_5, arg7_1)
_to_copy: f32[1, 1, 256] = aten._to_copy(arg0_1, dtype=f32)
return [add_1, _to_copy]""",  # noqa: E501
    )
    assert details(gm) == ([], [])  # twice = once


def layer(x, norm, q, qs, k, ks, v, vs, o, os):
    """Normed as transformers' models do it, then without a kernel of attention."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    rows = norm * wide.to(x.dtype)
    one, two, three = (matmul(rows, *w, [128, 128]) for w in ((q, qs), (k, ks), (v, vs)))
    return x + matmul(one + torch.tanh(two) * three, o, os, [128, 128])


def of_layer(M):
    weights = [t for _ in range(4) for t in weight()]
    scaled = [t / 64 if t.dtype != FP8 else t for t in weights]
    return half(M, 1, K), 1 + half(K) / 4, *scaled


def test_a_layer_is_two_products():
    """q, k and v norm what they read, the last product adds the residual."""
    args = of_layer(2)
    gm = graph_on_gpu(layer, *args)
    run_passes(gm, choose_linear)
    run_passes(gm, fuse_residual)
    run_passes(gm, fuse_norm)
    calls = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert [c for c in calls if "moe_compile" in c] == ["moe_compile.skinny_mms_fp8.default"] * 2
    assert not any("rsqrt" in c or "mean" in c for c in calls)
    assert torch.equal(gm(*args)[0], layer(*args))


def test_what_was_given_goes_along():
    def fn(x, w, scale, bias):
        how = {"power_of_two": True, "amax_floor": 1e-4, "column_major": True}
        q, q_scale = moe.quant_fp8(x, **how)
        return moe.linear_fp8(q, q_scale, w, scale, bias, torch.float16), q

    gm = graph_on_gpu(fn, half(MOST_ROWS, K), *weight(), half(N).half())
    assert details(gm) == (["skinny_mms_fp8: 16 rows times weights of 256 x 256"], [])
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: bf16[16, 256]
arg1_1: f8e4m3[256, 256]
arg2_1: f32[2, 2]
arg3_1: f16[256]
quant_fp8 = moe_compile.quant_fp8(arg0_1, 128, True, True, 0.0001)
getitem: f8e4m3[16, 256] = quant_fp8[0]
skinny_mms_fp8 = moe_compile.skinny_mms_fp8(arg0_1, [arg1_1], [arg2_1], [arg3_1], power_of_two=True, amax_floor=0.0001, dtype=f16)
getitem_1: f16[16, 256] = skinny_mms_fp8[0]
return [getitem_1, getitem]""",  # noqa: E501
    )


def test_at_most_four_together():
    weights = [t for _ in range(6) for t in weight()]

    def fn(x, *weights):
        return tuple(linear(x, *w) for w in zip(weights[::2], weights[1::2], strict=True))

    found = [d.partition(" times ")[2] for d in on_gpu(fn, half(2, K), *weights)[0]]
    assert found == ["weights of 256 x 256, 256, 256, 256", "weights of 256 x 256, 256"]


def dtypes(x, a, s, b, t):
    return linear(x, a, s), moe.linear_fp8(*moe.quant_fp8(x), b, t, None, torch.float32)


APART = {
    "different x": lambda x, a, s, b, t: (linear(x, a, s), linear(x + 1, b, t)),
    "floors": lambda x, a, s, b, t: (linear(x, a, s), linear(x, b, t, amax_floor=1e-12)),
    "powers of two": lambda x, a, s, b, t: (linear(x, a, s), linear(x, b, t, power_of_two=True)),
    "a scale that is computed": lambda x, a, s, b, t: (linear(x, a, s), linear(x, b, t * 2)),
    "reshaped otherwise": lambda x, a, s, b, t: (
        linear(x, a, s),
        linear(x.view(1, -1), b.view(-1, 2 * K), t.view(1, 4)),
    ),
    "dtypes": dtypes,
}


@pytest.mark.parametrize("case", APART)
def test_apart(case):
    rewritten, declined = on_gpu(APART[case], half(2, K), *weight(), *weight())
    assert (len(rewritten), declined) == (2, [])


def of_groups_of_64(x, w, scale):
    return linear(x, w, scale, group=64)


def activated(x, w, scale):
    return moe.linear_fp8(*moe.silu_mul_quant(x), w, scale)


def given(x, x_scale, w, scale):
    return moe.linear_fp8(x, x_scale, w, scale)


def of_two(x, w, scale):
    return moe.linear_fp8(moe.quant_fp8(x)[0], moe.quant_fp8(x + 1)[1], w, scale)


DECLINED = {
    "groups of 64": (of_groups_of_64, (half(2, K),), "rows quantised with group"),
    "roundings": (
        lambda x, w, s: linear(x, w, s, scale_by_reciprocal=True, scale_floor=1e-9),
        (half(2, K),),
        "rows quantised with scale_floor, scale_by_reciprocal",
    ),
    "an activation": (activated, (half(2, 2 * K),), "rows that quant_fp8 did not make here"),
    "inputs": (
        given,
        (half(2, K).to(FP8), torch.rand(2, 2)),
        "rows that quant_fp8 did not make here",
    ),
    "scales of others": (of_two, (half(2, K),), "rows that quant_fp8 did not make here"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    fn, rows, reason = DECLINED[case]
    assert on_gpu(fn, *rows, *weight()) == ([], [reason])


@pytest.mark.parametrize("rows", [0, MOST_ROWS + 1])
def test_other_numbers_of_rows_are_not_looked_at(rows):
    assert on_gpu(linear, half(rows, K), *weight()) == ([], [])


def test_unknown_rows():
    gm = graph_on_gpu(linear, half(2, K), *weight())
    (node,) = gm.graph.find_nodes(op="call_function", target=moe.linear_fp8.default)
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        rows = shape_env.create_unbacked_symint()
        node.meta["val"] = torch.empty(rows, N, device="cuda", dtype=torch.bfloat16)
    assert details(gm) == ([], ["a number of rows that is not known before the call"])


def test_left_alone_on_a_cpu():
    gm = capture(linear, half(2, K), *weight())
    before = render(gm.graph)
    assert details(gm) == ([], [])
    assert render(gm.graph) == before


def test_values():
    """The rewritten graph on a CPU gives what the model gives."""
    weights = [t for _ in range(3) for t in weight()]
    args = half(2, 1, K), *weights, half(300), *weight(300)
    gm = graph_on_gpu(attention, *args)
    assert len(details(gm)[0]) == 2
    for got, want in zip(gm(*args), attention(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("M", [1, 3, 4, 16])
def test_compiled_layer_on_a_gpu(M):
    torch._dynamo.reset()
    args = [t.cuda() for t in of_layer(M)]
    require = {"choose_linear": 2, "fuse_residual": 1, **({"fuse_norm": 1} if M <= 4 else {})}
    fn = torch.compile(layer, backend="moe_compile", fullgraph=True, options={"require": require})
    got, want = fn(*args).float(), layer(*args).float()
    assert (got - want).square().mean().sqrt() <= 0.02 * want.square().mean().sqrt()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("M", [1, 4, 16])
def test_compiled_on_a_gpu(M):
    torch._dynamo.reset()
    weights = [t.cuda() for _ in range(3) for t in weight()]
    scaled = [t / 64 if t.dtype != FP8 else t for t in weights]
    args = half(M, 1, K).cuda(), *scaled, half(300).cuda(), *(t.cuda() for t in weight(300))
    options = {"require": {"choose_linear": 2}}
    fn = torch.compile(attention, backend="moe_compile", fullgraph=True, options=options)
    for got, want in zip(fn(*args), attention(*args), strict=True):
        err = (got.float() - want.float()).square().mean().sqrt()
        assert err <= 0.02 * want.float().square().mean().sqrt()
