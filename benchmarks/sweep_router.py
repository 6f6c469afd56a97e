"""Is a router faster in one launch? python benchmarks/sweep_router.py

For each model's router and number of rows, microseconds of the product, of `route`, of both in turn
and of `router`, which is both in one, beside torch's product and `route`. Each call of a replay has
a weight of its own, so that it comes from memory and not from L2. Up to how many rows the last
program routes is written into `ops/_skinny_mm_kernel.py` by hand, with the numbers.
"""

import argparse
import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_ops import microseconds
from torch import Tensor

from moe_compile.ops import _scratch
from moe_compile.ops._route_kernel import Routing
from moe_compile.ops._skinny_mm_kernel import can_keep
from moe_compile.ops.rms_norm_mms import rms_norm_mms
from moe_compile.ops.route import route
from moe_compile.ops.router import router, takes_one_launch
from moe_compile.ops.skinny_mm import skinny_mm

EPS = 1e-6


class Router(NamedTuple):
    """Features, experts, and how they are chosen; whether x is normed and kept, and has a bias."""

    H: int
    E: int
    how: tuple[Any, ...]
    normed: bool = True
    biased: bool = False
    dtype: torch.dtype = torch.bfloat16
    choice_biased: bool = False


RENORMALISED = ("softmax", True, None, 1, 1, "max", True)
MODELS = {
    "qwen3": Router(2048, 128, (8, *RENORMALISED)),
    "mixtral": Router(4096, 8, (2, *RENORMALISED)),
    "gpt_oss": Router(2880, 32, (4, "softmax", False), biased=True),
    "deepseek_v3": Router(
        *(7168, 256, (8, "sigmoid", True, None, 8, 4, "top2_sum", True, 1e-20, 2.5)),
        normed=False,
        dtype=torch.float32,
        choice_biased=True,
    ),
}


def inputs(layer: Router, T: int, most: int | None = None) -> list[tuple[Any, ...]]:
    """Arguments of `router` for each call, or for the first of them."""
    device = torch.device("cuda")
    sizes = (T, layer.dtype, True), (layer.H, layer.E)
    calls = _scratch.skinny_mm_inputs(*sizes, device)[:most]
    bias = torch.randn(layer.E, device=device).to(layer.dtype) if layer.biased else None
    normed = layer.normed and can_keep(*calls[0])  # as `fuse_norm` decides
    norm = torch.ones(layer.H, device=device, dtype=layer.dtype) if normed else None
    how = list(layer.how)
    if layer.choice_biased:
        how[3] = torch.randn(layer.E, device=device)
    return [(x, w, bias, norm, EPS, True, normed, *how) for x, (w,) in calls]


def product(
    x: Tensor, w: Tensor, bias: Any, norm: Any, eps: float, round_first: bool, keep: bool, *_: Any
) -> Sequence[Tensor]:
    if norm is None:
        return [skinny_mm(x, w, bias)]
    return rms_norm_mms(x, norm, eps, [w], [bias], round_first, keep)  # type: ignore[no-any-return]


def in_turn(*args: Any) -> Sequence[Tensor]:
    logits, *kept = product(*args)
    return [*route(logits, *args[7:]), *kept]


def by_torch(x: Tensor, w: Tensor, bias: Any, *rest: Any) -> Sequence[Tensor]:
    return route(F.linear(x, w.t(), bias), *rest[4:])  # type: ignore[no-any-return]


def compile_one(job: tuple[Router, int]) -> None:
    """Fill Triton's cache on disk from another process."""
    layer, T = job
    call = inputs(layer, T, most=1)[0]
    router(*call)
    in_turn(*call)


def sweep(name: str, layer: Router, T: int) -> None:
    calls = inputs(layer, T)
    logits = product(*calls[0])[0]
    peers: dict[str, Callable[..., Any]] = {
        "product": product,
        "route": lambda *args: route(logits, *args[7:]),
        "in turn": in_turn,
        "router": router,
        "torch, no norm": by_torch,
    }
    us = {}
    for label, peer in peers.items():
        us[label] = microseconds([functools.partial(peer, *call) for call in calls])
    x, w, _, norm, _, _, keep, *how = calls[0]
    one = takes_one_launch(x, w, norm is not None, keep, Routing(*how))
    same = all(map(torch.equal, router(*calls[0]), in_turn(*calls[0])))
    shown = "  ".join(f"{label} {value:6.2f}" for label, value in us.items())
    note = ("" if one else "  two launches") + ("" if same else "  WRONG")
    note += "" if keep or not layer.normed else "  not normed"
    print(f"{name:12} T={T:<3} {shown}{note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    torch.manual_seed(0)
    jobs = [(MODELS[name], T) for name in args.models for T in args.rows]
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs, chunksize=2)
    with torch.inference_mode():
        for name in args.models:
            for T in args.rows:
                sweep(name, MODELS[name], T)


if __name__ == "__main__":
    main()
