"""The attention of one query reads the cache, not copies of it."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_compile.passes._graph import clean
from moe_compile.passes.read_cache import read_cache
from moe_compile.testing import assert_documented, capture, render, run_passes

aten = torch.ops.aten
B, A, G, S, D = 2, 8, 4, 6, 8


def repeat(x, n=A // G):
    """As transformers' repeat_kv does."""
    b, g, s, d = x.shape
    return x.unsqueeze(2).expand(b, g, n, s, d).reshape(b, g * n, s, d)


def numbers(mask, closed, dtype=torch.bfloat16):
    """A bool mask as torch writes it before it calls a kernel."""
    yes, no = (torch.full([], x, dtype=dtype, device=mask.device) for x in (0.0, closed))
    return torch.where(mask, yes, no)


def cudnn(k, v, mask, q):
    mask = numbers(mask, -65504.0)
    return aten._scaled_dot_product_cudnn_attention(q, repeat(k), repeat(v), mask, False)[0]


def efficient(k, v, mask, q):
    """torch pads masks to the alignment that this kernel wants, and expands them."""
    mask = aten.constant_pad_nd(numbers(mask, -torch.inf), [0, 2])
    mask = aten.slice(mask, -1, 0, S).expand(B, A, 1, S)
    k, v = repeat(k), repeat(v)
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]


def closed_first(k, v, is_open, q):
    """A model's own mask: numbers where it is closed, in float32, rounded."""
    closed = torch.full([], -torch.inf, device=q.device)
    mask = torch.where(is_open.logical_not(), closed, 0.0).to(q.dtype)
    return aten._scaled_dot_product_efficient_attention(q, repeat(k), repeat(v), mask, False)[0]


def flash(k, v, q):
    return aten._scaled_dot_product_flash_attention(q, repeat(k), repeat(v))[0]


def inputs(groups=G, queries=1, dtype=torch.bfloat16):
    k, v = torch.randn(2, B, groups, S, D).to(dtype)
    mask = torch.rand(B, 1, 1, S) < 0.5
    mask[..., 0] = True
    return k, v, mask, torch.randn(B, A, queries, D).to(dtype)


def rewritten(gm):
    """The one attention that the pass made of another; nothing is left for a second run."""
    (outcome,) = run_passes(gm, read_cache)
    assert (len(outcome.rewrites), outcome.declined) == (1, [])
    (again,) = run_passes(gm, read_cache)
    assert (again.rewrites, again.declined) == ([], [])
    (line,) = (line for line in render(gm.graph).splitlines() if "= moe_compile.attend(" in line)
    return line


def declined(gm):
    (outcome,) = run_passes(gm, read_cache)
    assert not outcome.rewrites
    return [e.detail for e in outcome.declined]


def documented(k, v, mask, q):
    mask = numbers(mask, -65536.0)
    return aten._scaled_dot_product_cudnn_attention(q, repeat(k), repeat(v), mask, False)[0]


def test_docstring():
    gm = graph_on_gpu(documented, *inputs())
    clean(gm.graph)  # of the outputs that nobody reads
    assert_documented(read_cache, gm)


@pytest.mark.parametrize("fn", [cudnn, efficient, closed_first, flash])
def test_same_values(fn):
    k, v, mask, q = inputs()
    args = (k, v, q) if fn is flash else (k, v, mask, q)
    gm = graph_on_gpu(fn, *args)
    rewritten(gm)
    how = {"attn_mask": None if fn is flash else mask}
    wide = (x.double() for x in (q, repeat(k), repeat(v)))
    exact = F.scaled_dot_product_attention(*wide, **how)
    eager = F.scaled_dot_product_attention(q, repeat(k), repeat(v), **how)
    error, least = ((x.double() - exact).abs().max() for x in (gm(*args)[0], eager))
    assert error <= 2 * least + torch.finfo(q.dtype).eps * exact.abs().max()


def test_nothing_but_the_op_is_left():
    gm = graph_on_gpu(efficient, *inputs())
    rewritten(gm)
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.moe_compile.attend.default]


