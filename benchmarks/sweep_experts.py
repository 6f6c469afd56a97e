"""Which blocks the two kernels of few tokens should take: python benchmarks/sweep_experts.py

The whole of `experts` for one token, and few: candidates from fastest to slowest beside the time of
reading the weights, first those of one kernel with the other as chosen, then the best of both. What
they compute is compared with what is chosen. With and without programmatic dependent launch. The
choice is written into `ops/_experts_kernel.py` by hand, with the numbers; that of weights whose
columns are contiguous (gpt_oss, in bfloat16 alone) into `_experts_columns_kernel.py`.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from typing import Any

import torch
from bench_layer_fp8 import weights_fp8
from bench_ops import LAYERS, microseconds, roofs, routings, weights
from torch import Tensor
from triton.errors import TritonError

from moe_compile.ops import _candidates, _experts_kernel, _overlap, moe
from moe_compile.ops._experts_kernel import FewBlocks, launch_few, launch_few_fp8
from moe_compile.ops._gate_up_fp8_kernel import GateUpBlocks
from moe_compile.ops._grouped_mm_kernel import Gate

# Of a kernel that quantises x, too: 8 to 32 KB of weights at a time.
GATE_UP = [GateUpBlocks(4, 512 * w, w, s) for w, s in [(1, 4), (2, 2), (2, 3), (4, 2), (4, 3)]]
GATE_UP += [GateUpBlocks(8, 512 * w, w, s) for w, s in [(1, 3), (1, 5), (2, 2), (2, 3), (4, 2)]]
GATE_UP += [GateUpBlocks(16, 512, 1, 3), GateUpBlocks(2, 2048, 4, 2), GateUpBlocks(4, 1024, 2, 1)]
# On tensor cores: features, depth, warps, stages.
GATE_UP_DOTS = [
    GateUpBlocks(*b, True)
    for b in [
        *[(16, 512, 4, s) for s in (2, 3, 4, 6)],
        *[(16, 512, 2, 4), (16, 256, 2, 4), (16, 256, 2, 6), (16, 256, 1, 4)],
        *[(16, 1024, 4, 2), (16, 1024, 4, 3), (16, 1024, 8, 2), (16, 1024, 8, 3)],
        *[(32, 512, 4, 2), (32, 512, 4, 3), (32, 1024, 8, 2)],
    ]
]
GATE_UP += GATE_UP_DOTS
Some = GateUpBlocks | FewBlocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["qwen3", "mixtral", "deepseek_v3", "gpt_oss"]
    parser.add_argument("--models", nargs="+", default=models[:3], choices=models)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    dtypes = ["bfloat16", "float8", "float8 of x quantised ahead"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--kernels", nargs="+", default=["up", "down"], choices=["up", "down"])
    parser.add_argument("--experts", type=int, help="those of one GPU of several")
    parser.add_argument("--only-dots", action="store_true", help="of float8, beside the chosen")
    args = parser.parse_args()
    if "float8" in args.dtypes:
        fill_cache([model for model in args.models if model != "gpt_oss"], args.only_dots)
    with torch.inference_mode():
        for model, dtype in itertools.product(args.models, args.dtypes):
            if model == "gpt_oss" and dtype != "bfloat16":
                continue
            for T in args.tokens:
                sweep(model, T, dtype, args.experts, args.kernels, args.only_dots)
                torch.cuda.empty_cache()


def candidates(model: str, T: int, dtype: str, only_dots: bool) -> tuple[list[Any], list[Any]]:
    """Of each kernel."""
    layer, fp8 = LAYERS[model], dtype != "bfloat16"
    if not layer.h_contiguous:
        how = (torch.bfloat16, layer.K), (T, layer.F, layer.H), None
        return _candidates.experts_up_columns((), (), None), _candidates.experts_down_columns(*how)
    if dtype == "float8" and only_dots:
        return GATE_UP_DOTS, _candidates.experts_down_dots(layer.K)
    up_of = _candidates.experts_up_fp8 if fp8 else _candidates.experts_up
    ups: Any = GATE_UP if dtype == "float8" else up_of((), (), None)
    kind, sizes = (torch.bfloat16, fp8, layer.K), (T, layer.F, layer.H)
    return ups, _candidates.experts_down(kind, sizes, None)


def fill_cache(models: list[str], only_dots: bool) -> None:
    """Compile what one token in float8 takes in several processes, which share Triton's cache."""
    jobs: list[tuple[str, Some | None]] = [(model, None) for model in models]
    for model in models:
        ups, downs = candidates(model, 1, "float8", only_dots)
        jobs += [(model, one) for one in (*ups, *downs)]
    processes = min(14, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_one, jobs, chunksize=2)


