"""Small models of three families, with random weights: large enough that experts matter."""

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# 0.08 * sqrt(512) is about 1.8: logits spread over units, so that the largest one means something.
COMMON = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

MODELS = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 768},
    ),
    # Sigmoid scores, a correction bias, 2 of 4 groups, a shared expert; the first layer is dense.
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            "num_key_value_heads": 8,
            "head_dim": 32,
            "intermediate_size": 1024,
            "first_k_dense_replace": 1,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 256,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
}


def build(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """One of MODELS, in eval mode, the same on every call."""
    torch.manual_seed(0)
    model_class, config_class, sizes = MODELS[name]
    model = model_class(config_class(**{**COMMON, **sizes})).eval().requires_grad_(False)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)  # zero in a fresh model, and then it would choose nothing
    return model.to(device, dtype)


def moe_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The MoE layers: each has a router, experts, and perhaps a shared expert."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module)]
