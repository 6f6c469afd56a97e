"""Blocks worth measuring for a launch, by its kind and sizes (`_tuned_kernels.py`).

Each list is what sweeps on a H200 left of more (benchmarks/sweep_*.py). Some of it may not fit the
shared memory of another GPU, or of another dtype: who measures leaves that out.
"""

import itertools
from typing import Any

import torch

from moe_compile.ops._attend_blocks import WIDE
from moe_compile.ops._attend_blocks import Blocks as AttendBlocks
from moe_compile.ops._experts_columns_kernel import ColumnsBlocks
from moe_compile.ops._experts_kernel import FewBlocks
from moe_compile.ops._grouped_mm_blocks import Blocks as GroupedBlocks
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS_OF_SUMS
from moe_compile.ops._skinny_mm_kernel import Blocks as SkinnyBlocks
from moe_compile.ops._tuned import Kind, Sizes

# A warp reads 256 of K at once. One stage leaves the order of loads to ptxas.
_SUMS = [
    SkinnyBlocks(n, 256 * w, False, w, s)
    for n, found in {
        1: [(2, 4), (4, 4), (8, 1), (8, 3), (8, 4)],
        2: [(2, 6), (4, 4), (8, 1), (8, 3), (8, 4)],
        4: [(1, 6), (2, 4), (2, 6), (4, 1), (4, 3), (4, 4), (8, 1), (8, 2), (8, 3), (8, 4)],
        8: [(1, 5), (2, 3), (2, 4), (2, 5), (4, 1), (4, 3), (4, 4), (8, 1), (8, 2), (8, 3)],
        16: [(1, 4), (2, 3), (2, 4), (4, 2), (4, 3), (8, 1)],
    }.items()
    for w, s in found
]
_DOT = [
    SkinnyBlocks(n, k, True, w, s)
    for n, found in {
        8: [(128, 1, 8), (256, 1, 5), (256, 2, 4), (256, 4, 4), (512, 4, 3), (512, 4, 4)],
        16: [(128, 2, 5), (128, 2, 8), (256, 2, 3), (256, 2, 4), (256, 4, 3), (256, 4, 4)],
        32: [(64, 4, 6), (128, 2, 4), (128, 4, 3), (128, 4, 4), (128, 4, 5), (256, 4, 3)],
        64: [(64, 4, 5), (128, 4, 3), (128, 4, 4), (128, 8, 4)],
    }.items()
    for k, w, s in found
]
_DOT += [SkinnyBlocks(n, k, True, w, 3) for n, k, w in [(8, 1024, 8), (16, 512, 4), (32, 256, 8)]]
# Weights stored [K, N].
_SUMS_N = [
    SkinnyBlocks(n, k, False, w, s)
    for n, found in {
        16: [(128, 4, 4), (256, 8, 3), (128, 8, 4)],
        32: [(32, 2, 5), (64, 4, 3), (64, 4, 5), (128, 8, 4)],
        64: [(16, 2, 5), (32, 4, 3), (32, 4, 5), (64, 8, 4)],
    }.items()
    for k, w, s in found
]
_DOT_N = [
    SkinnyBlocks(n, k, True, w, s)
    for n, found in {
        16: [(64, 4, 5), (128, 4, 4), (256, 4, 3)],
        32: [(64, 2, 5), (64, 4, 5), (128, 4, 4)],
        64: [(32, 4, 6), (64, 4, 4), (64, 4, 5), (128, 4, 4)],
    }.items()
    for k, w, s in found
]


def skinny_mm(kind: Kind, sizes: Sizes, analytic: SkinnyBlocks) -> list[SkinnyBlocks]:
    """Those whose programs can occupy the GPU and whose depth is not all padding."""
    (rows, dtype, k_contiguous), (K, *Ns) = kind, sizes
    sums, dot = (_SUMS, _DOT) if k_contiguous else (_SUMS_N, _DOT_N)
    found = sums if rows <= MOST_ROWS_OF_SUMS else []
    if rows > 1 and dtype != torch.float32:  # which tensor cores would round to TF32
        found = found + dot
    return [b for b in found if b.k < 2 * K and sum(Ns) >= 8 * b.n]


