"""MoE layers in float8 on a GPU: times by stage beside the roofs, and errors.

    python benchmarks/bench_layer_fp8.py [--models qwen3 ...] [--tokens 1 ...]

Quantise, gate and up, activation and quantisation, down, combine; e4m3 weights in blocks of
128 x 128, activations in groups of 128. Routing given, expert weights of several sets so that they
come from memory. The error is that of the layer's output, relative by RMS, against float64 on the
very same quantised weights with unquantised activations, on a few tokens.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from _results import FOLDER, write
from bench_ops import LAYERS, Layer, microseconds, roofs, routings
from torch import Tensor

from moe_compile.ops import moe
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize
from moe_compile.passes.fuse_epilogue import LEAST_ROWS_FP8

FP8 = torch.float8_e4m3fn
LOCAL = {"deepseek_v3": 32}  # experts of one GPU of eight
Weight = tuple[Tensor, Tensor]


def weights_fp8(layer: Layer, E: int) -> tuple[Weight, Weight]:
    """Gate with up, and down, each [E, H, G] with its scales."""
    made = []
    for G, H in ((2 * layer.F, layer.H), (layer.H, layer.F)):
        w = torch.empty(E, G, H, device="cuda", dtype=FP8)
        for one in w:
            one.copy_((torch.randn(G, H, device="cuda") * 100).clamp(-448, 448))
        scale = torch.rand(E, -(-G // 128), -(-H // 128), device="cuda") * 4e-4
        made.append((w.mT, scale.mT))
    return made[0], made[1]


def stages(layer: Layer, E: int, w: tuple[Weight, Weight], x: Tensor, logits: Tensor) -> Any:
    route = functools.partial(moe.route, logits[:, :E].contiguous(), layer.K, "softmax", True)
    scores, ids = route()
    rows, offsets, position = moe.sort_tokens(ids, E)
    q, scale = moe.quant_fp8(x)
    # As passes/fuse_epilogue.py does it.
    fused = rows.numel() >= LEAST_ROWS_FP8
    gemm = moe.grouped_mm_fp8_silu_mul if fused else moe.grouped_mm_fp8
    activate = moe.quant_fp8 if fused else moe.silu_mul_quant
    h = gemm(q, scale, *w[0], offsets, rows, layer.K)
    a, a_scale = activate(h, offsets=offsets)
    y = moe.grouped_mm_fp8(a, a_scale, *w[1], offsets)

    def whole() -> Tensor:
        rows, offsets, position = moe.sort_tokens(ids, E)
        q, scale = moe.quant_fp8(x)
        h = gemm(q, scale, *w[0], offsets, rows, layer.K)
        a, a_scale = activate(h, offsets=offsets)
        return moe.combine(moe.grouped_mm_fp8(a, a_scale, *w[1], offsets), position, scores)

    touched, R = ids.unique().numel(), rows.numel()
    per_expert = w[0][0][0].numel() + w[1][0][0].numel()
    calls = {
        "sort_tokens": lambda: moe.sort_tokens(ids, E),
        "quant_fp8": lambda: moe.quant_fp8(x),
        "gate_up": lambda: gemm(q, scale, *w[0], offsets, rows, layer.K),
        "silu_mul_quant": lambda: activate(h, offsets=offsets),
        "down": lambda: moe.grouped_mm_fp8(a, a_scale, *w[1], offsets),
        "combine": lambda: moe.combine(y, position, scores),
        "layer": whole,
    }
    return calls, touched * per_expert, 2 * R * per_expert, (scores, ids)


def layer_error(w: tuple[Weight, Weight], x: Tensor, got: Tensor, routing: Any, most: int) -> float:
    """Relative error of a few tokens, with float64 products of the same weights."""
    scores, ids = routing
    wants = []
    for t in range(min(most, x.shape[0])):
        want = torch.zeros(x.shape[1], device="cuda", dtype=torch.float64)
        for weight, e in zip(scores[t].tolist(), ids[t].tolist(), strict=True):
            one, two = (dequantize(v[e], s[e], 128, 128, torch.float64) for v, s in w)
            gate, up = (x[t].double() @ one).chunk(2)
            want += weight * ((torch.nn.functional.silu(gate) * up) @ two)
        wants.append(want)
    exact = torch.stack(wants)
    err = got[: len(wants)].double() - exact
    return (err.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()).item()


def bench(model: str, tokens: list[int]) -> list[dict[str, Any]]:
    layer, found = LAYERS[model], []
    E = LOCAL.get(model, layer.E)
    w = weights_fp8(layer, E)
    for T in tokens:
        count = 16 if T <= 64 else 3
        x = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
        many = [stages(layer, E, w, x, logits) for logits in routings(layer, T, count)]
        error = layer_error(w, x, many[0][0]["layer"](), many[0][3], 4)
        size, ops = statistics.mean(m[1] for m in many), statistics.mean(m[2] for m in many)
        read, product = roofs()
        row = {"model": model, "experts": E, "tokens": T, "relative error": round(error, 5)}
        for name in many[0][0]:
            us = microseconds([m[0][name] for m in many], 15 if T <= 64 else 5)
            row[f"{name} us"] = round(us, 2)
        row["read floor us"] = round(size / read, 1)
        row["product floor us"] = round(ops / (2 * product), 1)  # twice bfloat16's measured rate
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["mixtral", "qwen3", "deepseek_v3"]
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 1024, 8192])
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for model in args.models:
            rows += bench(model, args.tokens)
            write(rows, "layer_fp8", args.out)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
