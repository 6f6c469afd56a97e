"""The tools for writers of passes are tools only if what they show is what the passes see."""

import pytest
import torch
from expecttest import assert_expected_inline
from test_backend import H, Layer, T

from moe_compile.passes import PASSES
from moe_compile.passes._outcome import Outcome
from moe_compile.testing import assert_documented, capture, capture_all, render, run_passes


def test_capture_is_the_graph_that_the_backend_hands_to_passes():
    layer, x = Layer(), torch.randn(T, H)
    seen = []

    def look(graph):
        seen.append(render(graph))

    with torch.no_grad():
        captured = render(capture(layer, x).graph)
        options = {"extra_passes": [look], "exactness": "lossy"}
        options["disable"] = [p.__name__ for p in PASSES]
        torch.compile(layer, backend="moe_compile", options=options)(x)
    assert seen == [captured]


def test_capture_can_be_run_before_and_after_the_passes():
    layer, x = Layer(), torch.randn(T, H)
    with torch.no_grad():
        gm = capture(layer, x)
        shapes = {tuple(t.shape): t for t in (x, *layer.parameters())}
        inputs = [
            shapes[tuple(n.meta["val"].shape)] for n in gm.graph.nodes if n.op == "placeholder"
        ]
        torch.testing.assert_close(gm(*inputs)[0], layer(x))
        rewrites = {
            p.__name__: len(o.rewrites) for p, o in zip(PASSES, run_passes(gm), strict=True)
        }
        assert [name for name, count in rewrites.items() if count] == [
            "find_experts",
            "find_routing",
            "find_activation",
            "choose_kernels",
        ]
        torch.testing.assert_close(gm(*inputs)[0], layer(x))


def test_render():
    gm = capture(lambda x: (x.half() @ x.half().t()).relu().split(2)[1], torch.randn(4, 3))
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: f32[4, 3]
convert_element_type: f16[4, 3] = prims.convert_element_type(arg0_1, f16)
convert_element_type_1: f16[4, 3] = prims.convert_element_type(arg0_1, f16)
permute: f16[3, 4] = aten.permute(convert_element_type_1, [1, 0])
mm: f16[4, 4] = aten.mm(convert_element_type, permute)
relu: f16[4, 4] = aten.relu(mm)
split = aten.split.Tensor(relu, 2)
getitem: f16[2, 4] = split[1]
return [getitem]""",
    )


def test_capture_wants_one_graph():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    def two(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert len(capture_all(broken, torch.ones(2))) == 1
    with pytest.raises(RuntimeError, match="capture: expected one graph, got 2"):
        capture(two, torch.ones(2))


def test_assert_documented_catches_a_stale_docstring():
    def stale(graph):
        """Nothing.

        Before:
            return []

        After:
            return []
        """

    with pytest.raises(AssertionError, match="Before is"):
        assert_documented(stale, capture(lambda x: x + 1, torch.ones(2)))


def test_a_pass_that_does_not_say_what_it_changed_is_caught():
    def silent(graph):
        (neg,) = graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
        neg.replace_all_uses_with(neg.args[0])
        return Outcome()

    gm = capture(lambda x: x.neg().exp(), torch.randn(3))
    with pytest.raises(AssertionError, match=r"silent.* changed a graph without a rewrite"):
        run_passes(gm, silent)
