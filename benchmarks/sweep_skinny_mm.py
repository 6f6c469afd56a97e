"""Which blocks `skinny_mm` and `skinny_mms` should take: python benchmarks/sweep_skinny_mm.py

For each model's dense layers and number of rows, the candidates from fastest to slowest, beside
F.linear for each weight and the time of reading the weights. Each call of a replay has weights of
its own, so that they come from memory and not from L2. The choice is written into `choose_blocks`
by hand, with the numbers.
"""

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_ops import microseconds, roofs
from torch import Tensor
from triton.errors import TritonError

from moe_compile.ops import _candidates, _scratch
from moe_compile.ops._skinny_mm_kernel import (
    MOST_ROWS,
    MOST_ROWS_OF_SUMS,
    Blocks,
    choose_blocks,
)
from moe_compile.ops._tuned import Kind, Sizes
from moe_compile.ops.skinny_mms import skinny_mms_triton


class Dense(NamedTuple):
    """Layers that read one x: features in, and features out of each."""

    K: int
    Ns: tuple[int, ...]


MODELS = {
    "qwen3": {
        "qkv": Dense(2048, (4096, 512, 512)),
        "o": Dense(4096, (2048,)),
        "router": Dense(2048, (128,)),
        "head": Dense(2048, (151936,)),
    },
    "mixtral": {"qkv": Dense(4096, (4096, 1024, 1024)), "o": Dense(4096, (4096,))},
    "deepseek_v3": {
        "q_a, kv_a": Dense(7168, (1536, 576)),
        "q_b": Dense(1536, (24576,)),
        "o": Dense(16384, (7168,)),
    },
    "gpt_oss": {"qkv": Dense(2880, (4096, 512, 512)), "o": Dense(4096, (2880,))},
}


def key_of(layer: Dense, M: int, k_contiguous: bool = True) -> tuple[Kind, Sizes]:
    """What `_tuned_kernels.py` calls such a launch."""
    rows = M if M <= MOST_ROWS_OF_SUMS else MOST_ROWS
    return (rows, torch.bfloat16, k_contiguous), (layer.K, *layer.Ns)


def candidates(layer: Dense, M: int, k_contiguous: bool = True) -> list[Blocks]:
    """What is taken today, then the others."""
    now = choose_blocks(M, layer.K, sum(layer.Ns), torch.bfloat16, k_contiguous)
    return list(dict.fromkeys([now, *_candidates.skinny_mm(*key_of(layer, M, k_contiguous), now)]))


def product(x: Tensor, ws: Sequence[Tensor], blocks: Blocks | None) -> list[Tensor]:
    return skinny_mms_triton(x, ws, [None] * len(ws), blocks)


def linears(x: Tensor, ws: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(x, w.t()) for w in ws]


def compile_one(job: tuple[int, Dense, bool, Blocks]) -> None:
    """Fill Triton's cache on disk from another process, by one product of few columns."""
    M, layer, k_contiguous, blocks = job
    x = torch.randn(M, layer.K, device="cuda", dtype=torch.bfloat16)
    ws = [torch.zeros(64, layer.K, device="cuda", dtype=torch.bfloat16).t() for _ in layer.Ns]
    try:
        product(x, ws if k_contiguous else [w.contiguous() for w in ws], blocks)
    except (RuntimeError, TritonError) as error:
        print(tuple(blocks), type(error).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--layout", default="NK", choices=["NK", "KN"])
    parser.add_argument("--most", type=int, default=8, help="candidates to print of each layer")
    args = parser.parse_args()
    k_contiguous = args.layout == "NK"
    layers = [(f"{m} {name}", a) for m in args.models for name, a in MODELS[m].items()]
    # What makes a kernel another one: rows where each has its sums, weights, and whether K is even.
    jobs = {
        (0 if b.dot else M, len(a.Ns), a.K % b.k == 0, b): (M, a, k_contiguous, b)
        for _, a in layers
        for M in args.rows
        for b in candidates(a, M, k_contiguous)
    }
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs.values(), chunksize=4)
    print(f"roof: {roofs()[0] / 1e3:.0f} GB/s read; * is what choose_blocks gives")
    with torch.inference_mode():
        for name, layer in layers:
            for M in args.rows:
                sweep(name, layer, M, k_contiguous, args.most)


def sweep(name: str, layer: Dense, M: int, k_contiguous: bool, most: int) -> None:
    calls = _scratch.skinny_mm_inputs(*key_of(layer, M, k_contiguous), torch.device("cuda"))
    now, *others = candidates(layer, M, k_contiguous)
    floor = sum(w.nbytes for w in calls[0][1]) / roofs()[0]
    peers: dict[str, Callable[..., list[Tensor]]] = {"torch": linears}
    for blocks in (now, *others):
        label = f"{tuple(blocks)}{' *' if blocks == now else ''}"
        peers[label] = functools.partial(product, blocks=blocks)
    results = []
    for label, peer in peers.items():
        try:
            us = microseconds([functools.partial(peer, *call) for call in calls], 7)
            wrong = error(peer(*calls[0]), calls[0])
            results.append((us, label + (f" WRONG by {wrong:.1e}" if wrong > 0.02 else "")))
        except (RuntimeError, TritonError) as problem:
            print(f"    {label} {type(problem).__name__}: {str(problem)[:200]}")
    print(f"{name} {layer.K} x {layer.Ns} M={M}: reads {floor:.2f} us")
    for i, (us, label) in enumerate(sorted(results)):
        if i < most or label == "torch" or "*" in label:
            print(f"    {us:9.2f} us {100 * floor / us:5.1f} %  {label}")


def error(ys: Sequence[Tensor], call: tuple[Tensor, list[Tensor]]) -> float:
    """The largest error relative to the largest value, of some columns of each."""
    x, ws = call
    worst = 0.0
    for y, w in zip(ys, ws, strict=True):
        want = x.float() @ w[:, -4096:].float()
        worst = max(worst, float((y[:, -4096:] - want).abs().max() / want.abs().max()))
    return worst


if __name__ == "__main__":
    main()
