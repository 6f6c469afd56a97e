"""Float8 models: transformers' fine-grained FP8 layers on our ops, and `quantize`.

e4m3 weights with a float32 scale for each 128 x 128, activations quantised in groups of 128 for
each token when they are used. Letters: T tokens, K experts per token, H hidden, E experts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.ops import moe

BLOCK = 128
FP8 = torch.float8_e4m3fn


def use_fp8_kernels() -> None:
    """Let transformers' FP8 layers call our ops instead of kernels that it fetches from its Hub.

    For every FP8 model of the process; `moe_compile.prepare` and `quantize` do it. It then runs
    without a network, on CPUs too.
    """
    from transformers.integrations import finegrained_fp8

    ours = finegrained_fp8.FineGrainedFP8(
        matmul=matmul, batched_matmul=batched_matmul, grouped_matmul=grouped_matmul
    )
    finegrained_fp8._FINEGRAINED_FP8 = ours


def experts_forward_fp8(self: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts of one layer of transformers' `FP8Experts`, by our ops.

    Shapes and ids as `huggingface.experts_forward`. Each token is quantised once, however many
    experts it goes to.
    Errors: ValueError for static activation scales, other blocks than 128 x 128, or 4-bit weights.
    """
    if self.activation_scheme != "dynamic":
        _refuse("dynamic activation scales", self.activation_scheme)
    K, dtype = ids_TK.shape[1], x_TH.dtype
    rows_R, offsets_E, position_TK = moe.sort_tokens(ids_TK, self.num_experts)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    q, scale = moe.quant_fp8(x_TH)
    up = _weight(getattr(self, name), getattr(self, f"{name}_scale_inv"), self.block_size)
    h = moe.grouped_mm_fp8(q, scale, *up, offsets_E, rows_R, K, None, dtype)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    q, scale = moe.quant_fp8(h)
    down = _weight(self.down_proj, self.down_proj_scale_inv, self.block_size)
    y_RH = moe.grouped_mm_fp8(q, scale, *down, offsets_E, None, 1, None, dtype)
    return moe.combine(y_RH, position_TK, weights_TK, dtype=dtype)  # type: ignore[no-any-return]


def matmul(
    x: Tensor,
    w_GH: Tensor,
    w_scale: Tensor,
    block_size: Any,
    dtype: torch.dtype | None = None,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """x [.., H] times the transpose of a float8 weight, as transformers' `FP8Linear` wants it."""
    if activation_scale is not None:
        _refuse("dynamic activation scales", "a static one")
    w_HG, scale_KL = _weight(w_GH, w_scale, block_size)
    q, scale = moe.quant_fp8(x.reshape(-1, x.shape[-1]))
    y = moe.linear_fp8(q, scale, w_HG.t(), scale_KL.t(), None, dtype or x.dtype)
    return y.reshape(*x.shape[:-1], w_GH.shape[0])  # type: ignore[no-any-return]


def grouped_matmul(
    x_RH: Tensor, w_EGH: Tensor, w_scale: Tensor, offsets: Tensor, block_size: Any, **_: Any
) -> Tensor:
    """Rows sorted by expert times each expert's weight; rows after the last are zeros."""
    q, scale = moe.quant_fp8(x_RH)
    weight = _weight(w_EGH, w_scale, block_size)
    y: Tensor = moe.grouped_mm_fp8(q, scale, *weight, offsets.int(), dtype=x_RH.dtype)
    return y


def batched_matmul(
    x_RH: Tensor, w_EGH: Tensor, w_scale: Tensor, block_size: Any, expert_ids: Tensor, **_: Any
) -> Tensor:
    """Each row times the weight of its own expert; rows of no expert are zeros."""
    rows, offsets, position = moe.sort_tokens(expert_ids[:, None], w_EGH.shape[0])
    q, scale = moe.quant_fp8(x_RH)
    weight = _weight(w_EGH, w_scale, block_size)
    y = moe.grouped_mm_fp8(q, scale, *weight, offsets, rows, 1, None, x_RH.dtype)
    ones = torch.ones(x_RH.shape[0], 1, device=x_RH.device)
    return moe.combine(y, position, ones, dtype=x_RH.dtype)  # type: ignore[no-any-return]


def _weight(w: Tensor, scale: Tensor, block_size: Any) -> tuple[Tensor, Tensor]:
    """[.., H, G] and the scales of its blocks, from what checkpoints store as [.., G, H]."""
    if w.dtype != FP8:
        _refuse(f"weights in {FP8}", w.dtype)
    if block_size is None or list(block_size) != [BLOCK, BLOCK]:
        _refuse(f"weight blocks of {BLOCK} x {BLOCK}", block_size)
    return w.transpose(-1, -2), scale.float().transpose(-1, -2)


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"moe_compile: expected {expected}, got {got}")


