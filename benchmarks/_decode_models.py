"""The models whose decode steps are timed, what a step of them has to read, and what ran in one.

Groups of a step: `experts`, `dense` products (the router's too), `attention` with the cache,
`routing` from logits to sorted rows, `head`, and the `rest`: norms, residuals, dense activations.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

GROUPS = ("experts", "dense", "attention", "routing", "head", "rest")

# The first that is found in a kernel's name decides.
_KERNELS = {
    "routing": r"route_kernel|topk|TopK|sort|Sort|hist|cumsum|_(count|scan|scatter)_kernel",
    "experts": r"grouped|Grouped|GroupProblem|gate_up|down_combine|_columns_kernel|_combine_kernel|"
    r"silu_mul|quant_kernel",
    "attention": r"attend|put_together|rotate|sdpa|fmha|flash|attention|index_put|index_copy|roll|"
    r"softmax|_cos|_sin|fused_cat|bmm",
    "dense": r"skinny|gemm|gemv|cublas|cutlass|nvjet|splitK|_mm|addmm",
}


def qwen3(layers: int = 48, ranks: int = 1) -> Any:
    """Qwen3-30B-A3B; of tensor parallelism a rank's heads and expert features."""
    return transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768 // ranks, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=32 // ranks,
        num_key_value_heads=4 // ranks, head_dim=128, norm_topk_prob=True,
        max_position_embeddings=4096,
    )  # fmt: skip


def deepseek_v3(layers: int = 8) -> Any:
    """DeepSeek-V3 with 32 of its 256 experts, one layer of them dense."""
    return transformers.DeepseekV3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
        first_k_dense_replace=1, num_hidden_layers=layers, num_attention_heads=128,
        num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=4096,
    )  # fmt: skip


def gpt_oss(layers: int = 12) -> Any:
    """gpt-oss-120b with a third of its layers, every other with a window of 128."""
    return transformers.GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_local_experts=128,
        num_experts_per_tok=4, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, sliding_window=128,
    )  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {
    "qwen3": qwen3,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def random_model(config: Any, device: str) -> torch.nn.Module:
    """Random weights in bfloat16, made on the device: on the host it would take minutes."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def group_bytes(model: torch.nn.Module, batch: int, positions: int) -> Counter[str]:
    """What a step reads by group: weights once, the cache's `positions` of each sequence.

    Of the experts those that uniform routing is expected to touch.
    """
    config: Any = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    touched = 1 - (1 - config.num_experts_per_tok / experts) ** batch
    total = Counter(dict.fromkeys(GROUPS, 0))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            total["experts"] += int(parameter.nbytes * touched)
        elif "embed_tokens" not in name:
            total[_group_of_parameter(name)] += parameter.nbytes
    total["attention"] += batch * _cache_bytes(config, positions)
    return total


def _group_of_parameter(name: str) -> str:
    if "lm_head" in name:
        return "head"
    return "rest" if "norm" in name else "attention" if "sinks" in name else "dense"


def _cache_bytes(config: Any, positions: int) -> int:
    """Of one sequence in bfloat16: keys and values, or the latent form of both."""
    kinds = getattr(config, "layer_types", None) or ["full"] * config.num_hidden_layers
    window = min(getattr(config, "sliding_window", None) or positions, positions)
    features = 2 * config.num_key_value_heads * config.head_dim
    if hasattr(config, "kv_lora_rank"):
        features = config.kv_lora_rank + config.qk_rope_head_dim
    return sum(2 * features * (window if "sliding" in kind else positions) for kind in kinds)


def group_of_kernel(name: str) -> str:
    return next((group for group, found in _KERNELS.items() if re.search(found, name)), "rest")


def group_kernels(kernels: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    """Count and microseconds by group of the kernels of one step, in the order in which they ran.

    A group is told by the kernel's name: what Inductor fuses with a product or a cache's write
    counts there. The head is the last dense product.
    """
    grouped = [[group_of_kernel(name), us] for name, us in kernels]
    products = [pair for pair in grouped if pair[0] == "dense"]
    if products:
        products[-1][0] = "head"
    found = {group: [us for g, us in grouped if g == group] for group in GROUPS}
    return {group: (len(us), sum(us)) for group, us in found.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The groups as lines to print."""
    lines = [f"  {'group':10} {'kernels':>8} {'us':>8} {'floor us':>9}"]
    for r in rows:
        lines.append(f"  {r['group']:10} {r['kernels']:8d} {r['us']:8.1f} {r['floor us']:9.1f}")
    return "\n".join(lines)
