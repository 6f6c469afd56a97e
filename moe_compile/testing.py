"""For those who write passes: see the graph, run passes over it, print it, hold a docstring to it.

    from moe_compile.testing import assert_documented, capture, render, run_passes

Everything here needs a CPU only.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from moe_compile.passes._graph import clean, render
from moe_compile.passes._outcome import Outcome, Pass

__all__ = ["assert_documented", "capture", "capture_all", "render", "run_passes", "section"]


class _Captured(BaseException):
    """Ends a compile once the graph is seen; not an Exception, so that Inductor lets it through."""


class _Snapshot(CustomGraphPass):
    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.Graph) -> None:
        owner = graph.owning_module
        self.graphs.append(fx.GraphModule(owner, graph))
        raise _Captured

    def uuid(self) -> None:
        return None  # never cached: a cached graph would not come by here


def capture(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> fx.GraphModule:
    """The ATen graph that the passes see when `fn(*args, **kwargs)` is compiled.

    It is taken from a real compile (Dynamo, functorch's AOT capture, Inductor's decompositions and
    joint passes), stopped before code is generated. Raises RuntimeError if `fn` does not give exactly
    one graph.
    """
    graphs = capture_all(fn, *args, dynamic=dynamic, **kwargs)
    if len(graphs) != 1:
        raise RuntimeError(f"capture: expected one graph, got {len(graphs)}")
    return graphs[0]


def capture_all(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    mode: str | None = None,
    **kwargs: Any,
) -> list[fx.GraphModule]:
    """Every graph that `fn(*args, **kwargs)` gives, in order of compilation; see `capture`."""
    snapshot = _Snapshot()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        patches = {**_mode_options(mode), "post_grad_custom_pre_pass": snapshot}
        try:
            compile_fx(gm, list(example_inputs), config_patches=patches)
        except _Captured:
            pass
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return snapshot.graphs


def _mode_options(mode: str | None) -> dict[str, Any]:
    return {} if mode in (None, "default") else dict(torch._inductor.list_mode_options(mode))


def run_passes(gm: fx.GraphModule, *passes: Pass) -> list[Outcome]:
    """Run passes as the backend does, in place; all of PASSES when none is named."""
    from moe_compile.passes import PASSES

    outcomes = []
    for pass_ in passes or PASSES:
        outcomes.append(pass_(gm.graph))
        clean(gm.graph)
    gm.recompile()
    return outcomes


def section(doc: str | None, name: str) -> str:
    """The indented block under `name:` in a docstring."""
    lines = inspect.cleandoc(doc or "").splitlines()
    start = lines.index(f"{name}:") + 1
    block = []
    for line in lines[start:]:
        if not line.startswith("    "):
            break
        block.append(line.strip())
    return "\n".join(block)


def assert_documented(pass_: Pass, gm: fx.GraphModule) -> None:
    """The pass turns its docstring's Before into its docstring's After."""
    before = render(gm.graph)
    assert before == section(pass_.__doc__, "Before"), f"Before is\n{before}"
    (outcome,) = run_passes(gm, pass_)
    assert len(outcome.rewrites) == 1, outcome
    after = render(gm.graph)
    assert after == section(pass_.__doc__, "After"), f"After is\n{after}"
