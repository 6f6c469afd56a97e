"""Whole models on a CPU: moe_compile against the better of Inductor's two forms, in one run.

    python benchmarks/bench_cpu.py [--rounds 15] [--only qwen3] [--out benchmarks/results]

Ratios only (Inductor's time / moe_compile's): a CPU's absolute times say little elsewhere. Each
round times every variant once, in turn; spreads are of the ratios taken round by round.
"""

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from _results import FOLDER, write
from tqdm import tqdm
from transformers import AutoModelForCausalLM, StaticCache

CACHE = 256  # positions of the static cache in decode
VARIANTS = {  # name: experts implementation, backend
    "inductor grouped_mm": ("grouped_mm", "inductor"),
    "inductor batched_mm": ("batched_mm", "inductor"),
    "moe_compile": ("grouped_mm", "moe_compile"),
}


@dataclass(frozen=True)
class Case:
    """One model in one dtype and batch; `prompt` tokens at once, or 1 for a decode step."""

    model: str
    dtype: torch.dtype
    batch: int
    prompt: int
    floor: float  # the ratio that the project promises

    @property
    def name(self) -> str:
        step = "decode" if self.prompt == 1 else f"prefill {self.prompt}"
        return f"{self.model} {str(self.dtype).split('.')[1]} {step} batch {self.batch}"


def qwen3() -> transformers.PretrainedConfig:
    return transformers.Qwen3MoeConfig(
        vocab_size=8192, hidden_size=1024, moe_intermediate_size=384, num_experts=64,
        num_experts_per_tok=8, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, norm_topk_prob=True, max_position_embeddings=1024,
    )  # fmt: skip


def mixtral() -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1792, num_local_experts=8,
        num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip


def deepseek() -> transformers.PretrainedConfig:
    return transformers.DeepseekV3Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
        n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        first_k_dense_replace=1, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        q_lora_rank=256, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
        max_position_embeddings=1024,
    )  # fmt: skip


MODELS = {"qwen3": qwen3, "mixtral": mixtral, "deepseek": deepseek}
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    Case(model, dtype, batch, prompt, floor)
    for dtype in DTYPES
    for model, batch, prompt, floor in (
        ("qwen3", 1, 1, 1.25),
        ("qwen3", 8, 1, 1.5),
        ("qwen3", 1, 128, 1.2),
        ("mixtral", 1, 1, 1.0),
        ("mixtral", 8, 1, 1.0),
        ("mixtral", 1, 128, 1.0),
        ("deepseek", 1, 1, 1.0),
        ("deepseek", 8, 1, 1.0),
        ("deepseek", 1, 128, 1.0),
    )
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="run the cases whose name holds this")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    rows = []
    for case in (bar := tqdm(cases, disable=None)):
        bar.set_description(case.name)
        rows.append(measure(case, options.rounds))
        tqdm.write(line(rows[-1]))
    write(rows, "models", options.out)
    return int(any(row["ratio median"] < row["floor"] for row in rows))


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict[str, object]:
    """Time each variant `rounds` times in turn; ratios against the better Inductor variant."""
    torch._dynamo.reset()
    gc.collect()
    steps = build(case)
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            repeats = 4 if case.prompt == 1 else 1
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name].append((time.perf_counter() - start) / repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours = medians.pop("moe_compile")
    best = min(medians, key=medians.__getitem__)
    ratios = sorted(a / b for a, b in zip(times[best], times["moe_compile"], strict=True))
    return {
        "case": case.name,
        "ratio median": round(medians[best] / ours, 3),
        "ratio low quartile": round(ratios[len(ratios) // 4], 3),
        "ratio high quartile": round(ratios[-1 - len(ratios) // 4], 3),
        "floor": case.floor,
        "best of Inductor": best,
        "other form": round(max(medians.values()) / ours, 3),
    }


def build(case: Case) -> dict[str, object]:
    """A function of no arguments for each variant, that runs one step; weights are shared."""
    torch.manual_seed(0)
    first = None
    steps = {}
    for name, (form, backend) in VARIANTS.items():
        model = AutoModelForCausalLM.from_config(MODELS[case.model](), dtype=case.dtype).eval()
        if first is None:
            first = model
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        else:
            model.load_state_dict(first.state_dict(), assign=True)
        model.set_experts_implementation(form)
        steps[name] = step_of(model, torch.compile(model, backend=backend, fullgraph=True), case)
    return steps


def step_of(model: torch.nn.Module, compiled: object, case: Case) -> object:
    """Run the compiled model on the next of 16 inputs, so that other experts are read each time."""
    generator = torch.Generator().manual_seed(1)
    shape = (16, case.batch, case.prompt)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    inputs = {"use_cache": False}
    if case.prompt == 1:
        cache = StaticCache(config=model.config, max_cache_len=CACHE)
        model(tokens[:, :, 0].T.contiguous(), past_key_values=cache)  # 16 positions in the cache
        position = torch.full((case.batch, 1), 16)
        inputs = {"past_key_values": cache, "position_ids": position}
    count = 0

    def step() -> torch.Tensor:
        nonlocal count
        count += 1
        if case.prompt == 1:
            rewind(inputs["past_key_values"])
        return compiled(tokens[count % 16], **inputs).logits

    return step


def rewind(cache: StaticCache) -> None:
    """Let every step write position 16, so that each round does the same work."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(16)


def line(row: dict[str, object]) -> str:
    spread = f"{row['ratio low quartile']:.2f} to {row['ratio high quartile']:.2f}"
    mark = "" if row["ratio median"] >= row["floor"] else "   BELOW"
    return (
        f"{row['case']:36s} {row['ratio median']:.2f}x ({spread}; promised {row['floor']})"
        f" over {row['best of Inductor']}, {row['other form']:.2f}x over the other{mark}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
