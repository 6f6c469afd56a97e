"""What becomes a live constant, in every spelling, and what does not, with the reason."""

import pytest
import torch
from torch import nn

from moe_compile.ops import moe
from moe_compile.passes import hoist_constants
from moe_compile.passes._constants import constants_of
from moe_compile.passes._settings import Settings, set_settings
from moe_compile.passes.hoist_constants import SMALL
from moe_compile.testing import assert_documented, capture, render, run_graph, run_passes

bf16, f32 = torch.bfloat16, torch.float32


class Module(nn.Module):
    """`forward` is a function of the module and one input."""

    def __init__(self, forward, dtype=bf16, shape=(64, 32)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape).to(dtype))
        self.register_buffer("b", torch.randn(shape[0]).to(dtype))
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def hoisted(forward, x=None, settings=None, **kwargs):
    """The captured graph before and after, the outcome, and the equality of their results."""
    module = Module(forward, **kwargs)
    x = torch.randn(5, 32) if x is None else x
    with torch.no_grad():
        gm = capture(module, x)
        inputs = inputs_of(gm, module, x)
        before = gm(*inputs)
        if settings:
            set_settings(gm, settings)
        (outcome,) = run_passes(gm, hoist_constants)
        after = run_graph(gm, *inputs)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    return gm, outcome


def inputs_of(gm, module, x):
    """The graph's inputs, found by dtype and shape."""
    known = {(t.dtype, tuple(t.shape)): t for t in (x, *module.parameters(), *module.buffers())}
    vals = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return [known[v.dtype, tuple(v.shape)].detach() for v in vals]


def reasons(outcome):
    return [event.detail for event in outcome.declined]


def test_documented_example():
    with torch.no_grad():
        module = Module(lambda m, x: x.float() @ m.w.float().t())
        assert_documented(hoist_constants, capture(module, torch.randn(5, 32, dtype=bf16)))


