"""Which blocks `attend` should take: python benchmarks/sweep_attend.py [--models qwen3 ...]

For each model's attention, batch and length of the static cache, whole or a tenth of it filled: the
candidates from fastest to slowest, both kernels together, beside what `choose_blocks` takes, that
with a mask instead of the last position, and torch's attention with the mask and the copies that
transformers gives it (it has none for latents). Each call reads another cache, so that it comes
from memory. The choice is written into `choose_blocks` by hand, with the numbers.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_ops import microseconds, roofs
from torch import Tensor
from triton.runtime.errors import OutOfResources

from moe_compile.ops import _candidates
from moe_compile.ops._attend_blocks import Blocks, choose_blocks
from moe_compile.ops.attend import attend_triton

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Heads(NamedTuple):
    """Heads of queries and of keys, their features, and those of a second part of both.

    F is 0 where keys are the values.
    """

    A: int
    G: int
    D: int
    F: int
    U: int = 0


MODELS = {
    "qwen3": Heads(32, 4, 128, 128),
    "mixtral": Heads(32, 8, 128, 128),
    "gpt_oss": Heads(64, 8, 64, 64),
    "deepseek_v3": Heads(128, 1, 512, 0, 64),
    "deepseek_v3_expanded": Heads(128, 128, 192, 128),
}
_L2 = 2**27  # bytes that no cache of a GPU holds
_MOST = 2**34  # bytes of all inputs of a case


def inputs(heads: Heads, B: int, S: int) -> Inputs:
    """A query, and a cache of random numbers that are made once."""
    A, G, D, features, U = heads

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()

    v = random(B, G, S, features) if features else None
    rot = (random(B, A, 1, U), random(B, G, S, U)) if U else (None, None)
    return random(B, A, 1, D), random(B, G, S, D), v, *rot


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_rot: Tensor | None,
    k_rot: Tensor | None,
    mask: Tensor | None = None,
    **how: Any,
) -> Tensor:
    return attend_triton(q, k, v, mask, q_rot=q_rot, k_rot=k_rot, **how)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, _: None, __: None, mask: Tensor) -> Tensor:
    """With keys and values repeated, as transformers does."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def choice(heads: Heads, B: int, S: int) -> Blocks:
    """What is taken today."""
    A, G, D, features, U = heads
    return choose_blocks(B * G, A // G, S, D + features + U, torch.bfloat16, features or D)


def candidates(heads: Heads, B: int, S: int) -> list[Blocks]:
    """What is taken today and the others."""
    A, G, D, features, U = heads
    chosen = choice(heads, B, S)
    kind = (A // G, 1, D, features, U, torch.bfloat16, "last")
    return sorted({chosen, *_candidates.attend(kind, (B * G, S), chosen)})


Job = tuple[Heads, int, Blocks, bool]


def compile_one(job: Job) -> None:
    """Fill Triton's cache on disk from another process: one call with the same kernels."""
    heads, S, blocks, masked = job
    args = inputs(heads, 1, S)
    try:
        if masked:
            mask = torch.ones(1, 1, 1, S, dtype=torch.bool, device="cuda")
            attention(*args, mask, blocks=blocks)
        else:
            attention(*args, last=torch.tensor([S - 1], device="cuda"), blocks=blocks)
        torch.cuda.synchronize()
    except OutOfResources as error:
        print(f"{blocks}: {str(error).splitlines()[0]}", flush=True)


def sweep(model: str, B: int, S: int) -> None:
    """Print the fastest candidates."""
    heads = MODELS[model]
    chosen = choice(heads, B, S)
    size = 2 * B * heads.G * S * (heads.D + heads.F + heads.U)
    for filled in (S, S // 10):
        read = size * filled // S
        many = [inputs(heads, B, S) for _ in range(max(2, min(64, _L2 // read, _MOST // size)))]
        last = torch.full((B,), filled - 1, device="cuda")
        mask = (torch.arange(S, device="cuda") < filled).expand(B, 1, 1, S).contiguous()

        def time(fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> float:
            calls = [functools.partial(fn, *one, *args, **kwargs) for one in many]  # noqa: B023
            return microseconds(calls, 7)

        times: dict[Blocks, float] = {}
        for blocks in candidates(heads, B, S):
            try:
                times[blocks] = time(attention, last=last, blocks=blocks)
            except OutOfResources:  # more shared memory than there is; told when it was compiled
                continue
        masked = time(attention, mask)
        peer = time(torch_attention, mask) if heads.F else float("nan")
        print(f"{model}, B = {B}, S = {S}, {filled} filled: roof {read / roofs()[0]:.2f} us")
        print(f"  torch  {peer:6.2f}", f"  masked {masked:6.2f} {tuple(chosen)}", sep="\n")
        print(f"  chosen {times.get(chosen, float('nan')):6.2f} {tuple(chosen)}")
        for blocks, us in sorted(times.items(), key=lambda item: item[1])[:8]:
            print(f"         {us:6.2f} {tuple(blocks)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--positions", nargs="+", type=int, default=[640, 4096])
    options = parser.parse_args()
    cases = list(itertools.product(options.models, options.batches, options.positions))
    jobs: set[Job] = set()
    for model, B, S in cases:
        heads = MODELS[model]
        jobs |= {(heads, S, blocks, False) for blocks in candidates(heads, B, S)}
        jobs.add((heads, S, choice(heads, B, S), True))
    workers = min(14, os.cpu_count() or 1)
    print(f"{len(jobs)} kernels to compile, {workers} at a time", flush=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_one, sorted(jobs, key=str), chunksize=1)
    with torch.inference_mode():
        for model, B, S in cases:
            sweep(model, B, S)


if __name__ == "__main__":
    main()
