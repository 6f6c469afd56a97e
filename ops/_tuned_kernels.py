"""The kernels whose blocks may be measured, with what their launches are told apart by.

Each `chosen(device, kind, sizes, ...)` is called with these; `_scratch.py` makes inputs of them.

kernel                kind                                               sizes
skinny_mm             rows compiled, dtype, K contiguous                 K, N of each weight
attend                heads a key head, Q, D, F or 0, U, dtype, mask     B * G, S
experts_up            dtype, gate and up interleaved, K                  R, H, G
experts_up_columns    dtype, gate and up interleaved, K                  R, H, G
experts_up_fp8        dtype, group of x's scales, K                      R, H, G
experts_down          dtype, float8, K                                   T, F, C
experts_down_columns  dtype, K                                           T, F, C
grouped_mm            dtype, H contiguous, gate, K or 0 without rows     R, E, H, G
grouped_mm_fp8        dtype, group of x's scales, gate, K or 0, dense    R, E, H, G
"""

from typing import Any

from moe_compile.ops._tuned import Sizes, Tuned


def _is_not_all_padding(sizes: Sizes, blocks: Any) -> bool:
    return bool(blocks.k < 2 * sizes[0])


def _has_a_block_for_each_split(sizes: Sizes, blocks: Any) -> bool:
    return bool(blocks.splits <= -(-sizes[1] // blocks.positions))


SKINNY_MM = Tuned("skinny_mm", "_skinny_mm_kernel.py", _is_not_all_padding)
ATTEND = Tuned("attend", "_attend_kernel.py", _has_a_block_for_each_split)
EXPERTS_UP = Tuned("experts_up", "_grouped_mm_kernel.py")
EXPERTS_UP_COLUMNS = Tuned("experts_up_columns", "_experts_columns_kernel.py")
EXPERTS_DOWN_COLUMNS = Tuned("experts_down_columns", "_experts_columns_kernel.py")
EXPERTS_UP_FP8 = Tuned("experts_up_fp8", "_grouped_mm_fp8_kernel.py")
EXPERTS_DOWN = Tuned("experts_down", "_experts_kernel.py")
GROUPED_MM = Tuned("grouped_mm", "_grouped_mm_kernel.py")
GROUPED_MM_FP8 = Tuned("grouped_mm_fp8", "_grouped_mm_fp8_kernel.py")