def compile_one(job: tuple[str, Some | None]) -> None:
    """By a launch with as many experts as matter: what is divisible by 16 is compiled otherwise."""
    model, blocks = job
    layer = LAYERS[model]
    up = blocks if isinstance(blocks, GateUpBlocks) else None
    down = blocks if isinstance(blocks, FewBlocks) else None
    w, E = [], min(layer.E, 16)
    for G, H in ((2 * layer.F, layer.H), (layer.H, layer.F)):
        scale = torch.ones(E, -(-G // 128), -(-H // 128), device="cuda")
        w.append((torch.empty(E, G, H, device="cuda", dtype=torch.float8_e4m3fn).mT, scale.mT))
    x = torch.zeros(1, layer.H, device="cuda", dtype=torch.bfloat16)
    ids = torch.arange(layer.K, device="cuda")[None]
    rest = (ids, torch.ones(1, layer.K, device="cuda"), w[0], w[1], torch.empty_like(x), x.dtype)
    for replaced in OVERLAPS if blocks is None else OVERLAPS[1:]:
        use_overlap(replaced)
        try:
            launch_few_fp8(x, None, *rest, Gate(), (1e-10, False), up, down)
        except (RuntimeError, TritonError) as error:
            print("   ", model, blocks, type(error).__name__)


def sweep(
    model: str, T: int, dtype: str, experts: int | None, kernels: list[str], only_dots: bool
) -> None:
    layer = LAYERS[model]
    if experts is not None and experts < layer.E:
        layer = layer._replace(E=experts, route=("softmax", True))
    fp8, ahead = dtype != "bfloat16", "ahead" in dtype
    w: Any = weights_fp8(layer, layer.E) if fp8 else weights(layer)
    x = torch.randn(T, layer.H, device="cuda", dtype=torch.bfloat16)
    pairs = []
    for logits in routings(layer, T, 16):
        pairs.append(moe.route(logits[:, : layer.E].contiguous(), layer.K, *layer.route))
    out = torch.empty_like(x)
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    gate = Gate()
    if model == "gpt_oss":
        biases = torch.zeros(layer.E, 2 * layer.F).to(x), torch.zeros(layer.E, layer.H).to(x)
        gate = Gate(interleaved=True, alpha=1.702, limit=7.0, up_shift=1.0)
    read, _ = roofs()
    per_expert = sum((v[0] if fp8 else v)[0].nbytes for v in w)
    floor = sum(ids.unique().numel() for _, ids in pairs) / len(pairs) * per_expert / read
    roof = f"{floor:.2f} us, at {read / 1e3:.0f} GB/s"
    print(f"{model} {dtype} T={T}: reads {roof}", flush=True)

    def calls(up: Any, down: Any) -> list[Any]:
        if fp8:
            q = moe.quant_fp8(x) if ahead else (x, None)
            return [
                functools.partial(
                    launch_few_fp8, *q, ids, weight, *w, out, x.dtype, Gate(), (1e-10, False),
                    up, down,
                )
                for weight, ids in pairs
            ]  # fmt: skip
        return [
            functools.partial(launch_few, x, ids, s, *w, out, *biases, gate, up, down)
            for s, ids in pairs
        ]

    def time(up: Any, down: Any) -> float:
        return microseconds(calls(up, down) * 2, 9)

    def result(up: Any, down: Any) -> Tensor:
        calls(up, down)[0]()
        return out.float()

    for replaced in OVERLAPS:
        use_overlap(replaced)
        print(f"    {replaced.__name__}, blocks as chosen: {time(None, None):.2f} us", flush=True)
    wanted = result(None, None)

    def fastest(name: str, some: list[Any]) -> Any:
        """Of those that compute what they should; None, for what is chosen, if there is none."""
        found = []
        for one in some:
            up, down = (one, None) if name == "up" else (None, one)
            try:
                us, wrong = time(up, down), relative(result(up, down), wanted)
                found.append(
                    (us, tuple(one), f" WRONG by {wrong:.1e}" if wrong > 0.02 else "", one)
                )
            except (RuntimeError, TritonError) as error:
                print("   ", one, type(error).__name__)
        for us, shown, wrong, _ in sorted(found)[:8]:
            print(f"    {name} {us:8.2f} us {100 * floor / us:5.1f} %  {shown}{wrong}", flush=True)
        return next((one for *_, wrong, one in sorted(found) if not wrong), None)

    ups, downs = candidates(model, T, dtype, only_dots)
    best = fastest("up", ups if "up" in kernels else [])
    best = best, fastest("down", downs if "down" in kernels else [])
    for replaced in (*OVERLAPS, always_overlap):
        use_overlap(replaced)
        us = time(*best)
        print(
            f"    best of both, {replaced.__name__}: {us:.2f} us {100 * floor / us:.1f} %",
            flush=True,
        )
    use_overlap(_overlap.overlap)


def relative(got: Tensor, want: Tensor) -> float:
    """The difference by RMS, relative: what float8 leaves where values fall to another is 0.01."""
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def use_overlap(replaced: Any) -> None:
    for module in MODULES:
        module.overlap = replaced


def without_overlap(x: Tensor, size: int = 0) -> dict[str, bool]:
    return {"PDL": False}


def always_overlap(x: Tensor, size: int = 0) -> dict[str, Any]:
    return _overlap.overlap(x)


def _modules() -> list[Any]:
    from moe_compile.ops import (
        _experts_columns_kernel,
        _gate_up_fp8_kernel,
        _grouped_mm_fp8_kernel,
        _grouped_mm_kernel,
    )

    kernels = [_grouped_mm_kernel, _grouped_mm_fp8_kernel, _gate_up_fp8_kernel]
    return [_experts_kernel, _experts_columns_kernel, *kernels]


MODULES = _modules()
OVERLAPS: list[Any] = [without_overlap, _overlap.overlap]

if __name__ == "__main__":
    main()
