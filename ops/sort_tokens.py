"""Group (token, slot) pairs by expert: a stable counting sort that never leaves the device.

Pair r = t * K + j belongs to expert ids[t, j]. An id outside [0, E) is no expert: its pair is
unowned, comes last in `rows`, and has position -1.

Letters: T tokens, K experts per token, R = T * K rows, E experts.
Shapes: ids [T, K] -> rows [R], the pairs in order of their expert (pairs of one expert in order of
    r, unowned ones last, also in order); offsets [E], where each expert's pairs end in rows;
    position [T, K], where each pair is in rows, or -1. T may be 0.
Dtypes: ids int32 or int64; all three results int32.
Errors: ValueError if ids has not two dims or is not int32 or int64, or if num_experts < 1.
Source: counting sort, Knuth, The Art of Computer Programming 3, section 5.2, algorithms C and D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check, check_dims
from moe_compile.ops._cpu import sort_tokens_cpu
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous

# One H200, 128 experts, 2026-11-22: 2048 rows take 4.8 us in one launch and 7.0 in three. 8192 and
# 65536 rows take 7.7 and 12.7 us in blocks of 64, 8.5 and 13.6 in blocks of 128.
SMALL = 2048  # rows up to which counting all pairs, in one launch, is the faster way
BLOCK_R = 64  # rows of one program above that


def sort_tokens_reference(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `sort_tokens` means, in plain PyTorch."""
    ids_R = ids_TK.reshape(-1)
    owned_R = (ids_R >= 0) & (ids_R < num_experts)
    keys_R = torch.where(owned_R, ids_R, num_experts)
    sorted_R, rows_R = keys_R.sort(stable=True)
    experts_E = torch.arange(num_experts, device=ids_R.device, dtype=sorted_R.dtype)
    offsets_E = torch.searchsorted(sorted_R, experts_E, right=True)
    position_R = torch.empty_like(rows_R)
    position_R[rows_R] = torch.arange(rows_R.numel(), device=ids_R.device)
    position_R = torch.where(owned_R, position_R, -1)
    return rows_R.int(), offsets_E.int(), position_R.int().view(ids_TK.shape)


@triton.jit
def _load_keys(ids_ptr, rows, R, E):  # type: ignore[no-untyped-def]
    """The experts of some rows; E for a row of no expert, E + 1 past the last row."""
    ids = tl.load(ids_ptr + rows, mask=rows < R, other=0)
    keys = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(rows < R, keys, E + 1)


# Arguments that change with the number of tokens are not specialised on: it would compile again.
@triton.jit(do_not_specialize=["R"])
def _sort_tokens_small_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    rows_ptr,
    offsets_ptr,
    position_ptr,
    R,
    E,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rank by counting: (key, r) as one number orders the rows; how many are below is the rank.

    Items 0 .. R - 1 are the rows; item R + e is the end of expert e: how many have a key <= e.
    """
    wait_for_previous(PDL)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _load_keys(ids_ptr, item, R, E)
    is_row = item < R
    bound = tl.where(is_row, key * R + item, (item - R + 1) * R)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, R, CHUNK):
        other = start + tl.arange(0, CHUNK)
        number = _load_keys(ids_ptr, other, R, E) * R + other
        below = (number[None, :] < bound[:, None]) & (other < R)[None, :]
        rank += tl.sum(below.to(tl.int32), 1)
    tl.store(rows_ptr + rank, item, mask=is_row)
    tl.store(position_ptr + item, tl.where(key < E, rank, -1), mask=is_row)
    tl.store(offsets_ptr + item - R, rank, mask=(item >= R) & (item < R + E))


@triton.jit(do_not_specialize=["R", "num_blocks"])
def _count_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, counts_ptr, R, E, num_blocks, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts[e, block]: how many rows of the block have a key of e or less."""
    block = tl.program_id(0)
    keys = _load_keys(ids_ptr, block * BLOCK_R + tl.arange(0, BLOCK_R), R, E)
    counts = tl.cumsum(tl.histogram(keys, BLOCK_E), 0)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + experts * num_blocks + block, counts, mask=experts <= E)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(  # type: ignore[no-untyped-def]
    counts_ptr, starts_ptr, offsets_ptr, E, num_blocks, CHUNK: tl.constexpr
):
    """starts[e, block]: where the block's rows of expert e begin. One program for one expert.

    All smaller keys come first, and they are the sum of one row of the table of counts.
    """
    expert = tl.program_id(0)
    num_smaller = tl.where(expert > 0, num_blocks, 0)  # how much of the row of expert - 1 to read
    start = 0
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        mask = block < num_smaller
        start += tl.sum(tl.load(counts_ptr + (expert - 1) * num_blocks + block, mask=mask, other=0))
    for first in range(0, num_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        mask = block < num_blocks
        counts = tl.load(counts_ptr + expert * num_blocks + block, mask=mask, other=0)
        mask = block < num_smaller
        counts -= tl.load(counts_ptr + (expert - 1) * num_blocks + block, mask=mask, other=0)
        starts = start + tl.cumsum(counts, 0) - counts
        tl.store(starts_ptr + expert * num_blocks + block, starts, mask=block < num_blocks)
        start += tl.sum(counts)
    if expert < E:
        tl.store(offsets_ptr + expert, start)


@triton.jit(do_not_specialize=["R", "num_blocks"])
def _scatter_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, starts_ptr, rows_ptr, position_ptr, R, E, num_blocks, BLOCK_R: tl.constexpr
):
    """Rank = where this block's rows of the key begin + how many of them come before."""
    block = tl.program_id(0)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    key = _load_keys(ids_ptr, row, R, E)
    rank = tl.load(starts_ptr + key * num_blocks + block, mask=row < R, other=0)
    for start in range(0, BLOCK_R, 32):
        other = block * BLOCK_R + start + tl.arange(0, 32)
        same = key[:, None] == _load_keys(ids_ptr, other, R, E)[None, :]
        rank += tl.sum((same & (other[None, :] < row[:, None])).to(tl.int32), 1)
    tl.store(rows_ptr + rank, row, mask=row < R)
    tl.store(position_ptr + row, tl.where(key < E, rank, -1), mask=row < R)


