"""Products norm the rows that they read."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.masking_utils import sdpa_mask

import moe_compile
from moe_compile.ops import moe
from moe_compile.passes._graph import prims
from moe_compile.passes.fuse_norm import fuse_norm
from moe_compile.testing import assert_documented, capture, render, run_passes

aten = torch.ops.aten
T, K, N = 2, 64, 32
BF16 = torch.bfloat16


def half(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


def normed(x, weight, eps=1e-6, round_first=True):
    """As models of transformers are decomposed; weight before the rounding as Llama's of torch."""
    wide = prims.convert_element_type(x, torch.float32)
    wide = wide * aten.rsqrt(aten.mean(aten.pow(wide, 2), [-1], True) + eps)
    if round_first:
        return weight * prims.convert_element_type(wide, x.dtype)
    wide = wide * prims.convert_element_type(weight, torch.float32)
    return prims.convert_element_type(wide, x.dtype)


def router(x, weight, w):
    return moe.skinny_mm(normed(x, weight), w)


INPUTS = half(T, K), half(K), half(K, N)


def rewrites(gm, count=1):
    (outcome,) = run_passes(gm, fuse_norm)
    assert (len(outcome.rewrites), outcome.declined) == (count, [])
    (again,) = run_passes(gm, fuse_norm)
    assert (again.rewrites, again.declined) == ([], [])
    return [e.detail for e in outcome.rewrites]


def declined(fn, *args):
    gm = graph_on_gpu(fn, *args)
    before = render(gm.graph)
    (outcome,) = run_passes(gm, fuse_norm)
    assert not outcome.rewrites
    assert render(gm.graph) == before
    return [e.detail for e in outcome.declined]


def test_docstring():
    assert_documented(fuse_norm, graph_on_gpu(router, *INPUTS))


def qkv(x, weight, wq, wk, wv, bias):
    """x [B, 1, K]; each product reshapes the rows for itself, as AOTAutograd traces it."""
    x = normed(x, weight)
    q, k, v = moe.skinny_mms(x.reshape(T, K), [wq.t(), wk.t(), wv.t()], [None, bias, None])
    return q, k, v


def test_queries_keys_and_values():
    args = half(T, 1, K), half(K), half(N, K), half(8, K), half(8, K), half(8)
    gm = graph_on_gpu(qkv, *args)
    assert rewrites(gm) == ["2 rows of 64 normed in the product with 3 weights"]
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[6:]),
        """\
t: bf16[64, 32] = aten.t(arg2_1)
t_1: bf16[64, 8] = aten.t(arg3_1)
t_2: bf16[64, 8] = aten.t(arg4_1)
reshape: bf16[2, 64] = aten.reshape(arg0_1, [2, 64])
rms_norm_mms = moe_compile.rms_norm_mms(reshape, arg1_1, 1e-06, [t, t_1, t_2], [None, arg5_1, None])
getitem: bf16[2, 32] = rms_norm_mms[0]
getitem_1: bf16[2, 8] = rms_norm_mms[1]
getitem_2: bf16[2, 8] = rms_norm_mms[2]
return [getitem, getitem_1, getitem_2]""",
    )
    for y, want in zip(gm(*args), qkv(*args), strict=True):
        torch.testing.assert_close(y, want)


def layer(h, weight, w_router, up, down, round_first=True):
    """The router's product comes first, then the experts read the same rows."""
    x = normed(h, weight, round_first=round_first)
    logits = moe.skinny_mm(x.view(T, K), w_router.t())
    scores, ids = moe.route(logits, 2)
    return moe.experts(x.reshape(T, K), ids, scores, up, down).view(T, 1, K)


LAYER = half(T, 1, K), half(K), half(N, K), half(N, K, 16) / 8, half(N, 8, K)


