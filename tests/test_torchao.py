"""Experts whose weights are torchao's float8 tensors: found, and right."""

import pytest
import torch
import torch.nn.functional as F

import moe_compile
from moe_compile.passes.find_experts import find_experts
from moe_compile.testing import run_passes

torchao = pytest.importorskip("torchao.quantization", reason="torchao is one of many quantisers")

E, H, I, T, K = 4, 64, 32, 5, 2  # noqa: E741


class Experts(torch.nn.Module):
    """Sorted rows and torch._grouped_mm, as transformers and torchtitan have them."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(E, 2 * I, H).bfloat16(), requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(E, H, I).bfloat16(), requires_grad=False)

    def forward(self, x, ids, weights):
        flat = ids.reshape(-1)
        order = flat.sort(stable=True).indices
        offsets = torch.histc(flat.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
        h = torch._grouped_mm(x[order // K], self.up.transpose(-2, -1), offs=offsets)
        gate, up = h.chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=offsets)
        y = y * weights.reshape(-1)[order][:, None].to(y.dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].view(T, K, H).sum(1)


def test_float8_rows_are_declined():
    """torchao's dynamic activation scales: an op of GPUs, so the graph is made by hand."""
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "w", "x_scale", "w_scale", "offsets")]
    y = graph.call_function(torch.ops.aten._scaled_grouped_mm.default, tuple(inputs))
    graph.output([y])
    gm = torch.fx.GraphModule({}, graph)
    for node, shape in zip(inputs, [(8, H), (E, H, I), (8,), (E, I), (E,)], strict=True):
        node.meta["val"] = torch.empty(shape, device="meta")
    y.meta["val"] = torch.empty(8, I, device="meta")
    (outcome,) = run_passes(gm, find_experts)
    assert not outcome.rewrites
    assert [e.detail for e in outcome.declined] == [
        "float8 rows with a scale each, not in groups: moe_compile.quantize"
    ]


@pytest.mark.parametrize("budget", [0, 1024])
def test_float8_weights(budget, device):
    """They are dequantised in the graph: for each call, or once where the budget lets them be."""
    torch._dynamo.reset()
    model = Experts().to(device)
    for name in ("up", "down"):
        weight = getattr(model, name).data
        weight = torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow())
        setattr(model, name, torch.nn.Parameter(weight, requires_grad=False))
    x = torch.randn(T, H, device=device).bfloat16()
    ids = torch.rand(T, E, device=device).topk(K).indices
    weights = torch.rand(T, K, device=device)
    options = {"require": {"find_experts": 1}, "constant_budget_mb": budget}
    compiled = torch.compile(model, backend="moe_compile", options=options)
    with torch.no_grad():
        want = model(x, ids, weights)
        for _ in range(2):  # a unit in the last place of bfloat16, three times in a row
            err = compiled(x, ids, weights).float() - want.float()
            assert err.pow(2).mean().sqrt() < 3 * 2**-8 * want.float().pow(2).mean().sqrt()
    report = moe_compile.explain(model, x, ids, weights)
    assert report.counts["find_experts"] == 1