def sort_tokens_triton(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one kernel up to SMALL rows, three above."""
    _check(ids_TK, num_experts)
    R, E = ids_TK.numel(), num_experts
    rows_R, offsets_E, position_TK = results = _fake(ids_TK, E)
    if R == 0:
        offsets_E.zero_()
        return results
    ids_TK = ids_TK.contiguous()
    if R <= SMALL and (E + 2) * R < 2**31:  # the kernel's numbers are int32
        BLOCK, CHUNK = 8, min(512, max(16, triton.next_power_of_2(R)))
        _sort_tokens_small_kernel[(triton.cdiv(R + E, BLOCK),)](
            ids_TK,
            rows_R,
            offsets_E,
            position_TK,
            R,
            E,
            BLOCK=BLOCK,
            CHUNK=CHUNK,
            **overlap(ids_TK),
        )
        return results
    num_blocks, BLOCK_E = triton.cdiv(R, BLOCK_R), triton.next_power_of_2(E + 2)
    counts, starts = (rows_R.new_empty(E + 1, num_blocks) for _ in range(2))
    _count_kernel[(num_blocks,)](ids_TK, counts, R, E, num_blocks, BLOCK_R=BLOCK_R, BLOCK_E=BLOCK_E)
    _scan_kernel[(E + 1,)](counts, starts, offsets_E, E, num_blocks, CHUNK=1024)
    _scatter_kernel[(num_blocks,)](
        ids_TK, starts, rows_R, position_TK, R, E, num_blocks, BLOCK_R=BLOCK_R
    )
    return results


def _check(ids_TK: Tensor, num_experts: int) -> None:
    check_dims("sort_tokens", "ids", ids_TK, "[T, K]")
    is_index = ids_TK.dtype in (torch.int32, torch.int64)
    check(is_index, "sort_tokens", "ids in int32 or int64", ids_TK.dtype)
    check(num_experts >= 1, "sort_tokens", "num_experts >= 1", num_experts)


def _fake(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids_TK, num_experts)
    T, K = ids_TK.shape
    rows_R = ids_TK.new_empty(T * K, dtype=torch.int32)
    offsets_E = ids_TK.new_empty(num_experts, dtype=torch.int32)
    return rows_R, offsets_E, ids_TK.new_empty(T, K, dtype=torch.int32)


def _cpu(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check(ids_TK, num_experts)
    return sort_tokens_cpu(ids_TK, num_experts) or sort_tokens_reference(ids_TK, num_experts)


sort_tokens = define(
    "sort_tokens(Tensor ids, int num_experts) -> (Tensor rows, Tensor offsets, Tensor position)",
    cpu=_cpu,
    cuda=sort_tokens_triton,
    fake=_fake,
)
