"""Which blocks `grouped_mm` and `grouped_mm_fp8` should take: python benchmarks/sweep_grouped_mm.py

For each layer, product and number of tokens, the candidates from fastest to slowest; the product of
gate and up also with silu_mul at its end, beside the time of the activation alone. The choice is
written into `choose_blocks` by hand, with the numbers.
"""

import argparse
import functools
import multiprocessing
import os
from typing import Any

import torch
from bench_layer_fp8 import weights_fp8
from bench_ops import LAYERS, Layer, microseconds, roofs, routings, weights
from torch import Tensor
from triton.errors import TritonError

from moe_compile.ops import _candidates, _grouped_mm_fp8_kernel, _grouped_mm_kernel, moe
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_kernel import Gate

DTYPES = ["bfloat16", "float32", "float8_e4m3fn"]


def candidates(layer: Layer, T: int, dtype: torch.dtype) -> list[Blocks]:
    sizes = (T * layer.K, layer.E, layer.H, layer.F)
    if dtype == torch.float8_e4m3fn:
        return _candidates.grouped_mm_fp8((), sizes, None)
    return _candidates.grouped_mm((dtype, layer.h_contiguous), sizes, None)


def product(x: Any, w: Any, gate: Gate | None, blocks: Blocks, *routing: Any) -> Tensor:
    """One product, by the kernel that takes such a dtype."""
    fp8 = isinstance(x, tuple)
    values, weight = (x[0], w[0]) if fp8 else (x, w)
    rows = routing[1]
    R, G = (values if rows is None else rows).shape[0], weight.shape[2] // (2 if gate else 1)
    y = values.new_empty(R, G, dtype=torch.bfloat16 if fp8 else values.dtype)
    if fp8:
        _grouped_mm_fp8_kernel.launch(*x, *w, y, *routing, None, gate, blocks)
    else:
        _grouped_mm_kernel.launch(x, w, y, *routing, None, gate, blocks)
    return y


def compile_one(job: tuple[int, bool, Blocks, torch.dtype]) -> None:
    """Fill Triton's cache on disk from another process: one tiny product with the same kernel."""
    E, h_contiguous, blocks, dtype = job
    x = torch.randn(64, 2048, device="cuda").to(dtype)
    w = torch.randn(E, 512, 2048, device="cuda").to(dtype).mT
    w = w if h_contiguous else w.contiguous()
    if dtype == torch.float8_e4m3fn:
        x, w = (x, x.new_ones(64, 16, dtype=torch.float32)), (w, torch.ones(E, 4, 16).cuda().mT)
    offsets = torch.full((E,), 64, device="cuda", dtype=torch.int32)
    rows = torch.arange(64, device="cuda", dtype=torch.int32)
    for k, gate in (8, None), (1, None), (8, Gate(interleaved=not h_contiguous)):
        try:
            product(x, w, gate, blocks, offsets, rows if k > 1 else None, k)
        except (RuntimeError, TritonError) as error:
            print(blocks, type(error).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 1024, 8192])
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32", "float8_e4m3fn"]
    )
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    layers = {m: LAYERS[m] for m in args.models}
    jobs = {
        (a.E, a.h_contiguous, b, dtype)
        for a in layers.values()
        for T in args.tokens
        for b in candidates(a, T, dtype)
    }
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, sorted(jobs, key=str), chunksize=1)
    read, product = roofs()
    print(f"roofs: {read / 1e3:.0f} GB/s read, {product / 1e6:.0f} TFLOP/s bfloat16")
    with torch.inference_mode():
        for model, layer in layers.items():
            sweep(model, layer, args.tokens, dtype)


def sweep(model: str, layer: Layer, tokens: list[int], dtype: torch.dtype) -> None:
    fp8 = dtype == torch.float8_e4m3fn
    w1, w2 = weights_fp8(layer, layer.E) if fp8 else weights(layer, dtype)
    for T in tokens:
        count = 16 if T <= 64 else 2
        x: Any = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
        a: Any = torch.randn(T * layer.K, layer.F, device="cuda", dtype=torch.bfloat16)
        h = torch.randn(T * layer.K, 2 * layer.F, device="cuda", dtype=torch.bfloat16)
        act = moe.silu_mul_quant if fp8 else moe.silu_mul
        act_us = microseconds([functools.partial(act, h)] * 4, 7 if T <= 64 else 3)
        x, a = (moe.quant_fp8(v) if fp8 else v.to(dtype) for v in (x, a))
        sorts, touched = [], 0.0
        for logits in routings(layer, T, count):
            ids = moe.route(logits[:, : layer.E].contiguous(), layer.K, *layer.route)[1]
            touched += ids.unique().numel() / count
            sorts.append(moe.sort_tokens(ids, layer.E))
        for name, inputs, w, k in ("up", x, w1, layer.K), ("down", a, w2, 0):
            results = []
            for blocks in candidates(layer, T, dtype):
                for gate in (None, Gate(interleaved=not layer.h_contiguous)) if k else (None,):
                    call = functools.partial(product, inputs, w, gate, blocks)
                    calls = [
                        functools.partial(call, offsets, rows if k else None, k or 1)
                        for rows, offsets, _ in sorts
                    ]
                    try:
                        us = microseconds(calls, 7 if T <= 64 else 3)
                        results.append((us, gate is not None, blocks))
                    except (RuntimeError, TritonError) as error:
                        print(blocks, type(error).__name__)
            read, rate = roofs()
            one = (w[0] if fp8 else w)[0]
            R, rate = T * layer.K, rate * (2 if fp8 else 1)
            floor = max(touched * one.nbytes / read, 2 * R * one.numel() / rate)
            print(f"{model} {name} T={T} floor {floor:.1f} us, activation alone {act_us:.2f} us")
            for us, gated, blocks in sorted(results, key=lambda r: (r[1], r[0])):
                ending = "silu_mul" if gated else ""
                print(f"    {us:9.2f} us {100 * floor / us:5.1f} %  {tuple(blocks)} {ending}")


if __name__ == "__main__":
    main()
