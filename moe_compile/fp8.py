"""transformers' fine-grained FP8 layers on our ops.

e4m3 weights with a float32 scale for each 128 x 128, activations quantised in groups of 128 for
each token when they are used. Letters: T tokens, K experts per token, H hidden, E experts.
"""

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
        refuse("dynamic activation scales", self.activation_scheme)
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
    out_TH: Tensor = moe.combine(y_RH, position_TK, weights_TK, dtype=dtype)
    return out_TH


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
        refuse("dynamic activation scales", "a static one")
    w_HG, scale_KL = _weight(w_GH, w_scale, block_size)
    q, scale = moe.quant_fp8(x.reshape(-1, x.shape[-1]))
    y: Tensor = moe.linear_fp8(q, scale, w_HG.t(), scale_KL.t(), None, dtype or x.dtype)
    return y.reshape(*x.shape[:-1], w_GH.shape[0])


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
    out: Tensor = moe.combine(y, position, ones, dtype=x_RH.dtype)
    return out


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


def _weight(w: Tensor, scale: Tensor, block_size: Any) -> tuple[Tensor, Tensor]:
    """[.., H, G] and the scales of its blocks, from what checkpoints store as [.., G, H]."""
    if w.dtype != FP8:
        refuse(f"weights in {FP8}", w.dtype)
    if block_size is None or list(block_size) != [BLOCK, BLOCK]:
        refuse(f"weight blocks of {BLOCK} x {BLOCK}", block_size)
    return w.transpose(-1, -2), scale.float().transpose(-1, -2)


def refuse(expected: str, got: object) -> None:
    raise ValueError(f"moe_compile: expected {expected}, got {got}")
