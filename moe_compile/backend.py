"""The backend: Inductor, with our passes in it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

from moe_compile.options import parse_options
from moe_compile.pipeline import MoePasses

HOOK = "post_grad_custom_pre_pass"


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
    passes = MoePasses(ours, patches.get(HOOK, getattr(inductor_config, HOOK)))
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches={**patches, HOOK: passes})
    return compiled  # type: ignore[no-any-return]


def _reset() -> None:
    """Called by torch._dynamo.reset()."""
    if torch.cuda.is_available():
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()


moe_compile.reset = _reset  # type: ignore[attr-defined]
