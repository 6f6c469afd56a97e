"""Compile a model as far as the passes, and stop there."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass


class _Stop(BaseException):
    """Ends a compile once the passes ran; not an Exception, so that Inductor lets it through."""


class _StopAfter(CustomGraphPass):
    def __init__(self, look: Callable[[fx.Graph], None]) -> None:
        self._look = look

    def __call__(self, graph: fx.Graph) -> None:
        self._look(graph)
        raise _Stop

    def uuid(self) -> None:
        return None  # never cached: a cached graph would not come by here


def visit_graphs(
    look: Callable[[fx.Graph], None],
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    patches: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Call `look` with every ATen graph that compiling `fn(*args, **kwargs)` hands to the passes.

    The compile is a real one (Dynamo, functorch's AOT capture, Inductor's decompositions and joint
    passes) up to `post_grad_custom_pre_pass`; then the call goes on uncompiled.
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        hook = {"post_grad_custom_pre_pass": _StopAfter(look)}
        with contextlib.suppress(_Stop):
            compile_fx(gm, list(example_inputs), config_patches={**(patches or {}), **hook})
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
