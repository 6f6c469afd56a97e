"""Which blocks `skinny_mms_fp8` should take: python benchmarks/sweep_skinny_mm_fp8.py

As sweep_skinny_mm.py, whose layers these are: the candidates from fastest to slowest, beside
`quant_fp8` with a `linear_fp8` for each weight, and the time of reading the weights from memory.
The choice is written into `choose_blocks` by hand, with the numbers.
"""

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from bench_ops import microseconds, roofs
from sweep_skinny_mm import MODELS, Dense
from torch import Tensor
from triton.errors import TritonError

from moe_compile.ops import moe
from moe_compile.ops._scratch import how_many
from moe_compile.ops._skinny_mm_fp8_kernel import MOST_ROWS_OF_SUMS, Blocks, choose_blocks
from moe_compile.ops.skinny_mms_fp8 import skinny_mms_fp8_reference, skinny_mms_fp8_triton

LAYERS = {
    f"{model} {name}": layer
    for model in ("qwen3", "deepseek_v3", "mixtral")
    for name, layer in MODELS[model].items()
    if name not in ("router", "head")
}
# A warp reads 512 of K at once: columns, warps, stages.
SUMS = [(2, 4, 3), (4, 1, 6), (4, 2, 3), (4, 4, 2), (4, 8, 2), (8, 1, 4), (8, 2, 2), (8, 2, 3)]
SUMS += [(8, 4, 2), (8, 4, 3), (8, 8, 2), (16, 1, 3), (16, 1, 4), (16, 2, 3)]
AHEAD = [(4, 4, 2), (8, 2, 3), (8, 4, 2)]
DOT = [
    (8, 4, 8),
    (16, 2, 8),
    (16, 4, 6),
    (32, 4, 4),
    (32, 4, 6),
    (32, 4, 8),
    (64, 4, 4),
    (64, 4, 6),
]
DOT_AND_QUANTISE = [(16, 4, 6), (32, 4, 4), (32, 4, 6), (64, 4, 4)]


def candidates(layer: Dense, M: int) -> list[Blocks]:
    """Those whose programs can occupy the GPU and whose depth is not all padding."""
    found = [Blocks(n, 128, True, True, w, s) for n, w, s in (DOT if M > 1 else DOT[3:5])]
    if M > MOST_ROWS_OF_SUMS:
        found += [Blocks(n, 128, True, False, w, s) for n, w, s in DOT_AND_QUANTISE]
    else:
        found += [Blocks(n, 512 * w, False, False, w, s) for n, w, s in SUMS]
        found += [Blocks(n, 512 * w, False, True, w, s) for n, w, s in (AHEAD if M > 1 else [])]
    now = choose_blocks(M, layer.K, sum(layer.Ns))
    fitting = [b for b in found if b.k < 2 * layer.K and sum(layer.Ns) >= 8 * b.n]
    return list(dict.fromkeys([now, *fitting]))


Inputs = tuple[Tensor, list[Tensor], list[Tensor], list[None]]


def inputs(layer: Dense, M: int) -> Inputs:
    ws = [torch.empty(N, layer.K, device="cuda").uniform_(-448, 448) for N in layer.Ns]
    scales = [torch.rand(-(-N // 128), -(-layer.K // 128), device="cuda") for N in layer.Ns]
    x = torch.randn(M, layer.K, device="cuda", dtype=torch.bfloat16)
    return x, [w.to(torch.float8_e4m3fn) for w in ws], scales, [None] * len(ws)


def parts(x: Tensor, ws: Any, scales: Any, _: Any) -> list[Tensor]:
    q = moe.quant_fp8(x)
    return [moe.linear_fp8(*q, w, scale) for w, scale in zip(ws, scales, strict=True)]


def compile_one(job: tuple[int, Dense, Blocks]) -> None:
    """Fill Triton's cache on disk from another process, by one product of few columns."""
    M, layer, blocks = job
    try:
        skinny_mms_fp8_triton(*inputs(Dense(layer.K, (64,) * len(layer.Ns)), M), blocks=blocks)
    except (RuntimeError, TritonError) as error:
        print(tuple(blocks), type(error).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--most", type=int, default=8, help="candidates to print of each layer")
    args = parser.parse_args()
    # What makes a kernel another one: rows where each has its sums, weights, and whether K is even.
    jobs = {
        (0 if b.dot else M, len(LAYERS[n].Ns), LAYERS[n].K % b.k == 0, b): (M, LAYERS[n], b)
        for n in args.layers
        for M in args.rows
        for b in candidates(LAYERS[n], M)
    }
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs.values(), chunksize=2)
    print(f"roof: {roofs()[0] / 1e3:.0f} GB/s read; * is what choose_blocks gives")
    with torch.inference_mode():
        for name in args.layers:
            for M in args.rows:
                sweep(name, LAYERS[name], M, args.most)


def sweep(name: str, layer: Dense, M: int, most: int) -> None:
    size = layer.K * sum(layer.Ns)
    calls = [inputs(layer, M) for _ in range(how_many(size, torch.device("cuda")))]
    floor = size / roofs()[0]
    now, *others = candidates(layer, M)
    peers: dict[str, Callable[..., list[Tensor]]] = {"quant_fp8, linear_fp8": parts}
    for blocks in (now, *others):
        label = f"{tuple(blocks)}{' *' if blocks == now else ''}"
        peers[label] = functools.partial(skinny_mms_fp8_triton, blocks=blocks)
    wanted = skinny_mms_fp8_reference(*calls[0], dtype=torch.float32)
    results = []
    for label, peer in peers.items():
        try:
            us = microseconds([functools.partial(peer, *call) for call in calls], 7)
            wrong = error(peer(*calls[0]), wanted)
            results.append((us, label + (f" WRONG by {wrong:.1e}" if wrong > 0.01 else "")))
        except (RuntimeError, TritonError) as problem:
            print(f"    {label} {type(problem).__name__}: {str(problem)[:200]}")
    print(f"{name} {layer.K} x {layer.Ns} M={M}: reads {floor:.2f} us", flush=True)
    for i, (us, label) in enumerate(sorted(results)):
        if i < most or "(" not in label or "*" in label:
            print(f"    {us:9.2f} us {100 * floor / us:5.1f} %  {label}", flush=True)


def error(ys: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest error relative to the largest value."""
    pairs = zip(ys, wanted, strict=True)
    return max(float((y - want).abs().max() / want.abs().max()) for y, want in pairs)


if __name__ == "__main__":
    main()
