"""Time every op on the shapes of real layers: python benchmarks/bench_ops.py [--models qwen3 ...]

Each number is the median over replays of a CUDA graph that holds several calls, each with its own
routing, so that the experts' weights come from memory and not from L2. The roofs (a plain reader, a
cuBLAS product) are measured in the same run. Writes benchmarks/results/<gpu>_<date>_ops.csv.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from _results import FOLDER, write
from torch import Tensor

from moe_compile.ops import moe
from moe_compile.ops._tune import microseconds, times  # noqa: F401 (bench_layer's)


class Layer(NamedTuple):
    """Hidden and expert features, experts, experts per token, and how the layer routes."""

    H: int
    F: int
    E: int
    K: int
    h_contiguous: bool = True
    route: tuple[Any, ...] = ("softmax", True, None, 1, 1, "max", True)


LAYERS = {
    "mixtral": Layer(4096, 14336, 8, 2),
    "qwen3": Layer(2048, 768, 128, 8),
    "deepseek_v3": Layer(
        7168, 2048, 256, 8, route=("sigmoid", True, None, 8, 4, "top2_sum", True, 1e-20, 2.5)
    ),
    "gpt_oss": Layer(2880, 2880, 128, 4, h_contiguous=False, route=("softmax", False)),
}


@triton.jit
def _read_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + place), 0))


@functools.cache
def roofs() -> tuple[float, float]:
    """Bytes read, and bfloat16 operations, per microsecond."""
    x = torch.randn(2**31 // 4, device="cuda")
    y = torch.empty(x.numel() // 8192, device="cuda")
    read = [lambda: _read_kernel[(y.numel(),)](x, y, BLOCK=8192, num_warps=8)]
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return x.nbytes / microseconds(read), 2 * 8192**3 / microseconds([lambda: a @ a.t()] * 4)


def weights(layer: Layer, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """[E, H, 2F] and [E, F, H], in the layout of the model's checkpoint."""
    H, F, E = layer.H, layer.F, layer.E
    shapes = ((2 * F, H), (H, F)) if layer.h_contiguous else ((H, 2 * F), (F, H))
    one, two = (
        torch.empty(E, *s, device="cuda", dtype=dtype).uniform_(-0.05, 0.05) for s in shapes
    )
    return (one.mT, two.mT) if layer.h_contiguous else (one, two)


def routings(layer: Layer, T: int, count: int) -> list[Tensor]:
    """Logits; those of one token each choose other experts than the calls before."""
    logits = [torch.randn(T, layer.E, device="cuda") for _ in range(count)]
    if T == 1 and layer.route[0] == "softmax":
        order = torch.randperm(layer.E, device="cuda")
        for i, row in enumerate(logits):
            row[0, order[torch.arange(i * layer.K, (i + 1) * layer.K) % layer.E]] += 8
    return logits


Row = dict[str, Any]


def row(op: str, model: str, T: int, peer: str, us: float, size: float, flops: float = 0.0) -> Row:
    """One line: `size` bytes that must move, `flops` that must be done, and how near the roof."""
    read, product = roofs()
    return {
        "op": op,
        "model": model,
        "tokens": T,
        "peer": peer,
        "us": round(us, 2),
        "gb_per_s": round(size / us / 1e3),
        "tflop_per_s": round(flops / us / 1e6, 1),
        "percent_of_roof": round(100 * max(size / read, flops / product) / us, 1),
    }


