"""Whole MoE layers in decode sizes on a GPU, beside the read roof and measured peers.

    python benchmarks/bench_layer.py [--tokens 1 4 16 64] [--peers FILE.csv] [--out FOLDER]

Routing given; in float8 (blocks of 128 x 128) the quantisation of x is counted. A time is the
median over replays of a CUDA graph of several calls, each with a routing and tokens of its own; low
and high are quartiles of the replays. The read floor is the touched experts' bytes, once, at the
rate of a plain read measured before each layer; the product floor is the rate of a cuBLAS product
measured there, twice that in float8. Peers: the fastest with the same numerics in a CSV of columns
layer, dtype, routing, tokens, peer, us, note. Errors are relative to float64, by RMS, on a few
tokens. Writes benchmarks/results/<gpu>_<date>_layer.csv.
"""

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_ops
import torch
from _moe_layer import ROUTINGS, choices, layer, relative_error
from _results import FOLDER, write
from bench_layer_fp8 import weights_fp8
from bench_ops import Layer, roofs
from torch import Tensor

from moe_compile.ops._experts_kernel import are_few

LAYERS = {
    "mixtral": bench_ops.LAYERS["mixtral"],
    "qwen3": bench_ops.LAYERS["qwen3"],
    "dsv3_ep8": bench_ops.LAYERS["deepseek_v3"]._replace(E=32),  # experts of one GPU of eight
}
LARGEST_ERROR = {"bf16": 0.015, "fp8": 0.08}
OTHER_NUMERICS = "other numerics"  # in a peer's note
Row = dict[str, Any]
Peers = dict[tuple[str, str, str, int], tuple[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8"])
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.manual_seed(0)
    peers = read_peers(args.peers) if args.peers else {}
    rows: list[Row] = []
    with torch.inference_mode():
        for name in args.layers:
            roofs.cache_clear()
            print(f"{name}: {roofs()[0] / 1e3:.0f} GB/s read", flush=True)
            for dtype in args.dtypes:
                rows += bench(name, dtype, args.routings, args.tokens, peers)
                write(rows, "layer", args.out)
                torch.cuda.empty_cache()
    wrong = [r for r in rows if not r["relative error"] <= LARGEST_ERROR[r["dtype"]]]
    if wrong:
        sys.exit(f"{len(wrong)} wrong results: {wrong}")


def bench(
    name: str, dtype: str, kinds: Sequence[str], tokens: Sequence[int], peers: Peers
) -> list[Row]:
    """All routings and numbers of tokens of one layer in one dtype, with the same weights."""
    w, rows = make_weights(LAYERS[name], dtype), []
    for kind in kinds:
        for T in tokens:
            row = {"layer": name, "dtype": dtype, "routing": kind, "tokens": T}
            row |= measure(LAYERS[name], kind, T, w)
            row |= beside_peer(row["us"], peers.get((name, dtype, kind, T)))
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
    return rows


def make_weights(shape: Layer, dtype: str) -> tuple[Tensor, ...]:
    """Gate with up, and down; in float8 each followed by its scales."""
    if dtype == "bf16":
        return bench_ops.weights(shape)
    up, down = weights_fp8(shape, shape.E)
    return (*up, *down)


def measure(shape: Layer, kind: str, T: int, w: tuple[Tensor, ...]) -> Row:
    """One cell: time with quartiles, floors, error of the first routing."""
    H, F, E, K = shape[:4]
    few, fp8 = T <= 64, len(w) == 4
    calls, touched = [], []
    for ids in choices(kind, T, E, K, 16 if few else 3):
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(T, K, device="cuda") + 0.1
        weights /= weights.sum(1, keepdim=True)
        given = (x, ids.to("cuda"), weights, *w)
        calls.append(functools.partial(layer, *given))
        touched.append(ids.unique().numel())
    error = relative_error(calls[0](), *calls[0].args)
    found = bench_ops.times(calls * 2 if few else calls, 15 if few else 5)
    low, us, high = statistics.quantiles(found, n=4, method="inclusive")
    read, product = roofs()
    size = statistics.mean(touched) * sum(each[0].nbytes for each in w)
    read_floor, product_floor = size / read, 6 * T * K * H * F / product / (2 if fp8 else 1)
    return {
        "touched experts": round(statistics.mean(touched), 1),
        "in one op": are_few(T * K, *w[:: len(w) // 2]),
        "us": round(us, 2),
        "low us": round(low, 2),
        "high us": round(high, 2),
        "read floor us": round(read_floor, 2),
        "product floor us": round(product_floor, 2),
        "percent of roof": round(100 * max(read_floor, product_floor) / us, 1),
        "read roof GB/s": round(read / 1e3),
        "relative error": round(error, 5),
    }


def beside_peer(us: float, peer: tuple[str, float] | None) -> Row:
    """The peer, its time, and how many times ours that is; nothing where none was measured."""
    if peer is None:
        return {"peer": "", "peer us": "", "ratio": ""}
    return {"peer": peer[0], "peer us": peer[1], "ratio": round(peer[1] / us, 3)}


def read_peers(path: Path) -> Peers:
    """For each layer, dtype, routing and number of tokens the fastest peer of the same numerics."""
    best: Peers = {}
    with path.open(newline="") as file:
        for r in csv.DictReader(file):
            key = (r["layer"], r["dtype"], r["routing"], int(r["tokens"]))
            us = float(r["us"])
            if OTHER_NUMERICS not in r["note"] and (key not in best or us < best[key][1]):
                best[key] = (r["peer"], us)
    return best


if __name__ == "__main__":
    main()
