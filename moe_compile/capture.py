"""The graph that the passes see: Inductor's inference graph, normalised, its parameters marked."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, fake_tensor_prop
from torch._inductor.fx_passes.post_grad import reorder_for_locality, view_to_reshape
from torch._inductor.virtualized import V

from moe_compile._counts import take_counts
from moe_compile._facts import facts_of, place_inputs
from moe_compile.passes._graph import mark_parameter
from moe_compile.pipeline import cache_key


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any], how: Mapping[str, Any]) -> None:
    """Bring the graph that Inductor hands to its inner compile to the form that passes match.

    Only `aten.reshape` is left of the views that copy or not, every node has a fresh fake value,
    and the placeholders of parameters and buffers that a pass may compute ahead are marked.
    """
    view_to_reshape(gm)
    with torch.no_grad():
        fake_tensor_prop(gm, list(example_inputs))
    if how.get("is_inference") and inductor_config.reorder_for_locality:
        reorder_for_locality(gm.graph)
    gm.graph.eliminate_dead_code()
    placeholders = gm.graph.find_nodes(op="placeholder")
    for index, unfit in _parameters(len(placeholders), how).items():
        mark_parameter(placeholders[index], unfit)


def _parameters(count: int, how: Mapping[str, Any]) -> dict[int, str]:
    """Which placeholders are parameters or buffers, and why one can't be computed with ahead."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    static = [i for i in how.get("static_input_idxs") or () if i < count]
    if not how.get("is_inference"):
        return dict.fromkeys(static, "its gradient is wanted")
    if V.aot_compilation:
        return dict.fromkeys(static, "compiled ahead of time: Inductor folds constants there")
    if metadata is None or len(metadata.input_info) != count:
        return dict.fromkeys(static, "nothing says whether the graph writes to it")
    inputs = metadata.input_info
    written = {i for i in static if inputs[i].mutates_data or inputs[i].mutates_metadata}
    return {i: "the graph writes to it" if i in written else "" for i in static}


class _Stop(BaseException):
    """Ends a compile once the graph was seen; not an Exception, so that Inductor lets it by."""


def visit_graphs(
    look: Callable[[fx.GraphModule], Any],
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    patches: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Call `look` with every ATen graph that compiling `fn(*args, **kwargs)` hands to the passes.

    The compile is a real one (Dynamo, functorch's AOT capture, Inductor's decompositions and joint
    passes) up to our passes; then the call goes on uncompiled.
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        facts = facts_of(example_inputs)

        def stop(gm: fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Any:
            normalize(gm, example_inputs, how)
            place_inputs(gm, facts)
            take_counts(gm, list(example_inputs), how)
            look(gm)
            raise _Stop

        # A key of None: an artifact from AOTAutograd's cache would not come by the inner compile.
        with suppress(_Stop):
            compile_fx(
                gm,
                list(example_inputs),
                inner_compile=stop,
                config_patches={**(patches or {}), **cache_key(None)},
            )
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
