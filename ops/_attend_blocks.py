"""The blocks of `attend`'s kernels."""

import functools
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


HOPPER = 227 * 1024  # bytes of shared memory that a program may have
WIDE = 256  # features of values; of more, sums take a program's registers, and splits' memory
_SMS = 132  # of an H100 or H200
_MOST_SPLITS = 128


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; of a Hopper in the interpreter."""
    if device.type != "cuda":
        return HOPPER
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


def choose_blocks(
    heads: int,
    rows: int,
    S: int,
    features: int,
    dtype: torch.dtype,
    width: int = 0,
    shared_memory: int = HOPPER,
) -> Blocks:
    """Blocks for B * G key heads of so many rows, whose keys and values together have so many
    features, width of them values. By what fits the registers and the shared memory; not measured
    yet."""
    is_float32 = dtype == torch.float32  # without tensor cores: twice the threads for the products
    block_r = 16 if is_float32 else min(64, max(16, triton.next_power_of_2(rows)))
    if width > WIDE:
        block_r = min(block_r, _wide_rows(heads * S, shared_memory))
    unsplit = heads * triton.cdiv(rows, block_r)
    wanted = triton.cdiv(2 * _SMS, unsplit)
    if width > WIDE:  # a program takes the registers of an SM: one more waits for all others
        wanted = max(1, _SMS // unsplit)
    position_bytes = features * dtype.itemsize
    positions = 64 if position_bytes <= 1024 and wanted * 64 <= S else 32
    if position_bytes > 2048:
        positions = 16
    num_blocks = triton.cdiv(S, positions)
    steps = triton.cdiv(num_blocks, min(wanted, _MOST_SPLITS))
    splits = triton.cdiv(num_blocks, steps)  # no more than make as many steps each
    stages = 3 if steps > 1 and positions * position_bytes <= 2**15 else 2
    return Blocks(block_r, positions, splits, 8 if is_float32 or width > WIDE else 4, stages)


def _wide_rows(positions: int, shared_memory: int) -> int:
    """Rows of a program with wide values, for so many positions of all heads together.

    Few rows make many programs without splits, each of which stores sums as wide as the values.
    Many read the keys fewer times, and Hopper multiplies 64 at once.
    """
    if positions <= 2048:
        return 16
    return 64 if positions >= 8192 and shared_memory >= HOPPER else 32
