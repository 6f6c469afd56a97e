"""Train the small MoE language model that tests measure perplexity with.

    python scripts/train_byte_lm.py [--steps 1500]

A byte-level Qwen3-MoE of 1.2 million parameters, trained on this repository's own Python files, in
some minutes on a CPU; writes tests/data/byte_lm.safetensors in bfloat16. What it is measured on
(the Markdown files) it has not seen. Any training of like length gives a model as good.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests" / "data" / "byte_lm.safetensors"
WINDOW = 256


def build() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=WINDOW, norm_topk_prob=True, tie_word_embeddings=True,
        output_router_logits=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def text(*patterns: str) -> Tensor:
    """The bytes of the repository's files, in order of their paths."""
    paths = sorted(p for pattern in patterns for p in ROOT.glob(pattern))
    return torch.tensor(list(b"\n".join(p.read_bytes() for p in paths)))


def held_out() -> Tensor:
    """[N, WINDOW] bytes that the model was not trained on."""
    data = text("*.md", "docs/*.md")
    return data[: len(data) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    """Of the next byte."""
    total = 0.0
    for part in windows.split(16):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / windows[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, data = build().train(), text("ops/*.py", "passes/*.py", "moe_compile/*.py", "tests/*.py")
    optimizer = torch.optim.AdamW(model.parameters(), options.rate, (0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps)
    start = time.perf_counter()
    for step in range(options.steps):
        places = torch.randint(len(data) - WINDOW, (options.batch,)).tolist()
        batch = torch.stack([data[p : p + WINDOW] for p in places])
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            spent = time.perf_counter() - start
            print(f"step {step + 1}: loss {loss.item():.3f}, {spent:.0f} s", flush=True)
    model.eval()
    print(f"perplexity of bytes not seen: {perplexity(model, held_out()):.4f}")
    WEIGHTS.parent.mkdir(exist_ok=True)
    kept = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items()}
    kept.pop("lm_head.weight", None)  # tied to the embedding
    save_file(kept, WEIGHTS)
    print(f"{WEIGHTS.relative_to(ROOT)}: {WEIGHTS.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
