"""Real models of transformers: what the passes match, and that they still compute the same.

The graph of each family is captured whole, rewritten, and both graphs are run as they are, without
code generation, which takes seconds where a compile takes a minute. `benchmarks/families.py`
compiles them all; here three are.
"""

import copy
from collections.abc import Callable
from typing import Any

import families as small
import pytest
import torch
from torch import fx

import moe_compile
from moe_compile.passes import PASSES
from moe_compile.testing import run_graph, run_passes

FOREIGN_WARNINGS = [
    # transformers asks for its version through a cached function, which Dynamo sees through.
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
    # Dynamo makes such an instance itself, where a mask of transformers is a function with one.
    "ignore:.*Function'> should not be instantiated:DeprecationWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in FOREIGN_WARNINGS]

NAMES = [p.__name__ for p in PASSES]
COUNTED = ("find_experts", "find_routing", "find_activation")
# Families whose experts differ from those of the others in more than numbers: these in both forms.
SPECIAL = (
    "deepseek_v3",
    "deepseek_v4",
    "gemma4",
    "gpt_oss",
    "inkling2",
    "minimax_m3_vl",
    "mixtral",
    "muse_spark",
    "nemotron_h",
    "openai_privacy_filter",
    "qwen3_moe",
    "zaya",
)
CASES = [
    (name, form)
    for form in small.FORMS
    for name in small.families()
    if form == "grouped_mm" or name in SPECIAL
]


class Replay:
    """Runs a model through its ATen graphs, as captured or as the passes leave them."""

    def __init__(self, model: Any) -> None:
        self.counts = dict.fromkeys(COUNTED, 0)
        self.rewritten = False
        self._model = torch.compile(model, backend=small.until_passes(self._look, NAMES))

    def __call__(self, rewritten: bool, **inputs: Any) -> torch.Tensor:
        self.rewritten = rewritten
        return small.run(self._model, **inputs)

    def _look(self, gm: fx.GraphModule, before: fx.GraphModule) -> Callable[..., Any]:
        after = copy.deepcopy(before)
        for pass_, outcome in zip(PASSES, run_passes(after), strict=True):
            if pass_.__name__ in self.counts:
                self.counts[pass_.__name__] += len(outcome.rewrites)
        num_outputs = len(gm.graph.output_node().args[0])

        def run(*args: Any) -> Any:
            outputs = run_graph(after if self.rewritten else before, *args)
            assert len(outputs) == num_outputs
            return outputs

        return run


@pytest.mark.parametrize(("name", "form"), CASES)
def test_graph(name, form):
    model = small.build(name)
    model.set_experts_implementation(form)
    inputs = small.inputs()
    exact = small.exact_logits(name, model, **inputs)
    with small.counting_calls(small.expert_layers(model)) as called:
        eager = small.run(model, **inputs)
    torch._dynamo.reset()
    replay = Replay(model)
    before, after = replay(False, **inputs), replay(True, **inputs)
    left = small.KNOWN.get(name, small.Family()).left
    assert replay.counts == {p: len(called) - left.get(p, 0) for p in COUNTED}
    assert torch.equal(after.argmax(-1), exact.argmax(-1))
    error = {word: small.errors(x, exact) for word, x in [("eager", eager), ("before", before)]}
    theirs = tuple(map(max, *error.values()))
    size = small.errors(exact, torch.zeros_like(exact))
    assert small.within(small.errors(after, exact), theirs, size), (error, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_compiled(name, dtype):
    model = small.build(name, dtype)
    inputs = small.inputs()
    exact = small.exact_logits(name, model, **inputs)
    eager = small.run(model, **inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True)
    got = small.run(compiled, **inputs)
    if dtype == torch.bfloat16:
        # Rounded otherwise, a router's near tie may fall otherwise: that token is an expert off.
        settled = (got - exact).abs().amax(-1).flatten().argsort()[:-1]
        got, eager, exact = (logits.flatten(0, 1)[settled] for logits in (got, eager, exact))
    size = small.errors(exact, torch.zeros_like(exact))
    assert small.within(small.errors(got, exact), small.errors(eager, exact), size, dtype)
    if dtype == torch.float32:
        assert torch.equal(got.argmax(-1), eager.argmax(-1))
    small.run(compiled, **small.inputs(3, 9))  # dynamic from here on: one more graph, and no third
    with torch.compiler.set_stance("fail_on_recompile"):
        small.run(compiled, **small.inputs(4, 5))


@torch.no_grad()
def test_deepseek_v3_casts_no_router_weight():
    model = small.build("deepseek_v3", torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    report = moe_compile.explain(model, **small.inputs())
    assert report.counts["hoist_constants"] >= report.counts["find_routing"] == 1
    (graph,) = report.graphs
    (outcome,) = [p.outcome for p in graph.passes if p.name == "hoist_constants"]
    assert f"live constants: {graph.constants[0]}, " in str(report)
    assert any("mlp.gate" in event.layer for event in outcome.rewrites), outcome
