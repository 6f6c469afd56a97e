"""Hugging Face transformers: our ops as an experts implementation, and `generate` on our backend.

Letters: T tokens, K experts per token, H hidden, E experts, F expert features.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_compile._facts import mark_parameters
from moe_compile.fp8 import FP8, experts_forward_fp8, use_fp8_kernels
from moe_compile.ops import moe
from moe_compile.options import parse_options

NAME = "moe_compile"


def register_experts() -> None:
    """Make `experts_implementation="moe_compile"` known to transformers, for plain and FP8 experts.

    `import moe_compile` does this by itself where transformers is imported first.
    """
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, _forward_by_dtype)


def experts_forward(self: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts of one layer by our ops; `self` is a module of transformers' experts interface.

    Shapes: x [T, H], ids [T, K] integer, weights [T, K] -> [T, H] in x's dtype. Ids outside [0, E)
    are no expert, which is how expert parallelism marks the experts of other ranks.
    Errors: RuntimeError where gradients are wanted, since the ops have no backward.
    """
    K = ids_TK.shape[1]
    rows_R, offsets_E, position_TK = moe.sort_tokens(ids_TK, self.num_experts)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    up_bias = _bias(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias")
    h = moe.grouped_mm(x_TH.to(up.dtype), _as_EHG(self, up), offsets_E, rows_R, K, up_bias)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    down = _as_EHG(self, self.down_proj)
    y_RH = moe.grouped_mm(h, down, offsets_E, None, 1, _bias(self, "down_proj_bias"))
    if getattr(self, "has_post_expert_norm", False):
        y_RH = self.post_expert_norm(y_RH)
    return moe.combine(y_RH, position_TK, weights_TK, dtype=x_TH.dtype)  # type: ignore[no-any-return]


def _as_EHG(self: Any, weight: Tensor) -> Tensor:
    return weight if self.is_transposed else weight.transpose(1, 2)


def _bias(self: Any, name: str) -> Tensor | None:
    return getattr(self, name) if self.has_bias else None


def _forward_by_dtype(self: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """transformers' FP8 experts hold bfloat16 weights where a checkpoint was dequantised."""
    forward = experts_forward_fp8 if self.down_proj.dtype == FP8 else experts_forward
    return forward(self, x_TH, ids_TK, weights_TK)


def prepare(
    model: Any,
    *,
    mode: str | None = "reduce-overhead",
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = False,
) -> Any:
    """Make `model.generate(...)` decode on moe_compile, and return the model.

    Sets the experts implementation (so that prefill, which generate runs uncompiled, uses our ops
    too), our kernels for FP8 layers, a static cache, and the compile config. `torch.compile(model)`
    has no effect on `model.generate`: it delegates to the model's own forward.
    mode, options, fullgraph: as for torch.compile; on CPU, which has no CUDA graphs, mode is None.
    Errors: ValueError if the model is no transformers model that generates.
    """
    generation_config = getattr(model, "generation_config", None)
    if generation_config is None or not hasattr(model, "set_experts_implementation"):
        raise ValueError(
            "prepare: expected a transformers model that generates, got "
            f"{type(model).__name__} (others: torch.compile(model, backend='moe_compile'))"
        )
    from transformers import CompileConfig

    _mark_parallel(model)
    on_cpu = model.device.type == "cpu"
    mode = None if on_cpu or mode == "default" else mode
    parse_options(mode, options)  # a wrong key fails here, not in the first decode step
    register_experts()
    if any(p.dtype == FP8 for p in model.parameters()):
        use_fp8_kernels()
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)
    # torch.compile takes mode or options, not both: with options, the mode travels among them.
    with_mode = {"mode": mode} if mode else {}
    how: dict[str, Any] = {"mode": None if options else mode}
    how["options"] = {**with_mode, **options} if options else None
    config = CompileConfig(backend=NAME, fullgraph=fullgraph, **how)
    config._compile_all_devices = on_cpu  # generate compiles on accelerators only, unless told so
    generation_config.cache_implementation = "static"
    generation_config.compile_config = config
    return model


def _mark_parallel(model: Any) -> None:
    """What transformers' parallel plans guarantee: what they do not shard, all ranks hold."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or getattr(model, "_tp_size", None) in (None, 1):
        return
    group = mesh.get_group() if mesh.ndim == 1 else mesh["tp"].get_group()
    mark_parameters(model, group)


if "transformers" in sys.modules:
    register_experts()