def test_normed_rows_are_kept_for_the_experts():
    gm = graph_on_gpu(layer, *LAYER)
    assert rewrites(gm) == ["2 rows of 64 normed in the product with 1 weights, and kept"]
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[5:]),
        """\
t: bf16[64, 32] = aten.t(arg2_1)
reshape: bf16[2, 64] = aten.reshape(arg0_1, [2, 64])
rms_norm_mms = moe_compile.rms_norm_mms(reshape, arg1_1, 1e-06, [t], [None], keep=True)
getitem: bf16[2, 32] = rms_norm_mms[0]
getitem_1: bf16[2, 64] = rms_norm_mms[1]
route = moe_compile.route(getitem, 2)
getitem_2: f32[2, 2] = route[0]
getitem_3: i64[2, 2] = route[1]
experts: bf16[2, 64] = moe_compile.experts(getitem_1, getitem_3, getitem_2, arg3_1, arg4_1)
view: bf16[2, 1, 64] = aten.view(experts, [2, 1, 64])
return [view]""",
    )
    torch.testing.assert_close(gm(*LAYER)[0], layer(*LAYER))


def test_rounded_after_its_weight():
    def fn(*args):
        return layer(*args, round_first=False)

    gm = graph_on_gpu(fn, *LAYER)
    rewrites(gm)
    assert "[None], round_first=False, keep=True)" in render(gm.graph)
    torch.testing.assert_close(gm(*LAYER)[0], fn(*LAYER))


def test_stands_where_the_rows_are_first_read():
    """Experts before the product; its weight's transpose is moved before both."""

    def fn(h, weight, w, up, down, ids, scores):
        x = normed(h, weight)
        out = moe.experts(x.reshape(T, K), ids, scores, up, down)
        return out, moe.skinny_mm(x.view(T, K), w.t()), x * 2

    args = *LAYER, torch.tensor([[0, 3], [1, 2]]), torch.rand(T, 2)
    gm = graph_on_gpu(fn, *args)
    rewrites(gm)
    calls = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assert calls.index("rms_norm_mms_default") < calls.index("experts")
    for y, want in zip(gm(*args), fn(*args), strict=True):
        torch.testing.assert_close(y, want)


def test_of_several_products_the_first_keeps_the_rows():
    def fn(h, weight, w, v):
        x = normed(h, weight)
        return moe.skinny_mms(x, [v], [None])[0], moe.skinny_mm(x, w)

    args = half(T, K), half(K), half(K, N), half(K, N)
    gm = graph_on_gpu(fn, *args)
    rewrites(gm)
    assert "skinny_mm(getitem" in render(gm.graph)
    for y, want in zip(gm(*args), fn(*args), strict=True):
        torch.testing.assert_close(y, want)


def test_a_weight_computed_too_late():
    def fn(h, weight, w):
        x = normed(h, weight)
        y = x + 1
        return moe.skinny_mm(x, w * 2), y

    reason = "a weight that is computed after the normed rows are first read"
    assert declined(fn, *INPUTS) == [reason]


def with_residual(x, weight, w, residual):
    return moe.skinny_mm(normed(x, weight), w, None, residual)


def heads(x, weight, w):
    """Normed by heads, multiplied whole."""
    return moe.skinny_mm(normed(x.view(T, 4, 16), weight).view(T, K), w)


def kept(x, weight, w):
    x = normed(x, weight)
    return moe.skinny_mm(x, w), x


def rows_of(m, dtype=BF16, k=K, n=N):
    return half(m, k, dtype=dtype), half(k, dtype=dtype), half(n, k, dtype=dtype).t()


