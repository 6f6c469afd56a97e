"""The blocks of `attend`'s kernels."""

from typing import NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """Rows and positions of a step, programs that share a head's positions, how Triton compiles."""

    rows: int
    positions: int
    splits: int
    warps: int
    stages: int


_PROGRAMS = 264  # two for each of the 132 SMs of an H100 or H200
_MOST_SPLITS = 128


def choose_blocks(heads: int, rows: int, S: int, features: int, dtype: torch.dtype) -> Blocks:
    """Blocks for B * G key heads of so many rows, whose keys and values together have so many
    features. By what fits the registers and the shared memory; not measured yet."""
    is_float32 = dtype == torch.float32  # without tensor cores: twice the threads for the products
    block_r = 16 if is_float32 else min(64, max(16, triton.next_power_of_2(rows)))
    wanted = triton.cdiv(_PROGRAMS, heads * triton.cdiv(rows, block_r))
    position_bytes = features * dtype.itemsize
    positions = 64 if position_bytes <= 1024 and wanted * 64 <= S else 32
    num_blocks = triton.cdiv(S, positions)
    steps = triton.cdiv(num_blocks, min(wanted, _MOST_SPLITS))
    splits = triton.cdiv(num_blocks, steps)  # no more than make as many steps each
    stages = 3 if steps > 1 and positions * position_bytes <= 2**15 else 2
    return Blocks(block_r, positions, splits, 8 if is_float32 else 4, stages)
