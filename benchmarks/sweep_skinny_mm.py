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

from moe_compile.ops._skinny_mm_kernel import MOST_ROWS_OF_SUMS, Blocks, choose_blocks
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

# A warp reads 256 of K at once. One stage leaves the order of loads to ptxas.
SUMS = [
    *(Blocks(1, 256 * w, False, w, s) for w, s in [(2, 4), (4, 4), (8, 1), (8, 3), (8, 4)]),
    *(Blocks(2, 256 * w, False, w, s) for w, s in [(2, 6), (4, 4), (8, 1), (8, 3), (8, 4)]),
    *(Blocks(4, 256 * w, False, w, s) for w, s in [(1, 6), (2, 4), (2, 6), (4, 1), (4, 3), (4, 4)]),
    *(Blocks(4, 256 * w, False, w, s) for w, s in [(8, 1), (8, 2), (8, 3), (8, 4)]),
    *(Blocks(8, 256 * w, False, w, s) for w, s in [(1, 5), (2, 3), (2, 4), (2, 5), (4, 1), (4, 3)]),
    *(Blocks(8, 256 * w, False, w, s) for w, s in [(4, 4), (8, 1), (8, 2), (8, 3)]),
    *(
        Blocks(16, 256 * w, False, w, s)
        for w, s in [(1, 4), (2, 3), (2, 4), (4, 2), (4, 3), (8, 1)]
    ),
]
DOT = [
    *(Blocks(8, k, True, w, s) for k, w, s in [(128, 1, 8), (256, 1, 5), (256, 2, 4), (256, 4, 4)]),
    *(Blocks(8, k, True, w, s) for k, w, s in [(512, 4, 3), (512, 4, 4), (1024, 8, 3)]),
    *(Blocks(16, k, True, w, s) for k, w, s in [(128, 2, 5), (128, 2, 8), (256, 2, 3)]),
    *(
        Blocks(16, k, True, w, s)
        for k, w, s in [(256, 2, 4), (256, 4, 3), (256, 4, 4), (512, 4, 3)]
    ),
    *(Blocks(32, k, True, w, s) for k, w, s in [(64, 4, 6), (128, 2, 4), (128, 4, 3), (128, 4, 4)]),
    *(Blocks(32, k, True, w, s) for k, w, s in [(128, 4, 5), (256, 4, 3), (256, 8, 3)]),
    *(Blocks(64, k, True, w, s) for k, w, s in [(64, 4, 5), (128, 4, 3), (128, 4, 4), (128, 8, 4)]),
]
# Weights stored [K, N].
SUMS_N = [
    *(Blocks(16, k, False, w, s) for k, w, s in [(128, 4, 4), (256, 8, 3), (128, 8, 4)]),
    *(Blocks(32, k, False, w, s) for k, w, s in [(32, 2, 5), (64, 4, 3), (64, 4, 5), (128, 8, 4)]),
    *(Blocks(64, k, False, w, s) for k, w, s in [(16, 2, 5), (32, 4, 3), (32, 4, 5), (64, 8, 4)]),
]
DOT_N = [
    *(Blocks(16, k, True, w, s) for k, w, s in [(64, 4, 5), (128, 4, 4), (256, 4, 3)]),
    *(Blocks(32, k, True, w, s) for k, w, s in [(64, 2, 5), (64, 4, 5), (128, 4, 4)]),
    *(Blocks(64, k, True, w, s) for k, w, s in [(32, 4, 6), (64, 4, 4), (64, 4, 5), (128, 4, 4)]),
]
L2 = 2**26  # more than the L2 of an H200


def candidates(layer: Dense, M: int, k_contiguous: bool = True) -> list[Blocks]:
    """Those whose programs can occupy the GPU and whose depth is not all padding."""
    sums, dot = (SUMS, DOT) if k_contiguous else (SUMS_N, DOT_N)
    found = (sums if M <= MOST_ROWS_OF_SUMS else []) + (dot if M > 1 else [])
    now = choose_blocks(M, layer.K, sum(layer.Ns), torch.bfloat16, k_contiguous)
    fitting = [b for b in found if b.k < 2 * layer.K and sum(layer.Ns) >= 8 * b.n]
    return list(dict.fromkeys([now, *fitting]))


def calls_of(layer: Dense, M: int, k_contiguous: bool = True) -> list[tuple[Tensor, list[Tensor]]]:
    """x and weights of [K, N] for each call of a replay."""
    size = 2 * layer.K * sum(layer.Ns)
    count = min(256, max(4, 2 * L2 // size))

    def weight(N: int) -> Tensor:
        shape = (N, layer.K) if k_contiguous else (layer.K, N)
        w = torch.empty(shape, device="cuda", dtype=torch.bfloat16).uniform_(-0.05, 0.05)
        return w.t() if k_contiguous else w

    x = torch.randn(M, layer.K, device="cuda", dtype=torch.bfloat16)
    return [(x, [weight(N) for N in layer.Ns]) for _ in range(count)]


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
    except Exception as error:
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
    calls = calls_of(layer, M, k_contiguous)
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
        except Exception as problem:
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