NEAR_MISSES = {
    "residual": (with_residual, *INPUTS, half(T, N), "a product that adds a residual"),
    "heads": (heads, half(T, K), half(16), half(K, N), "a norm over 16 features of 64"),
    "many rows": (router, *rows_of(5), "5 rows, whose norm costs less by itself"),
    "stored apart": (
        lambda x, weight, w: moe.skinny_mm(normed(x, weight), w),
        *(half(2, K), half(K), half(K, 2 * N)[:, ::2]),
        "2 rows in torch.bfloat16, or weights not stored alike",
    ),
    "few programs": (
        kept,
        *rows_of(4, k=16384, n=8),
        "too few programs to keep the normed rows, which others read, too",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case):
    *given, reason = NEAR_MISSES[case]
    assert declined(*given) == [reason]


OTHERS = {
    "Gemma's weight": lambda x, weight, w: moe.skinny_mm(normed(x, 1 + weight), w),
    "no weight": lambda x, weight, w: moe.skinny_mm(
        prims.convert_element_type(x.float() * aten.rsqrt(x.float().pow(2).mean(-1, True)), BF16), w
    ),
    "scaled": lambda x, weight, w: moe.skinny_mm(normed(x, weight) * 2, w),
    "weight of rows": lambda x, weight, w: moe.skinny_mm(normed(x, x), w),
    "mean": lambda x, weight, w: moe.skinny_mm(normed(x - x.mean(-1, True), weight), w),
}


@pytest.mark.parametrize("case", ["no weight", "scaled", "weight of rows"])
def test_other_norms_stay(case):
    assert declined(OTHERS[case], *INPUTS) == []


@pytest.mark.parametrize("case", ["Gemma's weight", "mean"])
def test_what_comes_before_the_norm_stays(case):
    gm = graph_on_gpu(OTHERS[case], *INPUTS)
    rewrites(gm)
    torch.testing.assert_close(gm(*INPUTS)[0], OTHERS[case](*INPUTS))


def test_float16_of_few_rows():
    args = rows_of(4, torch.float16)
    gm = graph_on_gpu(router, *args)
    rewrites(gm)
    torch.testing.assert_close(gm(*args)[0], router(*args))


def test_cpu_is_left_alone():
    gm = capture(router, *INPUTS)
    (outcome,) = run_passes(gm, fuse_norm)
    assert not outcome.rewrites + outcome.declined


def test_unknown_rows():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    t = mode.from_tensor(torch.empty(5)).shape[0]
    assert isinstance(t, torch.SymInt)
    with mode, torch.no_grad():
        like = {"device": "cuda", "dtype": BF16}
        args = (torch.empty(s, **like) for s in ((t, K), (K,), (K, N)))
        gm = make_fx(lambda *args: [router(*args)], tracing_mode="symbolic")(*args)
    (outcome,) = run_passes(gm, fuse_norm)
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == ["a number of rows that is not known"]


def float8(x, weight, w, scale, **how):
    """As `choose_linear` leaves q, k and v of a model in float8, which view the rows."""
    x = normed(x.view(T, 1, K), weight)
    return tuple(moe.skinny_mms_fp8(x.view(T, K), [w, w], [scale, scale], [None, None], **how))


FLOAT8 = half(T, K), half(K), torch.randn(N, K).to(torch.float8_e4m3fn), torch.ones(1, 1)


def test_products_in_float8():
    gm = graph_on_gpu(float8, *FLOAT8)
    assert rewrites(gm) == ["2 rows of 64 normed in the float8 product with 2 weights"]
    assert_expected_inline(
        "\n".join(render(gm.graph).splitlines()[4:]),
        """\
skinny_mms_fp8 = moe_compile.skinny_mms_fp8(arg0_1, [arg2_1, arg2_1], [arg3_1, arg3_1], [None, None], norm=arg1_1, norm_eps=1e-06)
getitem: bf16[2, 32] = skinny_mms_fp8[0]
getitem_1: bf16[2, 32] = skinny_mms_fp8[1]
return [getitem, getitem_1]""",  # noqa: E501
    )
    assert all(map(torch.equal, gm(*FLOAT8), float8(*FLOAT8)))


def test_two_products_in_float8_norm_each_for_itself():
    def fn(x, weight, w, scale, residual):
        x = normed(x, weight, round_first=False)
        y = moe.skinny_mms_fp8(x, [w], [scale], [None])
        z = moe.skinny_mms_fp8(x, [w], [scale], [None], amax_floor=1e-12, residual=residual)
        return y[0], z[0]

    args = *FLOAT8, half(T, N)
    gm = graph_on_gpu(fn, *args)
    rewrites(gm, 2)
    assert aten.rsqrt.default not in {n.target for n in gm.graph.nodes}
    assert all(map(torch.equal, gm(*args), fn(*args)))


def float8_and_kept(x, *args):
    x = normed(x, args[0])
    return moe.skinny_mms_fp8(x, [args[1]], [args[2]], [None])[0], x


def float8_of(**how):
    return lambda x, *args: float8(x, *args, **how)


def float8_rows(x, weight, w, scale):
    return moe.skinny_mms_fp8(normed(x, weight), [w], [scale], [None])[0]


def float8_heads(x, weight, w, scale):
    x = normed(x.view(T, 4, 16), weight).view(T, K)
    return moe.skinny_mms_fp8(x, [w], [scale], [None])[0]


FLOAT8_NEAR_MISSES = {
    "others read": (float8_and_kept, *FLOAT8, "rows that others than products in float8 read"),
    "powers of two": (
        float8_of(power_of_two=True),
        *(*FLOAT8, "2 rows in float8 by powers of two, amax_floor 1e-10, eps 1e-06"),
    ),
    "a floor": (
        float8_of(amax_floor=1e-6),
        *(*FLOAT8, "2 rows in float8 by plain scales, amax_floor 1e-06, eps 1e-06"),
    ),
    "many rows": (
        float8_rows,
        *(half(5, K), *FLOAT8[1:]),
        "5 rows in float8 by plain scales, amax_floor 1e-10, eps 1e-06",
    ),
    "heads": (
        float8_heads,
        *(half(T, K), half(16), *FLOAT8[2:], "a norm over 16 features of 64"),
    ),
}


@pytest.mark.parametrize("case", FLOAT8_NEAR_MISSES)
def test_near_misses_in_float8(case):
    *given, reason = FLOAT8_NEAR_MISSES[case]
    assert declined(*given) == [reason]


# Weights are large enough for `choose_linear`, experts many enough for `choose_kernels`.
QWEN3 = {
    **{"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "head_dim": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32},
    **{"num_experts": 256, "num_experts_per_tok": 4, "norm_topk_prob": True},
}


@torch.library.custom_op("moe_compile_tests::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In place of what torch calls on GPUs alone."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@attention.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def without_kernel(module, q, k, v, mask, **how):
    return attention(q, k, v).transpose(1, 2), None


def decoder(device="cpu", attention="sdpa"):
    config = transformers.Qwen3MoeConfig(**QWEN3, attn_implementation=attention)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).to(device).eval()
    model.requires_grad_(False).set_experts_implementation("moe_compile")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.05)
    cache = transformers.StaticCache(config=config, max_cache_len=8)
    how = {"batch_size": 1, "num_heads": 4, "head_dim": 64, "dtype": BF16, "device": device}
    cache.early_initialization(**how)
    return model, cache


def on_gpu(gm):
    """A graph captured on a CPU, on a GPU."""
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda"))
    gm.recompile()
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return graph_on_gpu(lambda *args: tuple(x for x in gm(*args) if x is not None), *inputs)


@torch.no_grad()
def test_decode_of_qwen3_has_no_norm_and_no_residual_of_its_own():
    moe_compile.register_experts()
    transformers.AttentionInterface.register("without_kernel", without_kernel)
    transformers.AttentionMaskInterface.register("without_kernel", sdpa_mask)
    model, cache = decoder(attention="without_kernel")
    token = torch.tensor([[3]])
    gm = on_gpu(capture(model, token, past_key_values=cache, position_ids=token))
    run_passes(gm)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    calls = [n.args[0] if n.target is auto_functionalized else n.target for n in nodes]
    ours = [str(c).split(".")[1] for c in calls if "moe_compile" in str(c)]
    attention = ["rms_norm_mms", "rotate_and_store", "attention", "skinny_mm"]
    layer = [*attention, "rms_norm_mms", "route", "experts"]
    assert ours == [*layer, *layer, "rms_norm_mms"]
    assert aten.rsqrt.default not in calls
    wide = [n for n in gm.graph.nodes if n.target == aten.add.Tensor]
    assert all(n.meta["val"].numel() == 1 for n in wide)  # positions, not rows


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 4, 8, 16])
def test_compiled_qwen3_on_a_gpu(batch, device):
    """Errors against the model in float64, compiled and not: no more is rounded than eager rounds.

    Of most rows: one that is routed to another expert is as wrong as can be, here or there.
    """
    moe_compile.register_experts()
    model, _ = decoder(device)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    tokens = torch.arange(48, device=device).view(-1, batch, 1)
    want = torch.cat([exact(part, use_cache=False).logits for part in tokens])
    torch._dynamo.reset()
    require = {"fuse_residual": 4} | ({"fuse_norm": 5} if batch <= 4 else {})
    fn = torch.compile(model, backend="moe_compile", fullgraph=True, options={"require": require})
    errors = []
    for forward in fn, model:
        got = torch.cat([forward(part, use_cache=False).logits for part in tokens])
        errors.append((got.double() - want).square().mean((1, 2)).sqrt().median().item())
    assert errors[0] <= 1.1 * errors[1], errors
