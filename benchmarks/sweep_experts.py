"""Which blocks the two kernels of few tokens should take: python benchmarks/sweep_experts.py

The whole of `experts` for one token, and few: candidates from fastest to slowest beside the stages
that it replaces and the time of reading the weights. With and without programmatic dependent
launch. The choice is written into `ops/_experts_kernel.py` by hand, with the numbers; that of
weights whose columns are contiguous (gpt_oss, in bfloat16 alone) into `_experts_columns_kernel.py`.
"""

import argparse
import functools
import itertools
from typing import Any

import torch
from bench_layer_fp8 import weights_fp8
from bench_ops import LAYERS, microseconds, roofs, routings, weights
from torch import Tensor

from moe_compile.ops import _candidates, _experts_kernel, _overlap, moe
from moe_compile.ops._experts_kernel import launch_few, launch_few_fp8
from moe_compile.ops._gate_up_fp8_kernel import GateUpBlocks
from moe_compile.ops._grouped_mm_kernel import Gate

# Of a kernel that quantises x, too: 8 to 32 KB of weights at a time.
GATE_UP = [GateUpBlocks(4, 512 * w, w, s) for w, s in [(1, 4), (2, 2), (2, 3), (4, 2), (4, 3)]]
GATE_UP += [GateUpBlocks(8, 512 * w, w, s) for w, s in [(1, 3), (1, 5), (2, 2), (2, 3), (4, 2)]]
GATE_UP += [GateUpBlocks(16, 512, 1, 3), GateUpBlocks(2, 2048, 4, 2), GateUpBlocks(4, 1024, 2, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["qwen3", "mixtral", "deepseek_v3", "gpt_oss"]
    parser.add_argument("--models", nargs="+", default=models[:3], choices=models)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    dtypes = ["bfloat16", "float8", "float8 of x quantised ahead"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--kernels", nargs="+", default=["up", "down"], choices=["up", "down"])
    parser.add_argument("--experts", type=int, help="those of one GPU of several")
    args = parser.parse_args()
    with torch.inference_mode():
        for model, dtype in itertools.product(args.models, args.dtypes):
            if model == "gpt_oss" and dtype != "bfloat16":
                continue
            for T in args.tokens:
                sweep(model, T, dtype, args.experts, args.kernels)
                torch.cuda.empty_cache()


def sweep(model: str, T: int, dtype: str, experts: int | None, kernels: list[str]) -> None:
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
    print(f"{model} {dtype} T={T}: floor {floor:.2f} us", flush=True)

    def time(up: Any, down: Any) -> float:
        if fp8:
            q = moe.quant_fp8(x) if ahead else (x, None)
            calls = [
                functools.partial(
                    launch_few_fp8, *q, ids, weight, *w, out, x.dtype, Gate(), (1e-10, False),
                    up, down,
                )
                for weight, ids in pairs
            ]  # fmt: skip
        else:
            calls = [
                functools.partial(launch_few, x, ids, s, *w, out, *biases, gate, up, down)
                for s, ids in pairs
            ]
        return microseconds(calls * 2, 9)

    for replaced in (without_overlap, _overlap.overlap):
        for module in MODULES:
            module.overlap = replaced
        print(f"    {replaced.__name__}, blocks as chosen: {time(None, None):.2f} us", flush=True)
    up_of = _candidates.experts_up_fp8 if fp8 else _candidates.experts_up
    ups: Any = GATE_UP if fp8 and not ahead else up_of((), (), None)
    kind, sizes = (x.dtype, fp8, layer.K), (T, layer.F, layer.H)
    downs: Any = _candidates.experts_down(kind, sizes, None)
    if not layer.h_contiguous:
        ups = _candidates.experts_up_columns((), (), None)
        downs = _candidates.experts_down_columns((x.dtype, layer.K), sizes, None)
    for name in kernels:
        found = []
        for one in ups if name == "up" else downs:
            up, down = (one, None) if name == "up" else (None, one)
            try:
                found.append((time(up, down), tuple(one)))
            except Exception as error:
                print("   ", one, type(error).__name__)
        for us, one in sorted(found)[:6]:
            print(f"    {name} {us:8.2f} us {100 * floor / us:5.1f} %  {one}", flush=True)


def without_overlap(x: Tensor, size: int = 0) -> dict[str, bool]:
    return {"PDL": False}


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

if __name__ == "__main__":
    main()