SPELLINGS = {
    "to(dtype)": lambda m, x: x @ m.w.to(f32).t(),
    "type": lambda m, x: x @ m.w.type(f32).t(),
    "type_as": lambda m, x: x @ m.w.type_as(x).t(),
    "float()": lambda m, x: x @ m.w.float().t(),
    "to another's dtype": lambda m, x: nn.functional.linear(x, m.w.to(x)),
    "_to_copy": lambda m, x: x @ torch.ops.aten._to_copy(m.w, dtype=f32).t(),
    "convert_element_type": lambda m, x: x @ torch.ops.prims.convert_element_type(m.w, f32).t(),
    "of a transpose": lambda m, x: x @ m.w.t().float(),
    "of a slice": lambda m, x: x @ m.w[:7].float().t(),
    "then a slice": lambda m, x: x @ m.w.float()[:7].t(),
    "of a reshape": lambda m, x: x @ m.w.reshape(32, 64).float(),
    "between views": lambda m, x: x @ m.w.view(2, 32, 32)[1].unsqueeze(0).float().squeeze(0).t(),
    "of one half of a split": lambda m, x: x @ m.w.split(32)[1].float().t(),
    "and a copy in another layout": lambda m, x: x @ m.w.t().contiguous().float(),
    "cast twice alike": lambda m, x: (x @ m.w.float().t()) * (x @ m.w.float().t()).sigmoid(),
    "of a buffer": lambda m, x: torch.mm(x, m.w.float().t()) + m.b.float(),
    "in a product of experts": lambda m, x: torch.bmm(
        x.expand(2, 5, 32), m.w.view(2, 32, 32).float()
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_cast(spelling):
    gm, outcome = hoisted(SPELLINGS[spelling])
    assert 1 <= len(constants_of(gm.graph)) <= 2
    text = render(gm.graph)
    assert "convert_element_type" not in text
    assert "_to_copy" not in text
    assert len(outcome.rewrites) >= len(constants_of(gm.graph))
    assert run_passes(gm, hoist_constants)[0].rewrites == []  # twice = once


def test_one_constant_for_equal_casts():
    gm, _ = hoisted(SPELLINGS["cast twice alike"])
    assert len(constants_of(gm.graph)) == 1


def test_a_sum_that_widens_without_a_cast():
    gm, outcome = hoisted(lambda m, x: x.sum(1, keepdim=True) + m.b)
    (constant,) = constants_of(gm.graph)
    assert constant.val.dtype == f32
    assert "constant float32[64] from bfloat16[64]" in outcome.rewrites[0].detail


def test_a_chain_of_arithmetic_is_one_constant():
    decay = lambda m, x: x[:, :1] * torch.exp(-torch.exp(m.b.float()))  # noqa: E731
    gm, _ = hoisted(decay)
    (constant,) = constants_of(gm.graph)
    assert "exp" not in render(gm.graph)
    assert str(constant.recipe.graph).count("exp.default") == 2


def test_arithmetic_stays_where_every_bit_counts():
    decay = lambda m, x: x[:, :1] * torch.exp(-m.b.float())  # noqa: E731
    gm, outcome = hoisted(decay, settings=Settings(exactness="bitwise"))
    assert constants_of(gm.graph) == []
    assert (
        "its arithmetic would round as uncompiled, not as fused, and exactness=bitwise"
        in reasons(outcome)
    )


def test_a_weight_laid_out_anew_for_a_kernel():
    def interleaved(m, x):
        gate, up = m.w.chunk(2)
        return x @ torch.stack((gate, up), 1).flatten(0, 1).t()

    gm, _ = hoisted(interleaved, dtype=f32)
    (constant,) = constants_of(gm.graph)
    assert constant.nbytes == 64 * 32 * 4


def test_dynamic_shapes():
    module = Module(lambda m, x: x @ m.w.float().t())
    x = torch.randn(5, 32)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        gm = capture(module, x)
        run_passes(gm, hoist_constants)
    (constant,) = constants_of(gm.graph)
    assert tuple(constant.val.shape) == (64, 32)


def mutated(m, x):
    y = x[:, :1] * m.b.float()
    m.b.add_(1)
    return y


def returned(m, x, view=lambda w: w):
    w = m.w.float()
    return x @ w.t(), view(w)


LEFT = {
    "of an activation": (lambda m, x: x.bfloat16() @ m.w.t(), "1 casts of activations change"),
    "of a buffer the graph writes to": (mutated, "the graph writes to it"),
    "returned": (returned, "the forward returns it"),
    "a view of it returned": (
        lambda m, x: returned(m, x, lambda w: w.t()[1:]),
        "the forward returns it",
    ),
    "random": (lambda m, x: x @ torch.rand_like(m.w).float().t(), "it is random"),
    "of a shape that depends on the input": (
        lambda m, x: x[:, :1] * m.b.float().expand(x.shape[0], 64),
        None,
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_with_the_reason(case):
    forward, reason = LEFT[case]
    module = Module(forward)
    with torch.no_grad():
        gm = capture(module, torch.randn(5, 32))
        before = render(gm.graph)
        (outcome,) = run_passes(gm, hoist_constants)
    if reason is None:
        assert len(constants_of(gm.graph)) == 1  # only the view depends on it
        return
    assert render(gm.graph) == before
    assert any(r.startswith(reason) for r in reasons(outcome)), outcome


def test_a_lookup_casts_only_the_rows_it_finds():
    rows = SMALL // 32 + 1
    lookup = lambda m, x: nn.functional.embedding(x, m.w.float())  # noqa: E731
    gm, outcome = hoisted(lookup, x=torch.tensor([3, 0]), shape=(rows, 32))
    assert constants_of(gm.graph) == []
    assert any("more traffic a forward" in r for r in reasons(outcome))


def test_a_large_fused_cast_is_cheaper_where_it_is():
    scaled = lambda m, x: x.view(-1, 1) * m.w.float()  # noqa: E731
    gm, outcome = hoisted(scaled, x=torch.randn(1, SMALL), shape=(SMALL, 2))
    assert constants_of(gm.graph) == []
    assert any("more traffic a forward" in r for r in reasons(outcome))


def test_quantised_weights_stay_small():
    class Quantised(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.register_buffer("w", torch.ones(rows, 64, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(rows, 1))

        def forward(self, x):
            return x @ (self.w.float() * self.scale).t()

    for rows, count in (SMALL // 256 + 1, 0), (32, 1):
        with torch.no_grad():
            gm = capture(Quantised(rows), torch.randn(5, 64))
            (outcome,) = run_passes(gm, hoist_constants)
        assert len(constants_of(gm.graph)) == count
        undone = [r for r in reasons(outcome) if r.endswith("would undo what quantisation saves")]
        assert len(undone) == 1 - count


def test_the_budget_takes_what_saves_most():
    both = lambda m, x: (x @ m.w.float().t()) + m.b.float()  # noqa: E731
    gm, outcome = hoisted(both, settings=Settings(constant_budget=64 * 32 * 4 + 8))
    (constant,) = constants_of(gm.graph)
    assert constant.val.shape == (64, 32)
    assert reasons(outcome) == ["constant_budget_mb: 256 bytes wanted, 8 bytes left"]


def test_gradients_keep_the_cast():
    gm = capture(Module(lambda m, x: x @ m.w.float().t()), torch.randn(5, 32))
    (outcome,) = run_passes(gm, hoist_constants)
    assert constants_of(gm.graph) == []
    assert reasons(outcome) == ["its gradient is wanted"]


@pytest.mark.gpu
def test_a_copy_to_another_device_stays():
    module = Module(lambda m, x: x @ m.w.to(x.device, f32).t())
    with torch.no_grad():
        gm = capture(module, torch.randn(5, 32, device="cuda"))
        (outcome,) = run_passes(gm, hoist_constants)
    assert constants_of(gm.graph) == []
    assert any("another device" in r for r in reasons(outcome)), outcome


def test_a_cast_that_reaches_an_op_of_ours():
    def route(m, x):
        return moe.route(x, 2, "sigmoid", True, m.b.double().to(f32))[0]

    gm, outcome = hoisted(route, x=torch.randn(5, 64))
    (constant,) = constants_of(gm.graph)
    assert constant.val.dtype == f32
    (event,) = outcome.rewrites
    assert event.detail.endswith("384 bytes less to move in a forward")  # 128 read, 256 written


def normed(m, x, cast):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (cast(m.b) * wide).to(x.dtype)


@pytest.mark.parametrize("cast", [torch.Tensor.float, lambda weight: weight])
def test_the_weight_of_a_norm_is_left_as_it_is(cast):
    """gpt-oss widens it, or lets the product do so; `fuse_norm` reads it in x's dtype."""
    x = torch.randn(5, 32).to(bf16)
    gm, outcome = hoisted(lambda m, x: normed(m, x, cast), x, shape=(32, 32))
    assert constants_of(gm.graph) == []
    declined = "an RMSNorm widens it as it reads it"
    assert (declined in reasons(outcome)) == (cast is torch.Tensor.float)


def test_a_weight_that_not_only_norms_read_is_hoisted():
    x = torch.randn(5, 32).to(bf16)

    def fn(m, x):
        return normed(m, x, torch.Tensor.float), x + m.b.float()

    gm, _ = hoisted(fn, x, shape=(32, 32))
    assert len(constants_of(gm.graph)) == 1