def test_decode_of_qwen3():
    """The graph of transformers 5.17 on an H200: a static cache, written, then read."""

    def decode(keys, values, position, k, v, q):
        at = torch.arange(1, device=q.device) + position
        keys = aten.index_put(keys, [None, None, at], k)
        values = aten.index_put(values, [None, None, at], v)
        places = torch.arange(S, device=q.device).reshape(1, 1, 1, S)
        seen = (places <= at.reshape(1, 1, 1, 1)).expand(1, -1, 1, S)
        mask = numbers(seen, -65536.0)
        out, *_ = aten._scaled_dot_product_cudnn_attention(
            q, repeat(keys), repeat(values), mask, False, scale=0.5
        )
        return out.transpose(1, 2).reshape(1, 1, -1), keys, values

    keys, values, _, q = inputs()
    k = torch.randn(1, G, 1, D).bfloat16()
    gm = graph_on_gpu(decode, keys[:1], values[:1], torch.tensor(3), k, k, q[:1])
    assert_expected_inline(
        rewritten(gm),
        """attend: bf16[1, 8, 1, 8] = moe_compile.attend(arg5_1, index_put, index_put_1, scale=0.5, last=reshape)""",  # noqa: E501
    )
    assert "le" not in {n.name for n in gm.graph.nodes}
    (reshape,) = (n for n in gm.graph.nodes if n.target == aten.reshape.default)
    assert reshape.args[0].name == "arg2_1"  # not the position plus a 0, which takes a kernel


def iota(n, start=0, step=1):
    how = {"dtype": torch.int64, "device": "cuda", "requires_grad": False}
    return torch.ops.prims.iota(n, start=start, step=step, **how)


def positions(**how):
    """As in the graph of a static cache of transformers 5.17."""
    return aten.add.Tensor(iota(S, **how), 0).unsqueeze(0).unsqueeze(1).unsqueeze(2)


def here(p):
    """The position of the query: of one sequence, or [B]."""
    return (iota(1) + p).unsqueeze(1).unsqueeze(2).unsqueeze(3)


def masked(mask_of, p):
    """A cuDNN attention as torch writes it, with a mask of a position; how it is rewritten."""

    def fn(k, v, p, q):
        mask = numbers(mask_of(p).expand(B, -1, 1, S), -65536.0)
        return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0]

    k, v, _, q = inputs(A)
    line = rewritten(graph_on_gpu(fn, k, v, p, q))
    return line.partition("attend(arg3_1, arg0_1, arg1_1, ")[2]


ONE = torch.tensor(3)
EACH = torch.tensor([3, 1])


@pytest.mark.parametrize(
    ("mask_of", "p", "how"),
    [
        (lambda p: positions() <= here(p), ONE, "last=reshape)"),
        (lambda p: here(p) >= positions(), ONE, "last=reshape)"),
        (lambda p: positions() <= p, ONE, "last=reshape)"),
        (lambda p: positions() <= here(p), ONE.int(), "last=reshape)"),
        (lambda p: positions() <= here(p), EACH[:1], "last=arg2_1)"),
        (lambda p: positions() <= here(p), EACH, "last=arg2_1)"),
        (lambda p: positions() <= p.reshape(-1, 1, 1, 1), EACH[:, None], "last=reshape)"),
        (lambda p: positions() <= here(p).expand(B, 1, 1, 1), ONE, "last=reshape)"),
        (lambda p: positions() <= here(p + 1), EACH, "last=add)"),
        (lambda p: positions().expand(B, 1, 1, S) <= here(p), EACH, "last=arg2_1)"),
        (lambda p: torch.arange(S, device="cuda") <= here(p), EACH, "last=arg2_1)"),
        (lambda p: positions() + 1 <= here(p), ONE, "last=reshape)"),
        (lambda p: positions() < here(p), ONE, "last=reshape)"),
    ],
)
def test_a_mask_of_positions_is_the_last_of_them(mask_of, p, how):
    assert masked(mask_of, p) == how


@pytest.mark.parametrize(
    ("mask_of", "p"),
    [
        (lambda p: positions(start=1) <= here(p), ONE),
        (lambda p: positions(step=2) <= here(p), ONE),
        (lambda p: positions().flip(-1) <= here(p), ONE),
        (lambda p: positions() > here(p), ONE),
        (lambda p: positions() >= here(p), ONE),
        (lambda p: here(p) <= positions(), ONE),
        (lambda p: positions() <= here(p.float()), ONE),
        (lambda p: positions() <= torch.arange(S, device="cuda") + p, ONE),
        (lambda p: positions() <= p, torch.arange(S)),
        (lambda p: (positions() <= here(p)) & (positions() > here(p) - 4), ONE),
        (lambda p: iota(1).expand(1, 1, 1, S) <= here(p), ONE),
        (lambda p: (positions() <= here(p)) | (positions() == 5), EACH),
    ],
)
def test_other_masks_of_positions_stay_masks(mask_of, p):
    assert "last" not in masked(mask_of, p)