def quantize(model: Any, kind: str = "fp8", *, keep: Iterable[str] = ()) -> Any:
    """Quantise a transformers model's weights in place, and return it.

    Linear layers and experts become transformers' `FP8Linear` and `FP8Experts`: e4m3, a scale for
    each 128 x 128. Kept as they are: routers, norms, embeddings, the head, layers with fewer than
    128 features in or out, and modules whose path ends with a name in `keep`. State dicts and
    checkpoints are those of transformers' FineGrainedFP8; on a CPU, where transformers would
    dequantise a checkpoint, build the model, quantise it, and load the state dict.
    Errors: ValueError for another kind, another model, or experts that have biases.
    """
    if kind != "fp8":
        _refuse("quantize's kind 'fp8'", repr(kind))
    if not hasattr(model, "set_experts_implementation"):
        _refuse("a transformers model to quantise", type(model).__name__)
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    from moe_compile.huggingface import register_experts

    register_experts()
    use_fp8_kernels()
    old = dict(model.named_modules())
    kept = [name for name, module in old.items() if _is_kept(name, module, model, tuple(keep))]
    config = FineGrainedFP8Config(modules_to_not_convert=kept, weight_block_size=(BLOCK, BLOCK))
    for name, module in old.items():
        if name.endswith(".experts") and getattr(module, "has_bias", False):
            _refuse("experts without biases", name)
    replace_with_fp8_linear(model, kept, config)
    for name, module in list(model.named_modules()):
        if module is not old.get(name) and _is_fp8(module):
            _fill(module, old[name])
            old.pop(name)
    model.config.quantization_config = config
    return model


def _is_fp8(module: nn.Module) -> bool:
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

    return isinstance(module, (FP8Experts, FP8Linear))


def _is_kept(name: str, module: nn.Module, model: Any, keep: tuple[str, ...]) -> bool:
    """Does this layer stay in its own dtype?"""
    if not isinstance(module, nn.Linear):
        return False
    last = name.rpartition(".")[2]
    is_router = last in ("gate", "router", "shared_expert_gate")
    is_small = min(module.in_features, module.out_features) < BLOCK
    is_named = any(name == k or name.endswith(f".{k}") for k in keep)
    return is_router or is_small or is_named or module is model.get_output_embeddings()


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


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [.., G, H] in e4m3, and the scale of each 128 x 128: its largest magnitude / 448.

    One matrix at a time, so that a layer of experts needs no float32 copy of itself.
    """
    if w.ndim > 2:
        parts = [quantize_weight(one) for one in w]
        return torch.stack([q for q, _ in parts]), torch.stack([s for _, s in parts])
    G, H = w.shape
    rows, cols = -(-G // BLOCK), -(-H // BLOCK)
    padded = nn.functional.pad(w.float(), (0, cols * BLOCK - H, 0, rows * BLOCK - G))
    blocks = padded.view(rows, BLOCK, cols, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-10) / 448
    q = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(FP8)
    return q.view(rows * BLOCK, cols * BLOCK)[:G, :H].contiguous(), scale
