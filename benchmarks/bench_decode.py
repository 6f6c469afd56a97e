"""Decode steps of a whole model on a GPU: moe_compile against Inductor, in one run.

    python benchmarks/bench_decode.py [--model qwen3] [--layers 48] [--batch 1 16] [--variants ...]

The model is one of transformers' in the shape of Qwen3-30B-A3B, or of DeepSeek-V3 or gpt-oss-120b
cut to fit one GPU (_decode_models.py), with random bf16 weights; prompt 512, static cache of 640. A
step is one call of the compiled model, CUDA graphs included; its time is the wall clock of a run of
steps over their number. Runs are repeated over the same positions; `ms at new positions` is of the
first one, where each position is new to the compiled model. The floor is the bytes that a step must
read over the read rate measured in the same run, also by group of kernels.
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
import triton
from _decode_models import MODELS, group_bytes, group_kernels, qwen3, random_model, table
from _results import FOLDER, write
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import StaticCache

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
    parser.add_argument("--model", default="qwen3", choices=MODELS)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
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
    layers = {} if options.layers is None else {"layers": options.layers}
    model = random_model(MODELS[options.model](**layers), options.device)
    options.layers = model.config.num_hidden_layers
    stem = "" if options.model == "qwen3" else f"_{options.model}"
    rate = read_rate(options.device)
    print(f"{device_name(options.device)}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read rate {rate / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for batch in options.batch:
        reference = None
        for name in (bar := tqdm(options.variants, disable=None)):
            bar.set_description(f"batch {batch}, {name}")
            form, backend, mode = VARIANTS[name]
            torch._dynamo.reset()
            if "float8" in name:
                model = moe_compile.quantize(model)
            model.set_experts_implementation(form)
            mode = mode if options.device == "cuda" else None
            compiled = torch.compile(model, backend=backend, mode=mode, fullgraph=True)
            row, tokens = measure(model, compiled, batch, options)
            kernels = row.pop("kernels")
            reference = tokens if reference is None else reference
            same = f"{(tokens == reference).float().mean().item():.3f}"
            floor = bytes_per_step(model, batch, options) / rate
            rows.append({"variant": name, **row})
            rows[-1] |= {"tokens as first": same, "floor ms": round(floor * 1e3, 3)}
            tqdm.write(f"{rows[-1]}\n{describe(kernels, options.layers)}")
            write(rows, f"decode{stem}", options.out)
            if kernels:
                key = {"variant": name, "batch": batch}
                mine = by_group(kernels, group_bytes(model, batch, options.cache), rate)
                groups += [{**key, **group} for group in mine]
                tqdm.write(table(mine))
                write(groups, f"decode_groups{stem}", options.out)
            sys.stdout.flush()


def build(layers: int, device: str, ranks: int = 1) -> torch.nn.Module:
    """Qwen3-30B-A3B, or what a rank of tensor parallelism holds of it."""
    return random_model(qwen3(layers, ranks), device)


@torch.no_grad()
def measure(
    model: torch.nn.Module, compiled: Callable[..., Any], batch: int, options: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor]:
    """Decode greedily, time runs of steps, and list the kernels of one."""
    counters.clear()
    cache = StaticCache(config=model.config, max_cache_len=options.cache)
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, model.config.vocab_size, (batch, options.prompt), generator=generator)
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

    def ms_a_step(token: torch.Tensor) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(options.steps):
            token = step(token)
        synchronize()
        return (time.perf_counter() - start) / options.steps * 1e3

    new = ms_a_step(token)  # one run goes on, the others begin anew
    times = []
    for _ in range(options.rounds):
        rewind(cache, options.prompt + 16)
        times.append(ms_a_step(token))
    rewind(cache, options.prompt + 16)
    row = {
        "batch": batch,
        "ms": round(statistics.median(times), 3),
        "ms low": round(min(times), 3),
        "ms high": round(max(times), 3),
        "ms at new positions": round(new, 3),
        "cudagraph skips": counters["inductor"]["cudagraph_skips"],
        "seconds to first steps": round(cold, 1),
        "kernels": kernels_of(lambda: step(token)) if options.device == "cuda" else [],
    }
    return row, torch.cat(tokens, 1)


Kernels = list[tuple[str, float]]  # names and microseconds, in the order in which they ran


def kernels_of(step: Callable[[], Any]) -> Kernels:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [(event.name, event.device_time) for event in events]


def describe(kernels: Kernels, layers: int, most: int = 14) -> str:
    """Count and microseconds by name, the largest first."""
    spent: Counter[str] = Counter()
    for name, us in kernels:
        spent[name] += us
    count = Counter(name for name, _ in kernels)
    total = f"{len(kernels)} kernels ({len(kernels) / layers:.1f} a layer)"
    lines = [f"  {total}, {sum(spent.values()):.0f} us"]
    lines += [f"  {us:8.0f} us {count[k]:5d}x {k[:100]}" for k, us in spent.most_common(most)]
    return "\n".join(lines)


def by_group(kernels: Kernels, read: Counter[str], rate: float) -> list[dict[str, Any]]:
    """Kernels and microseconds of each group of a step, and what reading its bytes takes."""
    return [
        {
            "group": group,
            "kernels": count,
            "us": round(us, 1),
            "MB": round(read[group] / 1e6, 2),
            "floor us": round(read[group] / rate * 1e6, 1),
        }
        for group, (count, us) in group_kernels(kernels).items()
    ]


def rewind(cache: StaticCache, position: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(position)
        if hasattr(layer, "cumulative_length_int"):  # of a window
            layer.cumulative_length_int = position


def bytes_per_step(model: torch.nn.Module, batch: int, options: argparse.Namespace) -> float:
    """Keys, and weights once: of the experts those that uniform routing is expected to touch."""
    return float(sum(group_bytes(model, batch, options.cache).values()))


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
