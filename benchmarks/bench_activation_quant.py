"""Activation and quantisation in one kernel, beside torch.compile and the roof, on a GPU.

    python benchmarks/bench_activation_quant.py [--sweep]

Rows [R, 2I] in bfloat16 become float8 [R, I] with a scale for each 128: `silu_mul_quant`, and the
same in plain PyTorch compiled by Inductor. The roof is a kernel that reads four bytes and writes
one, as they do, measured in the same run at the same size. Medians of CUDA-graph replays over
several inputs, so that small ones come from memory. --sweep tries blocks for `choose_block`.
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from _results import FOLDER, write
from bench_ops import microseconds
from torch import Tensor

from moe_compile.ops import _quant_kernel, moe
from moe_compile.ops.silu_mul_quant import silu_mul_quant_reference, silu_mul_quant_triton

SIZES = [*itertools.product((8, 64, 512, 8192, 65536), (768, 2048, 14336)), (16384, 14336)]


@triton.jit
def _four_to_one_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < N, other=0)
    tl.store(y_ptr + place, x.to(tl.int8), mask=place < N)


def four_to_one(x: Tensor, y: Tensor) -> None:
    grid = (triton.cdiv(y.numel(), 4096),)
    _four_to_one_kernel[grid](x.view(torch.int32), y, y.numel(), BLOCK=4096, num_warps=4)


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """As a model writes it: bfloat16 after the silu and after the product."""
    gate, up = x.chunk(2, -1)
    y = (torch.nn.functional.silu(gate) * up).view(x.shape[0], -1, 128).float()
    scale = y.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    q = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.view(x.shape[0], -1), scale[..., 0]


def measure(R: int, F: int, sweep: bool) -> list[dict[str, Any]]:
    size = 5 * R * F + 4 * R * F // 128
    count = max(2, min(16, 2**28 // size))
    xs = [torch.randn(R, 2 * F, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    ys = [torch.empty(R * F, device="cuda", dtype=torch.int8) for _ in range(count)]
    if R * F < 2**22:  # a graph of many, so that its own start is no part of the time
        xs, ys = xs * 8, ys * 8
    roof = microseconds([functools.partial(four_to_one, x, y) for x, y in zip(xs, ys, strict=True)])
    row = {"rows": R, "I": F, "roof us": round(roof, 2), "roof GB/s": round(5 * R * F / roof / 1e3)}
    if sweep:
        return sweep_blocks(xs, row)
    check(xs[0][:256])
    torch._dynamo.reset()  # else the peer runs uncompiled from the ninth size on
    fns = {"moe_compile": moe.silu_mul_quant, "torch.compile": torch.compile(plain, dynamic=False)}
    rows = []
    for name, fn in fns.items():
        us = microseconds([functools.partial(fn, x) for x in xs])
        times = {"us": round(us, 2), "percent of roof": round(100 * roof / us, 1)}
        rows.append({**row, "peer": name, **times, "GB/s": round(size / us / 1e3)})
    return rows


def sweep_blocks(xs: list[Tensor], row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    kept = _quant_kernel.choose_block
    shapes = [(1, 128, 1), (1, 256, 1), (1, 256, 2), (1, 512, 2), (1, 1024, 2), (1, 1024, 4)]
    shapes += [(2, 512, 2), (2, 1024, 4), (2, 1024, 8), (4, 256, 2), (4, 256, 4), (4, 512, 4)]
    shapes += [(4, 1024, 8), (8, 256, 4), (8, 256, 8), (1, 2048, 4)]
    for block in shapes:
        _quant_kernel.choose_block = lambda *_, block=block: block
        us = microseconds([functools.partial(silu_mul_quant_triton, x) for x in xs], 9)
        found.append({**row, "rows, columns, warps": block, "us": round(us, 2)})
    _quant_kernel.choose_block = kept
    return sorted(found, key=lambda r: r["us"])[:5]


def check(x: Tensor) -> None:
    q, scale = moe.silu_mul_quant(x)
    q_want, scale_want = silu_mul_quant_reference(x)
    torch.testing.assert_close(scale, scale_want, rtol=1e-5, atol=0)
    assert (q.float() != q_want.float()).float().mean() < 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for R, F in SIZES:
            new = measure(R, F, options.sweep)
            rows += new
            print(*new, sep="\n", flush=True)
            torch.cuda.empty_cache()
            if not options.sweep:
                write(rows, "activation_quant", options.out)


if __name__ == "__main__":
    main()
