"""explain: what it tells, and that it runs nothing but captures."""

import torch
from test_backend import E, H, Layer, T

from moe_compile import explain


def test_report_of_a_layer():
    report = explain(Layer(), torch.randn(T, H))
    counts = {"find_experts": 1, "find_routing": 1, "find_activation": 1, "choose_kernels": 1}
    assert counts.items() <= report.counts.items()
    (graph,) = report.graphs
    assert "aten.bmm" in graph.before
    assert "moe_compile" not in graph.before
    assert "aten.bmm" not in graph.after
    assert "moe_compile.experts" in graph.after
    (event,) = graph.passes[0].outcome.rewrites
    assert event.source.startswith("test_backend.py:")
    assert f"{E} experts, top-2" in event.detail
    text = str(report)
    assert "find_experts: 1 rewritten, 0 declined" in text
    assert "+experts" in text


def test_graph_breaks_are_told():
    layer = Layer()

    def broken(x):
        y = layer(x)
        torch._dynamo.graph_break()
        return layer(y)

    report = explain(broken, torch.randn(T, H))
    assert len(report.graphs) == 2
    assert report.counts["find_experts"] == 2
    assert sum(report.breaks.values()) == 1
    assert "graph break (1x)" in str(report)


def test_nothing_captured_is_told():
    report = explain(lambda x: x, torch.randn(2))
    assert report.graphs == []
    assert "Dynamo captured nothing" in str(report)


def test_layers_are_named():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    report = explain(Model(), torch.randn(T, H))
    layers = [e.layer for e in report.graphs[0].passes[0].outcome.rewrites]
    assert layers == ["layers.0", "layers.1"]
