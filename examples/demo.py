"""Three Hugging Face MoE models generate through Inductor and through moe_compile, compared.

    make demo                                   # or: python examples/demo.py --models mixtral

For each model: tokens have to be identical, logits no further from a float64 run than twice
Inductor's, every MoE layer rewritten, everything compiled once, and on a GPU no CUDA graph skipped.
The exit status is 1 if one of these fails. Weights are random; nothing is downloaded.
"""

import argparse
import copy
import re
import sys
import warnings
from collections import defaultdict
from statistics import median
from typing import Any

import torch
from _measure import Generator, compile_block, errors, float64_logits, interleaved_ms
from _models import MODELS, build, moe_blocks
from _show import Progress, Result, tell, tell_conditions, tell_table
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

import moe_compile

BATCH, PROMPT, ROUNDS = 2, 16, 4
PASSES = ("find_experts", "find_routing", "find_activation")


def use_inductor(model: PreTrainedModel, experts: str) -> PreTrainedModel:
    """What `moe_compile.prepare` does, with plain Inductor."""
    on_gpu = model.device.type == "cuda"
    model.set_experts_implementation(experts)
    config = CompileConfig(backend="inductor", mode="reduce-overhead" if on_gpu else None)
    config._compile_all_devices = (
        not on_gpu
    )  # generate compiles on accelerators only, unless told so
    model.generation_config.compile_config = config
    return model


def run_model(name: str, device: str, dtype: torch.dtype, num_tokens: int) -> Result:
    """Everything about one model; prints as it goes."""
    torch._dynamo.reset()
    # On a GPU generate itself takes batched_mm for the decode loop instead of grouped_mm.
    choices = ["batched_mm"] if device == "cuda" else ["grouped_mm", "batched_mm"]
    progress = Progress(name, len(choices) + ROUNDS + 6)
    progress.step("building")
    original = build(name, device, dtype)
    num_layers = len(moe_blocks(original))
    models = {c: use_inductor(copy.deepcopy(original), c) for c in choices}
    models["moe_compile"] = moe_compile.prepare(copy.deepcopy(original))

    x = torch.randn(BATCH, 1, original.config.hidden_size, device=device, dtype=dtype)
    blocks, kernels = {}, {}
    for key, model in models.items():
        progress.step(f"one MoE layer: {key}")
        backend = "moe_compile" if key == "moe_compile" else "inductor"
        blocks[key], kernels[key] = compile_block(moe_blocks(model)[0], x, backend)
    ms = interleaved_ms({k: (lambda b=b: b(x)) for k, b in blocks.items()}, rounds=30)
    baseline = min(choices, key=ms.__getitem__)
    tell(f"\n{name}: {num_layers} MoE layers, {count_parameters(original) / 1e6:.0f} M parameters")
    for key in models:
        chosen = " <- the one compared with below" if key == baseline else ""
        tell(f"  one MoE layer, {key:11} {ms[key]:8.3f} ms, {kernels[key]}{chosen}")

    prompt = torch.randint(1, original.config.vocab_size, (BATCH, PROMPT), device=device)
    counters.clear()
    plain = Generator(models[baseline], prompt, num_tokens)
    ours = Generator(models["moe_compile"], prompt, num_tokens)
    progress.step(f"generating on Inductor, {baseline} (compiles)")
    plain()
    progress.step("generating on moe_compile (compiles)")
    ours()
    for each in (plain, ours):
        each()  # a first replay may still record CUDA graphs
        each.forget_times()
    for i in range(ROUNDS):
        progress.step(f"generating, round {i + 1} of {ROUNDS}")
        plain_tokens, plain_logits = plain()
        our_tokens, our_logits = ours()
    failures = check_compiles(device)

    progress.step("the same tokens in float64")
    exact = float64_logits(original, prompt, our_tokens)
    failures += check_outputs(plain_tokens, our_tokens, plain_logits, our_logits, exact)
    progress.step("what the passes did")
    failures += check_passes(original, plain.inputs, num_layers)
    progress.close()
    return Result(
        name,
        baseline,
        (kernels[baseline], kernels["moe_compile"]),
        (median(plain.step_ms), median(ours.step_ms)),
        (min(plain.step_ms), min(ours.step_ms)),
        (median(plain.token_ms), median(ours.token_ms)),
        failures,
    )


def check_compiles(device: str) -> list[str]:
    """One graph for each of the two, and on a GPU CUDA graphs for all of it."""
    graphs, skips = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    tell(f"  compiled: {graphs} graphs (1 for each backend); CUDA-graph skips: {skips}")
    failures = [] if graphs == 2 else [f"expected 2 compiled graphs, got {graphs}"]
    return failures + ([f"{skips} CUDA-graph skips"] if device == "cuda" and skips else [])


def check_outputs(
    plain_tokens: torch.Tensor,
    our_tokens: torch.Tensor,
    plain_logits: torch.Tensor,
    our_logits: torch.Tensor,
    exact: torch.Tensor,
) -> list[str]:
    """Tokens are identical, and logits at most twice as far from float64 as Inductor's."""
    total, same = our_tokens.numel(), int((plain_tokens == our_tokens).sum())
    tell(f"  tokens: {same} of {total} identical; logits spread {exact.std().item():.1f}")
    if our_logits.dtype != torch.float32:
        tell(f"  {our_logits.dtype}: roundings differ, so nothing of this is required")
        return []
    failures = [] if same == total else [f"tokens differ: {same} of {total} identical"]
    ulp = torch.finfo(our_logits.dtype).eps * exact.abs().max().item()
    pairs = zip(
        ("largest", "rms"), errors(our_logits, exact), errors(plain_logits, exact), strict=True
    )
    for kind, mine, theirs in pairs:
        tell(
            f"  logits, {kind} distance from float64: Inductor {theirs:.2e}, moe_compile {mine:.2e}"
        )
        if mine > 2 * theirs + ulp:
            failures.append(f"logits: {kind} distance {mine:.2e}, allowed {2 * theirs + ulp:.2e}")
    return failures


def check_passes(model: PreTrainedModel, inputs: dict[str, Any], num_layers: int) -> list[str]:
    """Every MoE layer of the unmodified model's decode step is rewritten; tells as what."""
    report = moe_compile.explain(model, **inputs)
    failures = []
    tell("  passes over the decode step of the unmodified model:")
    for p in (p for graph in report.graphs for p in graph.passes):
        events = defaultdict(list)
        for event in p.outcome.rewrites:
            events[event.detail].append(re.sub(r".*layers\.(\d+).*", r"\1", event.layer))
        for detail, layers in events.items():
            tell(f"    {p.name:16} layers {','.join(dict.fromkeys(layers))}: {detail}")
        if p.name in PASSES:
            failures += [f"{p.name} declined {e.layer}: {e.detail}" for e in p.outcome.declined]
    for name in PASSES:
        if report.counts.get(name) != num_layers:
            failures.append(
                f"{name}: expected {num_layers} rewrites, got {report.counts.get(name)}"
            )
    return failures


def count_parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--tokens", type=int, default=24, help="how many tokens to generate")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch._inductor.config.triton.cudagraph_or_error = device == "cuda"
    tell_conditions(device, dtype, BATCH, PROMPT, options.tokens)
    with torch.no_grad():
        results = [run_model(name, device, dtype, options.tokens) for name in options.models]
    tell_table(results)
    failures = [f"FAILED {r.name}: {failure}" for r in results for failure in r.failures]
    tell("\n" + ("\n".join(failures) or "all checks passed"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
