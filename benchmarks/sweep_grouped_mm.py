"""Which blocks `grouped_mm` should take: python benchmarks/sweep_grouped_mm.py

For each layer, product and number of tokens, the candidates from fastest to slowest. The choice is
written into `choose_blocks` by hand, with the numbers.
"""

import argparse
import functools
import multiprocessing
import os

import torch
from bench_ops import LAYERS, Layer, microseconds, roofs, routings, weights

from moe_compile.ops import moe
from moe_compile.ops._grouped_mm_kernel import Blocks
from moe_compile.ops.grouped_mm import grouped_mm_triton

# One row in a tile, without tensor cores.
ONE = {
    True: [
        *(Blocks(1, n, 256, 1, w, s) for n, w in [(8, 2), (16, 2), (16, 4)] for s in (1, 3)),
        *(
            Blocks(1, n, 512, 1, w, s)
            for n, w in [(4, 2), (8, 4), (16, 4), (16, 8)]
            for s in (1, 3)
        ),
        *(Blocks(1, n, 1024, 1, w, s) for n, w in [(4, 4), (8, 4), (8, 8)] for s in (1, 2)),
    ],
    False: [
        *(Blocks(1, 64, k, 1, w, s) for k, w in [(32, 2), (64, 4), (128, 4)] for s in (1, 3)),
        *(Blocks(1, 128, k, 1, w, s) for k, w in [(32, 4), (64, 8)] for s in (1, 3)),
    ],
}
FEW = {
    True: [
        *(Blocks(16, 32, k, 1, w, s) for k, w, s in [(64, 2, 4), (64, 2, 6), (64, 2, 8)]),
        *(Blocks(16, 32, k, 1, w, s) for k, w, s in [(64, 1, 6), (64, 4, 6), (128, 1, 4)]),
        *(Blocks(16, 32, k, 1, w, s) for k, w, s in [(128, 2, 5), (128, 4, 5), (256, 4, 3)]),
        *(Blocks(16, 64, k, 1, w, s) for k, w, s in [(64, 2, 5), (64, 4, 5), (128, 2, 4)]),
        *(Blocks(16, 64, k, 1, w, s) for k, w, s in [(128, 4, 3), (128, 4, 4), (256, 4, 3)]),
        *(Blocks(16, 128, k, 1, w, s) for k, w, s in [(64, 4, 4), (128, 8, 3)]),
    ],
    False: [
        *(Blocks(16, 64, k, 1, w, s) for k, w, s in [(64, 2, 5), (64, 4, 5), (64, 4, 6)]),
        *(Blocks(16, 64, k, 1, w, s) for k, w, s in [(128, 4, 3), (128, 4, 4), (32, 2, 8)]),
        *(Blocks(16, 128, k, 1, w, s) for k, w, s in [(64, 4, 4), (32, 4, 6), (128, 8, 3)]),
        Blocks(16, 256, 32, 1, 8, 5),
    ],
}
SOME = [
    *(Blocks(16, n, k, 1, w, s) for n, k, w, s in [(64, 128, 4, 4), (128, 64, 4, 4)]),
    *(Blocks(32, n, k, 4, w, s) for n, k, w, s in [(64, 128, 4, 4), (128, 64, 4, 4)]),
    *(Blocks(64, n, k, 4, w, s) for n, k, w, s in [(64, 128, 4, 4), (128, 64, 4, 4)]),
    *(Blocks(64, n, k, 4, w, s) for n, k, w, s in [(128, 128, 4, 3), (256, 64, 8, 4)]),
    *(Blocks(128, n, 64, 4, w, s) for n, w, s in [(128, 8, 3), (256, 8, 3)]),
]
MANY = [
    *(Blocks(128, 256, 64, g, 8, s) for g in (4, 8, 12, 16) for s in (3, 4)),
    *(Blocks(128, 128, 64, g, 8, s) for g in (8, 16) for s in (3, 4)),
]


def candidates(layer: Layer, T: int) -> list[Blocks]:
    rows_per_expert = T * layer.K / layer.E
    if rows_per_expert <= 16:
        few = ONE[layer.h_contiguous] + FEW[layer.h_contiguous]
        return few if T <= 16 else few + SOME[2:4]
    return SOME if rows_per_expert <= 128 else MANY


def compile_one(job: tuple[int, bool, Blocks, torch.dtype]) -> None:
    """Fill Triton's cache on disk from another process: one tiny product with the same kernel."""
    E, h_contiguous, blocks, dtype = job
    x = torch.randn(64, 2048, device="cuda", dtype=dtype)
    w = torch.randn(E, 64, 2048, device="cuda", dtype=dtype).mT
    w = w if h_contiguous else w.contiguous()
    offsets = torch.full((E,), 64, device="cuda", dtype=torch.int32)
    rows = torch.arange(64, device="cuda", dtype=torch.int32)
    for k in 8, 1:
        try:
            grouped_mm_triton(x, w, offsets, rows if k > 1 else None, k, None, blocks)
        except Exception as error:
            print(blocks, type(error).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 1024, 8192])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    layers = {m: LAYERS[m] for m in args.models}
    jobs = {
        (a.E, a.h_contiguous, b, dtype)
        for a in layers.values()
        for T in args.tokens
        for b in candidates(a, T)
    }
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, sorted(jobs, key=str), chunksize=1)
    read, product = roofs()
    print(f"roofs: {read / 1e3:.0f} GB/s read, {product / 1e6:.0f} TFLOP/s bfloat16")
    with torch.inference_mode():
        for model, layer in layers.items():
            sweep(model, layer, args.tokens, dtype)


def sweep(model: str, layer: Layer, tokens: list[int], dtype: torch.dtype) -> None:
    w1, w2 = weights(layer, dtype)
    for T in tokens:
        count = 16 if T <= 64 else 2
        x = torch.randn(T, layer.H, device="cuda", dtype=dtype)
        a = torch.randn(T * layer.K, layer.F, device="cuda", dtype=dtype)
        sorts, touched = [], 0
        for logits in routings(layer, T, count):
            ids = moe.route(logits, layer.K, *layer.route)[1]
            touched += ids.unique().numel() / count
            sorts.append(moe.sort_tokens(ids, layer.E))
        for name, inputs, w, k in ("up", x, w1, layer.K), ("down", a, w2, 0):
            results = []
            for blocks in candidates(layer, T):
                calls = [
                    functools.partial(
                        grouped_mm_triton,
                        inputs,
                        w,
                        offsets,
                        rows if k else None,
                        k or 1,
                        None,
                        blocks,
                    )
                    for rows, offsets, _ in sorts
                ]
                try:
                    results.append((microseconds(calls, 7 if T <= 64 else 3), blocks))
                except Exception as error:
                    print(blocks, type(error).__name__)
            read, product = roofs()
            floor = max(touched * w[0].nbytes / read, 2 * a.shape[0] * w[0].numel() / product)
            print(f"{model} {name} T={T} floor {floor:.1f} us")
            for us, blocks in sorted(results):
                print(f"    {us:9.2f} us {100 * floor / us:5.1f} %  {tuple(blocks)}")


if __name__ == "__main__":
    main()