def attend(kind: Kind, sizes: Sizes, analytic: AttendBlocks) -> list[AttendBlocks]:
    """Some 24 blocks whose programs fill up to two of the machine."""
    (_, _, D, F, *_), (heads, S) = kind, sizes
    if (F or D) > WIDE:
        return _attend_wide(kind, sizes, analytic)
    found = set()
    counts = [n for n in (1, 2, 4, 8, 10, 16, 20, 32, 64) if 16 <= n * heads <= 300] or [1]
    for positions in 32, 64:
        num_blocks = -(-S // positions)
        for splits in sorted({min(n, num_blocks) for n in counts})[-3:]:
            one_step = splits == num_blocks
            for warps, stages in itertools.product((1, 2, 4) if one_step else (2, 4), (2, 3)):
                if stages == 2 or not one_step:
                    found.add(AttendBlocks(analytic.rows, positions, splits, warps, stages))
    return sorted(found)


def _attend_wide(kind: Kind, sizes: Sizes, analytic: AttendBlocks) -> list[AttendBlocks]:
    """Values of many features: their sums take the registers of 8 warps, or of 4 for 16 rows."""
    (repeats, Q, _, _, _, dtype, _), (heads, S) = kind, sizes
    found = set()
    for rows in (16,) if dtype == torch.float32 else (16, 32, 64):
        programs, num_blocks = heads * -(-repeats * Q // rows), -(-S // analytic.positions)
        counts = [n for n in (1, 2, 4, 8, 10, 16, 20, 32, 64) if 32 <= n * programs <= 300] or [1]
        for splits in sorted({min(n, num_blocks) for n in counts})[-3:]:
            for stages in (2,) if splits == num_blocks else (2, 3):
                for warps in (4, 8) if rows == 16 else (8,):
                    found.add(AttendBlocks(rows, analytic.positions, splits, warps, stages))
    return sorted(b for b in found if b.rows < 2 * max(16, repeats * Q))


_UP = [
    GroupedBlocks(1, n, k, 1, w, s)
    for n, k, w, s in [
        *[(16, 256, 4, 3), (16, 256, 2, 3), (16, 256, 4, 1), (8, 256, 2, 3), (8, 512, 4, 3)],
        *[(8, 1024, 8, 2), (4, 512, 2, 3), (4, 1024, 4, 1), (16, 512, 8, 3)],
    ]
]
# Of columns that are contiguous nothing is measured yet: 4 to 16 KB of weights at a time.
_UP_COLUMNS = [
    ColumnsBlocks(n, elements // (2 * n), w, s)
    for n, (elements, w, s) in itertools.product(
        (16, 32, 64), [(2048, 2, 4), (2048, 4, 6), (4096, 4, 3), (4096, 4, 4), (8192, 8, 3)]
    )
]
_UP_FP8 = [
    GroupedBlocks(m, n, 0, 1, w, s)
    for m, n, w, s in [
        *[(16, 64, 4, 4), (16, 64, 4, 6), (16, 32, 2, 6), (16, 32, 4, 6)],
        *[(1, 16, 2, 3), (1, 16, 2, 1), (1, 32, 4, 3), (1, 8, 2, 3)],
    ]
]
_DOWN = [
    FewBlocks(*b)
    for b in [
        *[(256, o, w, s) for o, w, s in itertools.product((4, 8), (4, 8), (1, 2, 3))],
        *[(256, 2, 4, 1), (256, 2, 2, 2), (256, 16, 8, 2), (128, 8, 4, 3), (128, 16, 4, 3)],
        *[(512, 8, 4, 3), (512, 8, 8, 3), (512, 4, 4, 3), (1024, 4, 4, 3), (1024, 4, 8, 3)],
    ]
]
_DOWN_FP8 = [
    FewBlocks(*b)
    for b in [
        *[(128, o, w, s) for o, w, s in itertools.product((4, 8, 16), (2, 4), (1, 3))],
        *[(256, 8, 4, 3), (256, 16, 8, 3), (512, 8, 4, 3), (512, 4, 4, 3), (1024, 4, 4, 3)],
    ]
]
# On tensor cores: groups of all experts in one step, columns, warps, stages.
_DOWN_DOTS = [(8, 16, w, s) for w, s in [(4, 3), (4, 4), (4, 6), (8, 4), (8, 6)]]
_DOWN_DOTS += [(4, 16, 4, 6), (16, 16, 4, 3), (16, 16, 8, 3), (16, 16, 8, 4), (8, 8, 4, 6)]
_DOWN_DOTS += [(8, 32, 4, 3), (8, 32, 8, 3), (8, 32, 8, 4)]
_DOWN_COLUMNS = [(4096, 4, 4), (4096, 4, 6), (8192, 4, 4), (8192, 8, 4), (8192, 8, 6)]
_DOWN_COLUMNS += [(16384, 8, 3)]


def experts_up(kind: Kind, sizes: Sizes, analytic: Any) -> list[GroupedBlocks]:
    return _UP


def experts_up_columns(kind: Kind, sizes: Sizes, analytic: Any) -> list[ColumnsBlocks]:
    return _UP_COLUMNS


def experts_up_fp8(kind: Kind, sizes: Sizes, analytic: Any) -> list[GroupedBlocks]:
    return _UP_FP8


def experts_down(kind: Kind, sizes: Sizes, analytic: Any) -> list[FewBlocks]:
    return _DOWN_FP8 + experts_down_dots(kind[2]) if kind[1] else _DOWN


def experts_down_dots(K: int) -> list[FewBlocks]:
    experts = 1 << (K - 1).bit_length()
    found = [(128 * g // experts, o, w, s) for g, o, w, s in _DOWN_DOTS if g >= experts]
    return [FewBlocks(f, o, w, s, True) for f, o, w, s in found]


def experts_down_columns(kind: Kind, sizes: Sizes, analytic: Any) -> list[ColumnsBlocks]:
    """Elements of all K weights at a time, and so many columns."""
    found = set()
    for n, (elements, w, s) in itertools.product((16, 32, 64), _DOWN_COLUMNS):
        k = elements // (n << (kind[1] - 1).bit_length())
        found.add(ColumnsBlocks(n, max(16, k), w, s))
    return sorted(found)


# One row in a tile, without tensor cores; by whether the weight is contiguous along H.
_ONE = {
    True: [
        *itertools.product([(16, 256, 4), (8, 256, 2), (16, 256, 2)], (1, 3)),
        *itertools.product([(4, 512, 2), (8, 512, 4), (16, 512, 4), (16, 512, 8)], (1, 3)),
        *itertools.product([(4, 1024, 4), (8, 1024, 4), (8, 1024, 8)], (1, 2)),
    ],
    False: [
        *itertools.product([(64, 32, 2), (64, 64, 4), (64, 128, 4)], (1, 3)),
        *itertools.product([(128, 32, 4), (128, 64, 8)], (1, 3)),
    ],
}
_FEW = {
    True: [
        *[(32, 64, 2, 4), (32, 64, 2, 6), (32, 64, 2, 8), (32, 64, 1, 6), (32, 64, 4, 6)],
        *[(32, 128, 1, 4), (32, 128, 2, 5), (32, 128, 4, 5), (32, 256, 4, 3)],
        *[(64, 64, 2, 5), (64, 64, 4, 5), (64, 128, 2, 4), (64, 128, 4, 3), (64, 128, 4, 4)],
        *[(64, 256, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3)],
    ],
    False: [
        *[(64, 64, 2, 5), (64, 64, 4, 5), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4)],
        *[(64, 32, 2, 8), (128, 64, 4, 4), (128, 32, 4, 6), (128, 128, 8, 3), (256, 32, 8, 5)],
    ],
}
_UP_TO_16_ROWS = {
    h_contiguous: [
        *(GroupedBlocks(1, *nkw[:2], 1, nkw[2], s) for nkw, s in _ONE[h_contiguous]),
        *(GroupedBlocks(16, n, k, 1, w, s) for n, k, w, s in _FEW[h_contiguous]),
    ]
    for h_contiguous in (True, False)
}
_SOME = [
    *(GroupedBlocks(16, n, k, 1, 4, 4) for n, k in [(64, 128), (128, 64)]),
    *(GroupedBlocks(32, n, k, 4, 4, 4) for n, k in [(64, 128), (128, 64)]),
    *(GroupedBlocks(64, n, k, 4, 4, 4) for n, k in [(64, 128), (128, 64)]),
    *(GroupedBlocks(64, *b) for b in [(128, 128, 4, 4, 3), (256, 64, 4, 8, 4)]),
    *(GroupedBlocks(128, n, 64, 4, 8, 3) for n in (128, 256)),
]
_MANY = [
    *(GroupedBlocks(128, 256, 64, g, 8, s) for g in (4, 8, 12, 16) for s in (3, 4)),
    *(GroupedBlocks(128, 128, 64, g, 8, s) for g in (8, 16) for s in (3, 4)),
]
_FP8 = {  # by the rows of an expert, up to
    16: [
        *(
            GroupedBlocks(1, n, 0, 1, w, s)
            for (n, w), s in itertools.product([(8, 2), (16, 2), (16, 4), (32, 4)], (1, 3))
        ),
        *(GroupedBlocks(16, n, 0, 1, w, s) for n, w, s in [(32, 2, 6), (32, 4, 6), (64, 4, 4)]),
        *(GroupedBlocks(16, n, 0, 1, w, s) for n, w, s in [(64, 2, 5), (64, 4, 6), (128, 4, 4)]),
        *(GroupedBlocks(32, n, 0, 4, 4, s) for n, s in [(64, 4), (128, 3), (128, 4)]),
    ],
    128: [
        *(GroupedBlocks(32, n, 0, 4, w, 4) for n, w in [(64, 4), (128, 4), (128, 8)]),
        *(GroupedBlocks(64, n, 0, 4, w, 4) for n, w in [(64, 4), (128, 4), (128, 8)]),
        *(GroupedBlocks(128, n, 0, 4, 8, s) for n, s in [(64, 4), (128, 3), (128, 4)]),
    ],
    2**31: [
        *(GroupedBlocks(128, 128, 0, g, 8, s) for g in (4, 8, 16) for s in (3, 4, 5)),
        *(GroupedBlocks(64, 128, 0, g, 4, 4) for g in (8, 16)),
    ],
}


def grouped_mm(kind: Kind, sizes: Sizes, analytic: Any) -> list[GroupedBlocks]:
    """By the mean rows of an expert."""
    h_contiguous, (R, E) = kind[1], sizes[:2]
    if R > 128 * E:
        return _MANY
    if R > 16 * E:
        return _SOME
    return _UP_TO_16_ROWS[h_contiguous] + (_SOME[2:4] if R > 2 * E else [])


def grouped_mm_fp8(kind: Kind, sizes: Sizes, analytic: Any) -> list[GroupedBlocks]:
    R, E = sizes[:2]
    return next(found for most, found in _FP8.items() if most * E >= R)
