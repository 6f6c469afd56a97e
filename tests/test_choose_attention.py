import pytest
import torch
import torch.nn.functional as F

from moe_compile.passes.choose_attention import choose_attention
from moe_compile.testing import assert_documented, capture, render, run_passes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the pass is for CPUs")


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


def inputs(queries=1, heads=4, dtype=torch.float32):
    q = torch.randn(2, heads, queries, 8).to(dtype)
    return q, torch.randn(2, 4, 6, 8).to(dtype), torch.randn(2, 4, 6, 8).to(dtype)


def test_docstring():
    assert_documented(choose_attention, capture(plain, *inputs()))


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def grouped(k, v, q):
    """Two query heads for each of the keys' heads, repeated as transformers repeats them."""
    k, v = (x[:, :, None].expand(2, 4, 2, 6, 8).reshape(2, 8, 6, 8) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def masks():
    seen = torch.rand(2, 1, 1, 6) < 0.5
    seen[..., 0] = True
    seen[1] = False  # a query that may attend to nothing
    return {"bool": seen, "float": torch.where(seen, 0.0, -torch.inf)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "grouped", "bool", "float"])
def test_same_values(kind, dtype):
    fn, args = plain, inputs(dtype=dtype)
    if kind == "grouped":
        q, k, v = inputs(heads=8, dtype=dtype)
        fn, args = grouped, (k, v, q)  # a graph's inputs stand in the order of their use
    elif kind != "plain":
        mask = masks()[kind]
        fn, args = masked, (*args, mask if kind == "bool" else mask.to(dtype))
    gm = capture(fn, *args)
    assert len(run_passes(gm, choose_attention)[0].rewrites) == 1
    exact = fn(*(a.double() if a.is_floating_point() else a for a in args))
    error = (gm(*args)[0].double() - exact).abs().max()
    eager = (fn(*args).double() - exact).abs().max()
    assert error <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max()
    assert run_passes(gm, choose_attention)[0].rewrites == []


def test_many_queries_are_not_looked_at():
    gm = capture(plain, *inputs(queries=3))
    before = render(gm.graph)
    (outcome,) = run_passes(gm, choose_attention)
    assert (outcome.rewrites, outcome.declined) == ([], [])
    assert render(gm.graph) == before


def test_causal_is_declined():
    gm = capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *inputs())
    (outcome,) = run_passes(gm, choose_attention)
    assert outcome.rewrites == []
    assert [e.detail for e in outcome.declined] in ([], ["dropout or a causal mask"])


def test_logsumexp_read_is_declined():
    def both(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    gm = capture(both, *inputs())
    (outcome,) = run_passes(gm, choose_attention)
    assert outcome.rewrites == []
    assert [e.detail for e in outcome.declined] == ["the logsumexp is read"]
