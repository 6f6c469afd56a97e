"""Decode steps with and without live constants, at 1 and 60 layers, on a GPU.

    python benchmarks/bench_constants.py

transformers' DeepseekV3ForCausalLM with routers as in DeepSeek-V3 (256 experts, hidden size 7168,
bfloat16 weights used in float32, a float32 correction bias) and small experts, random weights, on a
GPU under CUDA graphs. The two compile and run in turn; logits have to be equal bit by bit. On a CPU
without CUDA graphs it runs too, with --hidden 512 or so.
"""

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from _results import FOLDER, write
from bench_decode import rewind, synchronize
from transformers import StaticCache

from moe_compile.constants import constant_bytes

VARIANTS = {"without": ("hoist_constants",), "with": ()}  # passes left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 60])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        rows += measure(layers, options)
        write(rows, "constants", options.out)


@torch.no_grad()
def measure(layers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(layers, options.hidden, device)
    mode = "reduce-overhead" if device == "cuda" else None
    token = torch.full((1, 1), 7, device=device)
    steps, logits, seconds = {}, {}, {}
    rows: dict[str, dict[str, Any]] = {}
    for name, disable in VARIANTS.items():
        settings = {"disable": disable, **({"mode": mode} if mode else {})}
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(token.expand(1, 8), past_key_values=cache)
        compiled = torch.compile(
            lambda c, model=model: model(token, past_key_values=c, logits_to_keep=1).logits,
            backend="moe_compile",
            options=settings,
            fullgraph=True,
        )

        def step(compiled: Any = compiled, cache: StaticCache = cache) -> torch.Tensor:
            rewind(cache, 8)
            return compiled(cache)

        start = time.perf_counter()
        for _ in range(4):
            step()
        synchronize()
        seconds[name] = time.perf_counter() - start
        steps[name], logits[name] = step, step().clone()
    assert torch.equal(logits["with"], logits["without"]), "logits differ"
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            synchronize()
            times[name].append((time.perf_counter() - start) / options.steps * 1e3)
    for name, step in steps.items():  # after the times: the profiler slows the host down for good
        kernels, busy = kernels_of(step)
        ordered = sorted(times[name])
        row = rows[name] = {"layers": layers, "constants": name}
        row["kernels"] = sum(kernels.values())
        row["router cast kernels"] = sum(n for k, n in kernels.items() if is_cast(k))
        row["kernels ms"] = round(busy, 4)
        row["ms a step"] = round(statistics.median(ordered), 4)
        row["low quartile"] = round(ordered[len(ordered) // 4], 4)
        row["high quartile"] = round(ordered[-1 - len(ordered) // 4], 4)
        row["constants MiB"] = round(constant_bytes() / 2**20, 1) if name == "with" else 0
        row["first calls s"] = round(seconds[name], 1)
        row["logits"] = "equal bit by bit"
        print(row, flush=True)
    return list(rows.values())


def build(layers: int, hidden: int, device: str) -> torch.nn.Module:
    config = transformers.DeepseekV3Config(
        vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers, first_k_dense_replace=0,
        n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, n_shared_experts=1,
        moe_intermediate_size=32, routed_scaling_factor=2.5, num_attention_heads=8,
        num_key_value_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.randn_like(buffer, dtype=torch.float32) * 0.1  # as checkpoints load
    model.set_experts_implementation("grouped_mm")
    return model.requires_grad_(False)


def kernels_of(step: Any, steps: int = 10) -> tuple[Counter[str], float]:
    """The GPU kernels of one step, and the milliseconds that all of them take together."""
    if not torch.cuda.is_available():
        return Counter(), 0.0
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    real = [e for e in on_gpu if not getattr(e, "is_user_annotation", False)]
    counts = Counter(e.name for e in real)
    ms = sum(e.device_time for e in real) / steps / 1e3
    return Counter({name: round(count / steps) for name, count in counts.items()}), ms


def is_cast(kernel: str) -> bool:
    """One of Inductor's kernels that does nothing but cast (and lay out) its input."""
    words = kernel.removeprefix("triton_poi_fused_").split("_")
    known = {
        "to",
        "copy",
        "transpose",
        "t",
        "permute",
        "convert",
        "element",
        "type",
        "linear",
        "view",
    }
    return kernel.startswith("triton_poi_fused_") and all(
        w in known or w.isdigit() or not w for w in words
    )


if __name__ == "__main__":
    main()
