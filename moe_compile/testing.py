"""For those who write passes: see the graph, run passes over it, print it, hold a docstring to it.

    from moe_compile.testing import assert_documented, capture, render, run_passes

Everything here needs a CPU only.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx

from moe_compile._ranks import run_ranks
from moe_compile.capture import visit_graphs
from moe_compile.passes import PASSES
from moe_compile.passes._constants import constants_of
from moe_compile.passes._graph import clean, render
from moe_compile.passes._outcome import Outcome, Pass

__all__ = [
    "assert_documented",
    "capture",
    "capture_all",
    "render",
    "run_graph",
    "run_passes",
    "run_ranks",
    "section",
]


def capture(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> fx.GraphModule:
    """The ATen graph that the passes see when `fn(*args, **kwargs)` is compiled.

    It is taken from a real compile (Dynamo, functorch's AOT capture, Inductor's decompositions and
    joint passes), stopped before code is generated. The module returned can be run: its inputs are
    the graph's placeholders.
    Errors: RuntimeError if `fn` does not give exactly one graph.
    """
    graphs = capture_all(fn, *args, dynamic=dynamic, **kwargs)
    if len(graphs) != 1:
        raise RuntimeError(f"capture: expected one graph, got {len(graphs)}")
    return graphs[0]


def capture_all(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[fx.GraphModule]:
    """Every graph that `fn(*args, **kwargs)` gives, in order of compilation; see `capture`."""
    graphs: list[fx.GraphModule] = []
    visit_graphs(graphs.append, fn, *args, dynamic=dynamic, **kwargs)
    return graphs


def run_passes(gm: fx.GraphModule, *passes: Pass) -> list[Outcome]:
    """Run passes as the backend does, in place; all of PASSES when none is named.

    After each the graph is checked, and that a pass which changed it says so: the backend checks
    once, and takes a pass at its word.
    """
    outcomes = []
    clean(gm.graph)
    for pass_ in passes or PASSES:
        before = len(gm.graph.nodes)
        outcomes.append(pass_(gm.graph))
        is_changed = outcomes[-1].rewrites or len(gm.graph.nodes) != before
        has_dead = gm.graph.eliminate_dead_code()
        assert is_changed or not has_dead, f"{pass_} changed a graph without a rewrite"
        gm.graph.lint()
    gm.recompile()
    return outcomes


def run_graph(gm: fx.GraphModule, *inputs: Any) -> Any:
    """Run a captured graph on its inputs; live constants that passes added are made from them."""
    constants = [c.recipe(*[inputs[i] for i in c.sources]) for c in constants_of(gm.graph)]
    return gm(*inputs, *constants)


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
    """The pass turns its docstring's Before into its docstring's After, in one rewrite."""
    before = render(gm.graph)
    assert before == section(pass_.__doc__, "Before"), f"Before is\n{before}"
    (outcome,) = run_passes(gm, pass_)
    assert len(outcome.rewrites) == 1, outcome
    after = render(gm.graph)
    assert after == section(pass_.__doc__, "After"), f"After is\n{after}"
