"""Decode steps of a whole model on a GPU: moe_compile against Inductor, in one run.

    python benchmarks/bench_decode.py [--layers 48] [--batch 1 16] [--variants ...] [--out results]

The model is transformers' Qwen3MoeForCausalLM in the shape of Qwen3-30B-A3B with random bf16
weights; prompt 512, static cache of 640. A step is one call of the compiled model, CUDA graphs
included; its time is the wall clock of a run of steps over their number. The floor is the bytes
that a step must read over the read rate measured in the same run.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from _results import FOLDER, write
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import AutoModelForCausalLM, StaticCache

import moe_compile

VARIANTS = {  # name: experts implementation, backend, mode; "float8" quantises, and comes last
    "inductor reduce-overhead grouped_mm": ("grouped_mm", "inductor", "reduce-overhead"),
    "inductor reduce-overhead batched_mm": ("batched_mm", "inductor", "reduce-overhead"),
    "inductor max-autotune batched_mm": ("batched_mm", "inductor", "max-autotune"),
    "moe_compile reduce-overhead": ("grouped_mm", "moe_compile", "reduce-overhead"),
    "moe_compile max-autotune": ("grouped_mm", "moe_compile", "max-autotune"),
    "moe_compile float8 reduce-overhead": ("moe_compile", "moe_compile", "reduce-overhead"),
}
DEFAULT = ["inductor reduce-overhead grouped_mm", "moe_compile reduce-overhead"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=VARIANTS)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--cache", type=int, default=640)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build(options.layers, options.device)
    rate = read_rate(options.device)
    print(f"{device_name(options.device)}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read rate {rate / 1e12:.2f} TB/s", flush=True)
    rows = []
    for batch in options.batch:
        floor = bytes_per_step(model, batch, options) / rate
        reference = None
        for name in (bar := tqdm(options.variants, disable=None)):
            bar.set_description(f"batch {batch}, {name}")
            form, backend, mode = VARIANTS[name]
            torch._dynamo.reset()
            if "float8" in name:
                model = moe_compile.quantize(model)
                floor = bytes_per_step(model, batch, options) / rate
            model.set_experts_implementation(form)
            mode = mode if options.device == "cuda" else None
            compiled = torch.compile(model, backend=backend, mode=mode, fullgraph=True)
            row, tokens = measure(model, compiled, batch, options)
            row = {"variant": name, **row}
            reference = tokens if reference is None else reference
            row["tokens as first"] = f"{(tokens == reference).float().mean().item():.3f}"
            row["floor ms"] = round(floor * 1e3, 3)
            rows.append(row)
            tqdm.write(str({k: v for k, v in row.items() if k != "kernels"}))
            tqdm.write(row.pop("kernels"))
            sys.stdout.flush()
            write(rows, "decode", options.out)


def build(layers: int, device: str, ranks: int = 1) -> torch.nn.Module:
    """The model with random weights, made on the device: on the host it would take minutes.

    ranks: of tensor parallelism, of which this is one, holding its heads and expert features.
    """
    config = transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768 // ranks, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=32 // ranks,
        num_key_value_heads=4 // ranks, head_dim=128, norm_topk_prob=True,
        max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def measure(
    model: torch.nn.Module, compiled: Callable[..., Any], batch: int, options: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor]:
    """Decode greedily, time runs of steps, and count the kernels of one."""
    counters.clear()
    cache = StaticCache(config=model.config, max_cache_len=options.cache)
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, 151936, (batch, options.prompt), generator=generator)
    model(prompt.to(options.device), past_key_values=cache, logits_to_keep=1)
    token = torch.full((batch, 1), 7, device=options.device)
    start = time.perf_counter()
    tokens = []

    def step(token: torch.Tensor) -> torch.Tensor:
        logits = compiled(token, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    for _ in range(16):  # compile, warm up, record; greedy tokens to compare
        token = step(token)
        tokens.append(token.clone())
    synchronize()
    cold = time.perf_counter() - start
    times = []
    for _ in range(options.rounds):
        rewind(cache, options.prompt)
        synchronize()
        start = time.perf_counter()
        for _ in range(options.steps):
            token = step(token)
        synchronize()
        times.append((time.perf_counter() - start) / options.steps * 1e3)
    rewind(cache, options.prompt)
    row = {
        "batch": batch,
        "ms": round(statistics.median(times), 3),
        "ms low": round(min(times), 3),
        "ms high": round(max(times), 3),
        "cudagraph skips": counters["inductor"]["cudagraph_skips"],
        "seconds to first steps": round(cold, 1),
        "kernels": profile(lambda: step(token), options.layers) if options.device == "cuda" else "",
    }
    return row, torch.cat(tokens, 1)


def profile(step: object, layers: int, most: int = 14) -> str:
    """Which kernels one step runs: count and microseconds by name, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profiler.events():
        spent[event.name] += event.device_time
        count[event.name] += 1
    total = f"{sum(count.values())} kernels ({sum(count.values()) / layers:.1f} a layer)"
    lines = [f"  {total}, {sum(spent.values()):.0f} us"]
    lines += [f"  {us:8.0f} us {count[k]:5d}x {k[:100]}" for k, us in spent.most_common(most)]
    return "\n".join(lines)


def rewind(cache: StaticCache, position: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(position)


def bytes_per_step(model: torch.nn.Module, batch: int, options: argparse.Namespace) -> float:
    """Keys, and weights once: of the experts those that uniform routing is expected to touch."""
    config = model.config
    touched = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    total = 0.0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            total += parameter.nbytes * (touched if ".experts." in name else 1)
    keys = config.num_key_value_heads * config.head_dim * 2 * 2  # key and value, bf16
    return total + batch * options.layers * options.cache * keys


def read_rate(device: str) -> float:
    """Bytes a second of a plain read that does not fit into any cache."""
    x = torch.ones(
        (1 << 32) if device == "cuda" else (1 << 26), dtype=torch.bfloat16, device=device
    )
    times = []
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        torch.sum(x, dtype=torch.float32)
        synchronize()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    main()
