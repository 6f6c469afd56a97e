"""The backend: our passes over the graph, then Inductor, which reads live constants as inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from moe_compile._counts import take_counts
from moe_compile._facts import facts_of, place_inputs, ranks_key
from moe_compile.capture import normalize
from moe_compile.constants import LiveGraph
from moe_compile.options import parse_options
from moe_compile.passes._constants import constants_of
from moe_compile.pipeline import Pipeline, cache_key


def moe_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured: what `backend="moe_compile"` calls.

    mode: None, "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
    options: see `moe_compile.Options`; other keys are Inductor's own.
    Errors: ValueError for unknown options, RuntimeError where `require` is not met.
    """
    ours, patches = parse_options(mode, options)
    pipeline = Pipeline(ours)
    facts = facts_of(example_inputs)

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Any:
        normalize(gm, example_inputs, how)
        place_inputs(gm, facts)
        example_inputs = list(example_inputs)
        as_called = take_counts(gm, example_inputs, how)
        pipeline(gm)
        constants = constants_of(gm.graph)
        if not constants:
            return as_called(compile_fx_inner(gm, example_inputs, **how))
        # The last inputs, and static: their addresses stay, so CUDA graphs need not copy them.
        count = len(example_inputs)
        how["static_input_idxs"] = [
            *how["static_input_idxs"],
            *range(count, count + len(constants)),
        ]
        values = [constant.val for constant in constants]
        compiled = compile_fx_inner(gm, [*example_inputs, *values], **how)
        return as_called(LiveGraph(compiled, constants))

    compiled: Any = compile_fx(
        gm,
        list(example_inputs),
        inner_compile=inner,
        config_patches={**patches, **cache_key(pipeline.key, patches, ranks_key(facts))},
    )
    return compiled  # type: ignore[no-any-return]


def _reset() -> None:
    """Called by torch._dynamo.reset()."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees  # not always imported

        reset_cudagraph_trees()


moe_compile.reset = _reset  # type: ignore[attr-defined]
