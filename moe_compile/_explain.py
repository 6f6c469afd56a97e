"""What the passes do to a model, without compiling it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_compile.capture import visit_graphs
from moe_compile.options import parse_options
from moe_compile.pipeline import Pipeline
from moe_compile.report import Report


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """What moe_compile does to `model(*inputs, **kwargs)`: every rewrite, every decline and why.

    The model is captured as `torch.compile(model, backend="moe_compile")` would, under
    `torch.no_grad()`, and run once; no code is generated, so this takes seconds.
    """
    ours, patches = parse_options(mode, options)
    passes = Pipeline(ours, keep_graphs=True)
    torch._dynamo.utils.counters["graph_break"].clear()
    with torch.no_grad():
        visit_graphs(passes, model, *inputs, dynamic=dynamic, patches=patches, **kwargs)
    passes.report.breaks = {
        reason.strip().splitlines()[0]: count
        for reason, count in torch._dynamo.utils.counters["graph_break"].items()
    }
    return passes.report
