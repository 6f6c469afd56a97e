"""The backend on small models: values, options, gradients, recompiles."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

from moe_compile import backend, explain
from moe_compile.passes._outcome import exactness

T, H, F, E, K = 6, 16, 12, 8, 2


class Layer(nn.Module):
    """A softmax top-k MoE layer that gathers weights, as one would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, 2 * F, H))
        self.w2 = nn.Parameter(torch.randn(E, H, F))

    def forward(self, x):
        scores, ids = self.router(x).softmax(-1, dtype=torch.float).topk(K, dim=-1)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(K, 0)
        gate, up = torch.bmm(self.w1[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        h = nn.functional.silu(gate) * up
        y = torch.bmm(self.w2[flat], h.unsqueeze(-1)).squeeze(-1)
        y = y * scores.reshape(-1).unsqueeze(-1)
        return y.view(-1, K, H).sum(1)


class Stack(nn.Module):
    """Equal layers, each of which counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        for layer in self.layers:
            layer.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        for layer in self.layers:
            x = counted(layer, x)
        return x


@torch.compiler.nested_compile_region
def counted(layer, x):
    layer.calls.add_(1)
    return nn.functional.layer_norm(x + layer(x) / layer.calls, [H])


@pytest.fixture
def layer(device):
    torch._dynamo.reset()
    return Layer().to(device)


@pytest.fixture
def x(device):
    return torch.randn(T, H, device=device)


def compiled(layer, **options):
    return torch.compile(layer, backend="moe_compile", fullgraph=True, options=options or None)


def test_the_name_is_an_entry_point():
    assert torch._dynamo.lookup_backend("moe_compile") is backend
    assert "moe_compile" in torch._dynamo.list_backends()


@torch.no_grad()
def test_values_with_every_pass_required(layer, x):
    require = {"find_experts": 1, "find_routing": 1, "find_activation": 1}
    torch.testing.assert_close(compiled(layer, require=require)(x), layer(x))


@torch.no_grad()
def test_require_more_than_there_is(layer, x):
    message = r"expected 2 rewrites of find_experts, got 1\nmoe_compile: 1 graph"
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(layer, require={"find_experts": 2})(x)


@torch.no_grad()
def test_unknown_option_fails_at_the_first_call(layer, x):
    with pytest.raises(BackendCompilerFailed, match=r"expected options among .*, got 'speed'"):
        compiled(layer, speed="high")(x)


@torch.no_grad()
def test_modes_compile(layer, x):
    for mode in ("default", "max-autotune-no-cudagraphs"):
        out = torch.compile(layer, backend="moe_compile", mode=mode)(x)
        torch.testing.assert_close(out, layer(x))


def test_exactness_bitwise_admits_no_reassociating_pass(layer, x):
    report = explain(layer, x, options={"exactness": "bitwise"})
    assert sum(report.counts.values()) == 0
    skipped = {p.name: p.skipped for p in report.graphs[0].passes}
    assert skipped["find_experts"] == "reassociating, but exactness=bitwise"


def test_disable(layer, x):
    report = explain(layer, x, options={"disable": ["find_activation"]})
    counts = {"find_experts": 1, "find_routing": 1, "find_activation": 0}
    assert counts.items() <= report.counts.items()


@torch.no_grad()
def test_extra_passes_run_after_ours(layer, x):
    seen = []

    def count_ours(graph):
        seen.append(sum("moe_compile" in str(n.target) for n in graph.nodes))

    torch.testing.assert_close(compiled(layer, extra_passes=[count_ours])(x), layer(x))
    # route and experts; without choose_kernels route, sort_tokens, 2 grouped_mm, silu_mul, combine
    assert seen == [2 if x.device.type == "cpu" else 6]


def test_extra_pass_is_held_to_the_exactness_it_states(layer, x):
    ran = []

    def silent(graph):
        ran.append("silent")

    @exactness("lossy")
    def stated(graph):
        ran.append("stated")

    report = explain(layer, x, options={"extra_passes": [silent, stated]})
    assert ran == ["silent"]
    assert report.graphs[0].passes[-1].skipped == "lossy, but exactness=reassociating"


@torch.no_grad()
def test_the_users_inductor_pass_is_kept(layer, x):
    seen = []

    class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append(any("moe_compile" in str(n.target) for n in graph.nodes))

        def uuid(self):
            return None

    with torch._inductor.config.patch(post_grad_custom_pre_pass=Theirs()):
        compiled(layer)(x)
    assert seen == [True]  # once, after ours


def test_gradients_are_those_of_eager(layer, x):
    compiled(layer)(x).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for gradient, parameter in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_any_number_of_tokens_in_one_compile(layer, device):
    counter = CompileCounterWithBackend("moe_compile")
    fn = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (5, 9, 33):
        x = torch.randn(tokens, H, device=device)
        torch.testing.assert_close(fn(x), layer(x))
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_pass_that_only_declines_warns(layer, x, caplog):
    class Shuffled(Layer):
        def forward(self, x):
            return super().forward(x).flip(0)

    def unsure(graph):
        from moe_compile.passes._outcome import Outcome

        outcome = Outcome()
        outcome.decline(next(iter(graph.nodes)), "it was Monday")
        return outcome

    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        compiled(Shuffled().to(x.device), extra_passes=[unsure])(x)
    assert "unsure declined 1x: it was Monday" in caplog.text


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph_trees_capture_the_layer(layer, x):
    expected = layer(x)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        fn = torch.compile(layer, backend="moe_compile", mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(fn(x), expected, rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@torch.no_grad()
def test_own_capture_replays_with_other_routing(layer, x):
    fn = compiled(layer)
    fn(x)  # compile and warm up before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-4)


def test_a_region_gets_the_passes_once_for_all_its_calls(x):
    torch._dynamo.reset()
    model = Stack().to(x.device)
    with torch.no_grad():
        report = explain(model, x)
        assert report.counts["find_experts"] == 1
        eager, compiled = copy.deepcopy(model), torch.compile(model, backend="moe_compile")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), eager(x))
    assert [layer.calls.item() for layer in model.layers] == [3, 3, 3]