@pytest.mark.parametrize("p", [ONE, EACH], ids=["one", "each"])
def test_a_last_position_gives_the_same_values(p):
    def fn(k, v, p, q):
        mask = numbers(positions() <= p.reshape(-1, 1, 1, 1), -torch.inf)
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]

    k, v, _, q = inputs(A)
    args = (k, v, p, q)
    gm = graph_on_gpu(fn, *args)
    assert rewritten(gm).endswith("last=reshape)" if p is ONE else "last=arg2_1)")
    mask = torch.arange(S) <= p.reshape(-1, 1, 1, 1)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    error = (gm(*args)[0].double() - exact).abs().max()
    assert error <= 2 * torch.finfo(q.dtype).eps * exact.abs().max()


def test_a_position_for_each_head_stays_a_mask():
    def fn(k, v, p, q):
        mask = numbers(positions() <= p.reshape(1, A, 1, 1), -65536.0)
        return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0]

    k, v, _, q = inputs(A)
    assert rewritten(graph_on_gpu(fn, k, v, torch.arange(A), q)).endswith("arg1_1, le)")


def test_without_repetition_or_mask():
    def plain(k, v, q):
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=0.5)[0]

    for groups in A, G, 1:  # the last two as `enable_gqa` asks for them
        k, v, _, q = inputs(groups)
        line = rewritten(graph_on_gpu(plain, k, v, q))
        assert line.endswith("= moe_compile.attend(arg2_1, arg0_1, arg1_1, scale=0.5)")


def test_one_head_for_all_is_expanded_at_once():
    def fn(k, v, q):
        k, v = (x.expand(B, A, S, D) for x in (k, v))
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    k, v, _, q = inputs(1)
    assert rewritten(graph_on_gpu(fn, k, v, q)).endswith("(arg2_1, arg0_1, arg1_1)")


def test_mask_of_closed_before_open_is_turned():
    line = rewritten(graph_on_gpu(closed_first, *inputs()))
    assert line.endswith("attend(arg3_1, arg0_1, arg1_1, logical_not_1)")


def test_other_masks_are_added():
    def fn(k, v, mask, q):
        mask = mask.expand(B, A, 1, S)
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]

    k, v, mask, q = inputs()
    bias = torch.randn(1, A, 1, S).bfloat16()
    line = rewritten(graph_on_gpu(fn, k, v, bias, q))
    assert line.endswith("attend(arg3_1, arg0_1, arg1_1, arg2_1)")

    def finite(k, v, mask, q):
        """Finite numbers of a model's own close nothing where all are closed."""
        mask = numbers(mask, torch.finfo(q.dtype).min)
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]

    line = rewritten(graph_on_gpu(finite, k, v, mask, q))
    assert line.endswith("attend(arg3_1, arg0_1, arg1_1, where)")


def test_what_only_looks_like_a_repetition_is_read_as_it_is():
    def tiled(k, v, q):
        """Head h reads h % G, not h // (A / G)."""
        k, v = (x.unsqueeze(1).expand(B, 2, G, S, D).reshape(B, A, S, D) for x in (k, v))
        return aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def only_keys(k, v, q):
        return aten._scaled_dot_product_flash_attention(q, repeat(k), v)[0]

    k, v, _, q = inputs()
    line = rewritten(graph_on_gpu(tiled, k, v, q))
    assert line.endswith("attend(arg2_1, _unsafe_view, _unsafe_view_1)")
    line = rewritten(graph_on_gpu(only_keys, k, inputs(A)[1], q))
    assert line.endswith("attend(arg2_1, _unsafe_view, arg1_1)")


def attention(**how):
    def fn(k, v, q):
        return aten._scaled_dot_product_flash_attention(q, k, v, **how)[0]

    return fn


def reads_the_logsumexp(k, v, q):
    out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, logsumexp


