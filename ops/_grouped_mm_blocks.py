"""The blocks of the grouped products: rows, columns and depth of one program, and why.

What the host knows without waiting decides: rows, experts, sizes, dtype and layout, not how many
rows an expert has. Where `warmup(tune=True)` measured others for a launch, those are taken.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Blocks(NamedTuple):
    """Rows, columns and depth of one program, tiles that share L2, and how Triton compiles it."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


_DEEP = 4096  # so deep a product gains from more loads on the way, a shallower one from less delay


def choose_blocks(R: int, E: int, H: int, dtype: torch.dtype, h_contiguous: bool) -> Blocks:
    """Blocks for R rows over E experts and a depth of H.

    The numbers are microseconds on one H200 (torch 2.11, Triton 3.6, 2026-11-22, bfloat16) by
    benchmarks/sweep_grouped_mm.py: gate+up, then down. Roofs then: 4.64 TB/s, 723 TFLOP/s.
    """
    # Twice the mean rows of an expert: a tile too low reads a whole weight again. Mixtral, T = 64,
    # a mean of 16: 431 with m = 32, 592 with m = 16.
    m = min(128, max(16, triton.next_power_of_2(triton.cdiv(2 * R, E))))
    if h_contiguous and (8 * R <= E or (dtype == torch.float32 and m == 16)):
        # One row: Qwen3-30B-A3B, T = 1, 15.4 and 9.4 (72 and 59 % of the roof), T = 4, 46.1 and
        # 26.8, with tiles 44.5 and 25.2. Rows that share an expert read it again from L2: Mixtral,
        # T = 4, 419 and 175, not 288 and 149. In float32 the tensor cores don't help: there 827 and
        # 364, not 2965 and 1718.
        return Blocks(1, 16, 256, 1, 2, 3)
    if dtype == torch.float32:  # true float32 runs on the CUDA cores
        return Blocks(min(m, 64), 64, 32, 8, 8 if m >= 64 else 4, 3)
    if m <= 32 and not h_contiguous:
        # gpt-oss-120b: T = 1, 34.8 and 19.2 (82 and 74 % of the roof); T = 16, 370 and 190 (98 and
        # 96 %). n = 128, k = 64 is 33.3 and 20.9 at T = 1, and no faster at T = 16.
        return Blocks(m, 64, 128, 1 if m == 16 else 4, 4, 4)
    if m == 16 and H < _DEEP:
        # Qwen3, T = 16, 117 and 62.2, T = 64, 180 and 94.3; k = 128 with 3 stages 116 and 64.0, 179
        # and 94.6, with 4 119 and more, 180 and more.
        return Blocks(16, 64, 64, 1, 4, 5)
    if m <= 32:
        # Mixtral (see `swaps`): T = 16, 98 and 97 % of the roof, T = 64, 97 %. With 3 stages the
        # first product is 1 us faster, the second 4 us slower. An expert with all 64 tokens is two
        # tiles: routed by a Zipf law 440 and 242, with m = 64 434 and 216; evenly 435 and 216.
        return Blocks(m, 64, 128, 1 if m == 16 else 4, 4, 4)
    if m == 64:
        # DeepSeek-V3, T = 1024: 3502 and 1803 (93 and 90 %); n = 256 with 8 warps 3511 and 1816.
        return Blocks(64, 128, 64, 4, 4, 4)
    if R < 128 * E:
        # Qwen3, T = 1024, a mean of 64: 222 and 129; n = 256: 226 and 133; m = 64: 234 and 129.
        return Blocks(128, 128, 64, 4, 8, 3)
    # T = 8192: Mixtral 7137 and 3191 (75 and 83 %), DeepSeek-V3 8514 and 4484 (63 and 59 %).
    return Blocks(128, 256, 64, 8, 8, 3)


def swaps(blocks: Blocks, w_EHG: Tensor) -> bool:
    """Is a tile better computed as w.T @ x.T?

    Hopper's tensor cores read both sides from shared memory, if the left one has 64 rows: columns
    of w are that many where rows of x are not. Else operands pass through registers, where float8
    becomes float16. One H200, 2026-11-22, us, swapped and not, the best blocks of each: Mixtral,
    float8, T = 64, gate+up with silu_mul 229 and 242, down 118 and 121; T = 16 217 and 224, 113 and
    119; DeepSeek-V3 215 and 225; in bfloat16 Mixtral 432 and 435, 216 and 221; 424 and 427, 214 and
    218.
    """
    few = 1 < blocks.m <= 32 and blocks.n >= 64 and blocks.warps >= 4
    return few and w_EHG.stride(1) == 1 and w_EHG.dtype != torch.float32


def choose_blocks_fp8(R: int, E: int, H: int, G: int) -> Blocks:
    """Blocks for R rows over E experts, a depth of H and G columns; k is the scales' group.

    The numbers are microseconds on one H200 (torch 2.11, Triton 3.6, 2026-11-22) by
    `sweep_grouped_mm.py --dtype float8_e4m3fn`: gate+up, then down. Roofs then: 4.49 TB/s,
    715 TFLOP/s bfloat16.
    """
    m = min(64, max(16, triton.next_power_of_2(triton.cdiv(2 * R, E))))
    if m == 16 and R * triton.cdiv(G, 64) <= 132:
        # Too few programs to fill the machine: Mixtral, T = 1, down 40.8; with n = 64, 48.8.
        return Blocks(16, 32, 0, 1, 4, 6)
    if m == 16 and H < _DEEP:
        # Qwen3, T = 4, 25.8 and 14.1, T = 16, 62.7 and 34.1, T = 64, 95.6 and 50.7; n = 64 with 5
        # stages 26 and 15.1, 62.8 and 36, 96.2 and more than 52.1.
        return Blocks(16, 128, 0, 1, 4, 3)
    if m == 16:
        # T = 16 (see `swaps`): Mixtral 217 and 113 (96 and 92 % of the roof; 3 or 6 stages 218 to
        # 221 and 114 to 117), DeepSeek-V3 with 32 experts 215 (96 %).
        return Blocks(16, 64, 0, 1, 4, 5)
    if m == 32:
        # T = 64, evenly and by a Zipf law: Mixtral's second 117 and 120, DeepSeek-V3 225 and 119,
        # 227 and 124; n = 64 with 4 stages 113 and 153, 219 and 121, 238 and 126 (Mixtral's first
        # 224 and 234, here 226 and 236).
        return Blocks(32, 128, 0, 4, 4, 3)
    if R < 128 * E:
        # T = 1024: Qwen3 136 and 84 (m = 128: 166 and 110), DeepSeek-V3 1836 and 954 (2437, 1350).
        return Blocks(64, 128, 0, 4, 4, 4)
    if R < 1024 * E:
        # T = 8192: Qwen3 624 and 390 (m = 128: 662, 437), DeepSeek-V3 5813 and 2981 (5795, 3306).
        return Blocks(64, 128, 0, 16, 4, 4)
    # Mixtral, T = 8192: 5170 and 2430 (52 and 55 % of the roof).
    return Blocks(128, 128, 0, 8, 8, 4)
