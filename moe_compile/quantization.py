"""Quantise the weights of a model to float8, in blocks of 128 x 128."""

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile._own_model import ROUTERS, is_named, quantize_own
from moe_compile.fp8 import BLOCK, quantize_weight, refuse, use_fp8_kernels
from moe_compile.huggingface import register_experts

log = logging.getLogger("moe_compile")


def quantize(
    model: Any, kind: str = "fp8", *, keep: Iterable[str] = (), example_inputs: Any = None
) -> Any:
    """Quantise a model's weights in place, and return it.

    e4m3, a scale for each 128 x 128; activations are quantised where they meet them. Kept as they
    are: routers, norms, embeddings, the head, layers with fewer than 128 features in or out, and
    modules and parameters whose path ends with a name in `keep`.
    A transformers model's linear layers and experts become its `FP8Linear` and `FP8Experts`. In any
    other model `nn.Linear` layers, and experts held as parameters [E, ., .]: one run of
    `model(*example_inputs)` (a tensor, a tuple, or a dict of keywords) shows which those are.
    To load what was saved, build the model, quantise it, and load the state dict (docs/fp8.md).
    Says how many layers and bytes it was in the log (`TORCH_LOGS=moe_compile`).
    Errors: ValueError for another kind; a model without such layers; experts whose weights are used
    otherwise than `torch._grouped_mm` and `torch.bmm` do; transformers' experts that have biases.
    """
    if kind != "fp8":
        refuse("quantize's kind 'fp8'", repr(kind))
    is_own = not hasattr(model, "set_experts_implementation")
    quantize_layers = quantize_own if is_own else _quantize_transformers
    layers, before, after = quantize_layers(model, tuple(keep), example_inputs)
    log.info("quantize: %d layers, %.1f -> %.1f MiB", layers, before / 2**20, after / 2**20)
    return model


def _quantize_transformers(model: Any, keep: tuple[str, ...], _: Any) -> tuple[int, int, int]:
    """How many layers, their bytes before and after."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    register_experts()
    use_fp8_kernels()
    old = dict(model.named_modules())
    kept = [name for name, module in old.items() if _is_kept(name, module, model, keep)]
    config = FineGrainedFP8Config(modules_to_not_convert=kept, weight_block_size=(BLOCK, BLOCK))
    for name, module in old.items():
        if name.endswith(".experts") and getattr(module, "has_bias", False):
            refuse("experts without biases", name)
    # Whole names: transformers 5.17 takes "mlp.gate" for "mlp.gate_proj", too.
    replace_with_fp8_linear(model, [f"{re.escape(name)}$" for name in kept], config)
    before, layers = 0, 0
    for name, module in list(model.named_modules()):
        if module is not old.get(name) and _is_fp8(module):
            replaced = old.pop(name)
            before += _bytes(replaced)
            layers += 1
            _fill(module, replaced)
    after = sum(_bytes(m) for m in model.modules() if _is_fp8(m))
    model.config.quantization_config = config
    # Else save_pretrained parts the weights of experts as checkpoints do, but not their scales.
    model._weight_conversions = []
    return layers, before, after


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _is_fp8(module: nn.Module) -> bool:
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

    return isinstance(module, (FP8Experts, FP8Linear))


def _is_kept(name: str, module: nn.Module, model: Any, keep: tuple[str, ...]) -> bool:
    """Does this layer stay in its own dtype?"""
    if not isinstance(module, nn.Linear):
        return False
    last = name.rpartition(".")[2]
    is_router = last in ROUTERS
    is_small = min(module.in_features, module.out_features) < BLOCK
    is_head = module is model.get_output_embeddings()
    return is_router or is_small or is_head or is_named(name, keep)


@torch.no_grad()
def _fill(new: Any, old: Any) -> None:
    """Give a new module, made without memory, the old one's weights in float8."""
    new.train(old.training)
    for name, parameter in _weights(old):
        q, scale = quantize_weight(parameter)
        setattr(new, name, nn.Parameter(q, requires_grad=False))
        setattr(new, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    bias = getattr(old, "bias", None)
    if bias is not None:
        new.bias = bias


def _weights(old: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight [.., G, H] by the name that transformers has for it."""
    if isinstance(old, nn.Linear):
        yield "weight", old.weight
        return
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if isinstance(weight := getattr(old, name, None), Tensor):
            yield name, weight.transpose(1, 2) if getattr(old, "is_transposed", False) else weight
