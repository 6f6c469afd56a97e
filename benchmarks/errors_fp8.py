"""How far each float8 op and a whole layer are from float64: the same table on CPU and GPU.

    python benchmarks/errors_fp8.py [--device cuda]

Relative errors by RMS and by maximum (of the largest exact value). Ops are measured against float64
on their very own inputs; the layer against float64 with the same float8 weights and activations
that are not quantised at all, beside the same layer in bfloat16 with the weights dequantised.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from _results import FOLDER, write
from torch import Tensor

from moe_compile.ops import moe
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize
from moe_compile.ops.grouped_mm_fp8 import grouped_mm_fp8_reference
from moe_compile.quantization import quantize_weight

T, E, K = 24, 8, 2
SHAPES = {"Qwen3-30B-A3B": (2048, 768), "DeepSeek-V3, a quarter": (1792, 512), "odd": (328, 200)}


def errors(got: Tensor, exact: Tensor) -> dict[str, str]:
    err = got.double() - exact
    rms = (err.pow(2).mean() / exact.pow(2).mean()).sqrt().item()
    return {"rms": f"{rms:.2e}", "max": f"{(err.abs().max() / exact.abs().max()).item():.2e}"}


def layer(x: Tensor, w: Any, ids: Tensor, weights: Tensor) -> dict[str, dict[str, str]]:
    """Each op on what the ones before gave it."""
    rows, offsets, position = moe.sort_tokens(ids, E)
    (w1, s1), (w2, s2) = w
    q, scale = moe.quant_fp8(x)
    found = {"quant_fp8": errors(dequantize(q, scale, 1, 128, torch.float64), x.double())}
    given = (q, scale, w1, s1, offsets, rows, K)
    h = moe.grouped_mm_fp8(*given)
    exact = grouped_mm_fp8_reference(*given, dtype=torch.float64)
    found["grouped_mm_fp8, gate and up"] = errors(h, exact)
    gate, up = h.double().chunk(2, 1)
    a = moe.silu_mul_quant(h)
    act = torch.nn.functional.silu(gate) * up
    found["silu_mul_quant"] = errors(dequantize(*a, 1, 128, torch.float64), act)
    given = (*a, w2, s2, offsets)
    y = moe.grouped_mm_fp8(*given)
    exact = grouped_mm_fp8_reference(*given, dtype=torch.float64)
    found["grouped_mm_fp8, down"] = errors(y, exact)
    out = moe.combine(y, position, weights, dtype=x.dtype)
    wide = [dequantize(v, s, 128, 128, torch.float64) for v, s in w]
    exact = whole(x.double(), wide, ids, weights.double())
    found["layer"] = errors(out, exact)
    found["layer in bfloat16"] = errors(
        whole(x, [v.to(x.dtype) for v in wide], ids, weights), exact
    )
    return found


def whole(x: Tensor, w: list[Tensor], ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, (experts, shares) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            gate, up = (x[t] @ w[0][e]).chunk(2)
            out[t] += share.to(x.dtype) * ((torch.nn.functional.silu(gate) * up) @ w[1][e])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    table = []
    for name, (H, F) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator).to(options.device)

        w = []
        for G, D in ((2 * F, H), (H, F)):
            q, scale = quantize_weight(random(E, G, D) / D**0.5)
            w.append((q.transpose(1, 2), scale.transpose(1, 2)))
        ids = random(T, E).topk(K, -1).indices
        weights = random(T, K).softmax(-1)
        with torch.no_grad():
            found = layer(random(T, H).bfloat16(), w, ids, weights)
        for op, error in found.items():
            table.append({"shape": name, "hidden": H, "features": F, "op": op, **error})
            print(table[-1])
    write(table, "errors_fp8", options.out)


if __name__ == "__main__":
    main()