def test_near_misses():
    k, v, mask, q = inputs()
    causal = graph_on_gpu(attention(is_causal=True), k, v, q)
    assert declined(causal) == ["a causal mask"]
    dropout = graph_on_gpu(attention(dropout_p=0.5), k, v, q)
    assert declined(dropout) == ["dropout"]
    others = "another output than the attention's is read"
    assert declined(graph_on_gpu(reads_the_logsumexp, k, v, q)) == [others]
    wide = [torch.cat([x] * 40, -1) for x in (k, v, q)]
    assert declined(graph_on_gpu(attention(), *wide)) == ["heads of 320 and 320 features"]
    double = [x.double() for x in (k, v, q)]
    assert declined(graph_on_gpu(attention(), *double)) == ["dtypes torch.float64"]
    odd = [torch.cat([x] * 3, 1)[:, :3] for x in (k, v)]
    assert declined(graph_on_gpu(attention(), *odd, q)) == ["8 query heads over 3 heads of keys"]
    one = [x[:1] for x in (k, v)]
    assert declined(graph_on_gpu(attention(), *one, q)) == ["keys and values that broadcast"]

    def flat(k, v, mask, q):
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]

    flat_mask = numbers(mask[:, 0], -torch.inf)
    assert declined(graph_on_gpu(flat, k, v, flat_mask, q)) == ["a mask of [2, 1, 6]"]


def test_several_queries_are_not_looked_at():
    k, v, _, q = inputs(queries=2)
    assert declined(graph_on_gpu(attention(), k, v, q)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the pass is for GPUs")
def test_a_cpu_is_left_alone():
    k, v, mask, q = inputs()
    assert declined(capture(F.scaled_dot_product_attention, q, repeat(k), repeat(v), mask)) == []


def test_dynamic_batch():
    """Sizes that are not known are compared by their symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    b = mode.from_tensor(torch.empty(5, 3)).shape[0]
    assert isinstance(b, torch.SymInt)
    with mode, torch.no_grad():
        like = {"device": "cuda", "dtype": torch.bfloat16}
        k, v = (torch.empty(b, G, S, D, **like) for _ in range(2))
        q = torch.empty(b, A, 1, D, **like)
        mask = torch.empty(b, 1, 1, S, dtype=torch.bool, device="cuda")
        gm = make_fx(lambda *args: [cudnn(*args)], tracing_mode="symbolic")(k, v, mask, q)
    assert rewritten(gm).endswith("attend(arg3_1, arg0_1, arg1_1, arg2_1)")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_on_a_gpu(masked, dtype, device):
    """Whichever kernel torch chooses for a static cache."""
    k, v = torch.randn(2, 2, 4, 301, 128, device=device).to(dtype)
    q = torch.randn(2, 32, 1, 128, device=device).to(dtype)
    mask = torch.arange(301, device=device).expand(2, 1, 1, 301) < 40

    def fn(q, k, v, mask):
        k, v = repeat(k, 8), repeat(v, 8)
        return F.scaled_dot_product_attention(q, k, v, mask if masked else None)

    gm = capture(fn, q, k, v, mask)
    (outcome,) = run_passes(gm, read_cache)
    assert len(outcome.rewrites) == 1
    out = torch.compile(fn, backend="moe_compile")(q, k, v, mask)
    exact = fn(q.double(), k.double(), v.double(), mask)
    eager = (fn(q, k, v, mask).double() - exact).abs().max()
    error = (out.double() - exact).abs().max()
    assert error <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.gpu
def test_on_a_gpu_up_to_a_position(device):
    """Its mask is not made, and the position may be counted on in place after it is read."""
    k, v = torch.randn(2, 1, 4, 301, 128, device=device).bfloat16()
    q = torch.randn(1, 32, 1, 128, device=device).bfloat16()

    def fn(q, k, v, p):
        at = torch.arange(1, device=q.device) + p
        mask = torch.arange(301, device=q.device).reshape(1, 1, 1, -1) <= at.reshape(1, 1, 1, 1)
        out = F.scaled_dot_product_attention(q, repeat(k, 8), repeat(v, 8), mask)
        p.add_(1)
        return out

    p, other = (torch.tensor(40, device=device) for _ in range(2))
    compiled = torch.compile(fn, backend="moe_compile")
    for _ in range(3):
        exact = fn(q.double(), k.double(), v.double(), p.clone())
        eager = (fn(q, k, v, p).double() - exact).abs().max()
        error = (compiled(q, k, v, other).double() - exact).abs().max()
        assert error <= 2 * eager + torch.finfo(q.dtype).eps * exact.abs().max()
        assert p == other