def stages(layer: Layer, w: tuple[Tensor, Tensor], x: Tensor, logits: Tensor) -> dict[str, Any]:
    """Each stage of one layer as a call, with what it moves and computes."""
    H, F, E, K = layer.H, layer.F, layer.E, layer.K
    route = functools.partial(moe.route, logits, K, *layer.route)
    scores, ids = route()
    rows, offsets, position = moe.sort_tokens(ids, E)
    gate_up = functools.partial(moe.grouped_mm, x, w[0], offsets, rows, K)
    h = gate_up()
    act = functools.partial(moe.silu_mul, h)
    a = act()
    down = functools.partial(moe.grouped_mm, a, w[1], offsets)
    y = down()

    def whole() -> Tensor:
        scores, ids = route()
        rows, offsets, position = moe.sort_tokens(ids, E)
        h = moe.grouped_mm(x, w[0], offsets, rows, K)
        y = moe.grouped_mm(moe.silu_mul(h), w[1], offsets)
        return moe.combine(y, position, scores)

    R, touched = rows.numel(), ids.unique().numel()
    bytes_up = 2 * (touched * 2 * F * H + x.numel() + h.numel())
    bytes_down = 2 * (touched * F * H + a.numel() + y.numel())
    sorted_x = x[rows.long() // K]
    return {
        "route": (route, logits.nbytes + 12 * R, 0),
        "sort_tokens": (lambda: moe.sort_tokens(ids, E), 16 * R, 0),
        "gate_up": (gate_up, bytes_up, 4 * R * F * H),
        "gate_up torch._grouped_mm": (
            lambda: torch._grouped_mm(sorted_x, w[0], offs=offsets),
            bytes_up,
            4 * R * F * H,
        ),
        "silu_mul": (act, h.nbytes + a.nbytes, 0),
        "down": (down, bytes_down, 2 * R * F * H),
        "down torch._grouped_mm": (
            lambda: torch._grouped_mm(a, w[1], offs=offsets),
            bytes_down,
            2 * R * F * H,
        ),
        "combine": (lambda: moe.combine(y, position, scores), y.nbytes + x.nbytes, 0),
        "layer": (whole, bytes_up + bytes_down, 6 * R * F * H),
    }


def bench_layer(model: str, tokens: Sequence[int]) -> list[Row]:
    """All stages of one model's layer."""
    layer, rows = LAYERS[model], []
    w = weights(layer)
    for T in tokens:
        count = 16 if T <= 64 else 3
        x = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
        many = [stages(layer, w, x, logits) for logits in routings(layer, T, count)]
        for name in many[0]:
            op, _, peer = name.partition(" ")
            size = statistics.mean(s[name][1] for s in many)
            try:
                us = microseconds([s[name][0] for s in many], 15 if T <= 64 else 5)
            except RuntimeError as error:  # a peer may not take a shape
                print(f"{name} at {T}: {error}", file=sys.stderr)
                continue
            rows.append(row(op, model, T, peer or "moe_compile", us, size, many[0][name][2]))
    return rows


def bench_compiled_routing(model: str, tokens: Sequence[int]) -> list[Row]:
    """The reference of `route`, compiled by Inductor."""
    from moe_compile.ops.route import route_reference

    layer, rows = LAYERS[model], []
    for T in tokens:
        fn = torch.compile(route_reference, dynamic=False)
        calls = [
            functools.partial(fn, logits, layer.K, *layer.route) for logits in routings(layer, T, 4)
        ]
        size = 4 * T * layer.E + 12 * T * layer.K
        rows.append(row("route", model, T, "torch.compile", microseconds(calls), size))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512, 8192])
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.manual_seed(0)
    read, product = roofs()
    print(f"roofs: {read / 1e3:.0f} GB/s read, {product / 1e6:.0f} TFLOP/s bfloat16")
    rows = []
    with torch.inference_mode():
        for model in args.models:
            rows += bench_layer(model, args.tokens)
            torch.cuda.empty_cache()
        for model in {"qwen3", "deepseek_v3"} & set(args.models):
            rows += bench_compiled_routing(model, [1, 64, 8192])
    roof = {"read_roof_gb_per_s": round(read / 1e3), "bf16_roof_tflop_per_s": round(product / 1e6)}
    write(rows, "ops", args.out, **roof)
    for r in rows:
        print(
            f"{r['op']:12} {r['model']:12} {r['tokens']:5} {r['peer']:18} {r['us']:9.2f} us"
            f" {r['gb_per_s']:5} GB/s {r['tflop_per_s']:6} TFLOP/s {r['percent_of_roof']:5} %"
        )


if __name__ == "__main__":
    main()
