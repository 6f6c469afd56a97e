"""Which blocks `attend` should take: python benchmarks/sweep_attend.py [--models qwen3 ...]

For each model's attention, batch and length of the static cache, whole or a tenth of it filled: the
candidates from fastest to slowest, beside what `choose_blocks` takes, and torch's attention with
the copies that transformers gives it. Each call reads another cache, so that it comes from memory.
The choice is written into `choose_blocks` by hand, with the numbers.
"""

import argparse
import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_ops import microseconds, roofs
from torch import Tensor
from triton.runtime.errors import OutOfResources

from moe_compile.ops._attend_kernel import Blocks, choose_blocks
from moe_compile.ops.attend import attend_triton

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Heads(NamedTuple):
    """Heads of queries and of keys, and their features."""

    A: int
    G: int
    D: int
    F: int


MODELS = {
    "qwen3": Heads(32, 4, 128, 128),
    "mixtral": Heads(32, 8, 128, 128),
    "gpt_oss": Heads(64, 8, 64, 64),
    "deepseek_v3": Heads(128, 128, 192, 128),
}
_L2 = 2**27  # bytes that no cache of a GPU holds


def inputs(heads: Heads, B: int, S: int, filled: int) -> list[Inputs]:
    """As many caches as the L2 does not hold."""
    A, G, D, features = heads
    like = {"device": "cuda", "dtype": torch.bfloat16}
    mask = (torch.arange(S, device="cuda") < filled).expand(B, 1, 1, S).contiguous()
    count = max(2, min(64, _L2 // (2 * B * G * filled * (D + features))))
    return [
        (
            torch.randn(B, A, 1, D, **like),
            torch.randn(B, G, S, D, **like),
            torch.randn(B, G, S, features, **like),
            mask,
        )
        for _ in range(count)
    ]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """With keys and values repeated, as transformers does."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def candidates(chosen: Blocks, S: int, heads: int) -> list[Blocks]:
    """Blocks whose programs fill a half to four times of the machine."""
    wanted = {max(1, min(128, programs // heads)) for programs in (66, 132, 264, 528)}
    found = {chosen}
    for positions, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (2, 3, 4)):
        for splits in {min(n, -(-S // positions)) for n in {1, *wanted}}:
            found.add(Blocks(chosen.rows, positions, splits, warps, stages))
    return sorted(found)


def sweep(model: str, B: int, S: int, filled: int) -> None:
    """Print the fastest candidates."""
    heads, many = MODELS[model], inputs(MODELS[model], B, S, filled)
    A, G, D, features = heads
    chosen = choose_blocks(B * G, A // G, S, D + features, torch.bfloat16)
    times: dict[Blocks, float] = {}
    for blocks in candidates(chosen, S, B * G):
        try:
            calls = [functools.partial(attend_triton, *args, blocks=blocks) for args in many]
            times[blocks] = microseconds(calls)
        except OutOfResources as error:  # more shared memory than there is
            print(f"  {blocks}: {str(error).splitlines()[0]}")
    peer = microseconds([functools.partial(torch_attention, *args) for args in many])
    roof = 2 * B * G * filled * (D + features) / roofs()[0]
    print(f"{model}, B = {B}, S = {S}, {filled} filled: torch {peer:.1f}, roof {roof:.1f}")
    print(f"  chosen {times.get(chosen, float('nan')):6.2f} {chosen}")
    for blocks, us in sorted(times.items(), key=lambda item: item[1])[:8]:
        print(f"         {us:6.2f} {blocks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--positions", nargs="+", type=int, default=[640, 4096])
    options = parser.parse_args()
    for model, B, S in itertools.product(options.models, options.batches, options.positions):
        for filled in (S, S // 10):
            sweep(model, B, S, filled)


if __name__ == "__main__":
    main()
