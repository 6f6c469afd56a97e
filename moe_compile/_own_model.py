"""Float8 in a model of one's own: its linear layers, and its experts' stacked weights.

Letters: E experts, H features in, G features out.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_compile._stacked import TAKES, Float8, SeenWeight
from moe_compile.fp8 import BLOCK, quantize_weight, refuse
from moe_compile.ops import moe

log = logging.getLogger("moe_compile")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROUTERS = ("gate", "router", "shared_expert_gate")


@torch.no_grad()
def quantize_own(model: Any, keep: tuple[str, ...], example_inputs: Any) -> tuple[int, int, int]:
    """How many modules got float8 weights, and the bytes of these weights before and after.

    Nothing is changed where anything is refused.
    """
    if not isinstance(model, nn.Module):
        refuse("a model (torch.nn.Module) to quantise", type(model).__name__)
    stacked = _find_stacked(model, keep)
    swapped = _watch(model, stacked, example_inputs) if stacked else {}
    linears = _find_linears(model, keep)
    if not stacked and not linears:
        refuse(f"layers of {BLOCK} features or more to quantise", type(model).__name__)
    before = sum(w.nbytes for *_, w in stacked.values()) + sum(m.weight.nbytes for m in linears)
    owners: dict[int, Any] = {id(module): module for module, *_ in stacked.values()}
    for path in list(stacked):
        _parametrize(path, *stacked.pop(path), swapped[path])  # popped: its memory goes
    for layer in linears:
        _to_float8(layer)
    made = [p for m in owners.values() for p in m.parametrizations.parameters()]
    made += [p for layer in linears for p in (layer.weight_fp8, layer.weight_scale)]
    return len(linears) + len(owners), before, sum(p.nbytes for p in made)


def is_named(path: str, keep: tuple[str, ...]) -> bool:
    return any(path == k or path.endswith(f".{k}") for k in keep)


class Float8Linear(nn.Linear):
    """A linear layer with an e4m3 weight; rows are quantised when they come."""

    def forward(self, input: Tensor) -> Tensor:
        q, scale = moe.quant_fp8(input.reshape(-1, self.in_features))
        weight = (self.weight_fp8, self.weight_scale)
        y: Tensor = moe.linear_fp8(q, scale, *weight, self.bias, input.dtype)
        return y.reshape(*input.shape[:-1], self.out_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Without its scales it would be another one."""
        refuse("a linear layer in float8 to be called", "its weight to be read (quantize's keep)")


def _to_float8(layer: Any) -> None:
    """In place: hooks, names and references to the layer stay."""
    q, scale = quantize_weight(layer.weight)
    del layer.weight
    layer.weight_fp8 = nn.Parameter(q, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.__class__ = Float8Linear


def _parametrize(path: str, module: nn.Module, name: str, w: nn.Parameter, swapped: bool) -> None:
    w.requires_grad_(False)
    how = Float8(path, w.dtype, swapped)
    parametrize.register_parametrization(module, name, how, unsafe=True)  # of another dtype


def _find_linears(model: nn.Module, keep: tuple[str, ...]) -> list[Any]:
    """The layers to quantise: not a router, with an output for each expert, nor the head.

    The head has an output for each row of an embedding. A weight that two modules hold stays, too.
    """
    experts = {p.shape[0] for p in model.parameters() if p.ndim == 3}
    words = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    found, kept = [], []
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or isinstance(layer, Float8Linear):
            continue
        is_router = layer.out_features in experts or path.rpartition(".")[2] in ROUTERS
        is_small = min(layer.in_features, layer.out_features) < BLOCK
        is_head = layer.out_features in words or holders[id(layer.weight)] > 1
        is_plain = type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        known = is_plain and layer.weight.dtype in _FLOATS
        if is_router or is_small or is_head or not known or is_named(path, keep):
            kept.append(path)
        else:
            found.append(layer)
    if kept:
        log.info("quantize: kept %s", ", ".join(kept))
    return found


Stack = dict[str, tuple[nn.Module, str, nn.Parameter]]  # path -> the module, its name there


def _find_stacked(model: nn.Module, keep: tuple[str, ...]) -> Stack:
    """Parameters that may be experts': [E, ., .] of at least one block each."""
    found: Stack = {}
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for path, module, name, w in _parameters(model):
        is_kept = is_named(path, keep) or is_named(path.rpartition(".")[0], keep)
        if w.ndim != 3 or w.dtype not in _FLOATS or is_kept:
            continue
        if w.shape[0] < 2 or min(w.shape[1:]) < BLOCK:
            continue
        if type(w) is not nn.Parameter or holders[id(w)] > 1:
            got = type(w).__name__ if holders[id(w)] < 2 else "one that two modules hold"
            refuse(f"a plain parameter {path} (keep=['{path}'] leaves it as it is)", got)
        found[path] = (module, name, w)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}".lstrip("."), module, name, parameter


def _watch(model: nn.Module, stacked: Stack, example_inputs: Any) -> dict[str, bool]:
    """Run the model, and say of each weight whether it is [E, H, G], else it is [E, G, H].

    An attribute of the instance goes before its parameters, which stay where they are.
    """
    if example_inputs is None:
        paths = ", ".join(stacked)
        refuse(f"example_inputs, to see whether {paths} are experts' weights", "None")
    summed: dict[str, set[int]] = {path: set() for path in stacked}
    try:
        for path, (module, name, w) in stacked.items():
            module.__dict__[name] = SeenWeight(w.detach(), path, summed[path])
        _call(model, example_inputs)
    finally:
        for module, name, _ in stacked.values():
            module.__dict__.pop(name, None)
    for path, dims in summed.items():
        if len(dims) != 1:
            got = "both of its dims summed" if dims else "none that read it"
            refuse(f"example_inputs with which {path} is used in {TAKES}", got)
    return {path: dims == {-2} for path, dims in summed.items()}


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*([inputs] if isinstance(inputs, Tensor) else inputs))
