"""What the kernels of attention share: sums relative to the highest score so far, and their end.

A program has, for each of its rows, the highest score, the sum of the powers of all scores over it,
and the values weighted by these. Where several programs share a head, each leaves these sums, and a
second kernel puts them together.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import LN_2, LOG2_E, LOG2_E_REST, rounded
from moe_compile.ops._overlap import overlap, wait_for_previous


@triton.jit
def _sink(sink, OF_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """In the unit of scores, which is that of `_power`."""
    return sink.to(tl.float32) * (1.0 if OF_E else LOG2_E)


@triton.jit
def _power(y, OF_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """e ** y, or 2 ** y, for y up to 0.

    Of float32 inputs the rounding of y * log2(e) would be seen, and so would that of scores times
    log2(e); of others neither is, and the factor is part of the scale.
    """
    if OF_E:
        powers = y * LOG2_E
        rest = tl.fma(y, tl.full(y.shape, LOG2_E, tl.float32), -powers) + y * LOG2_E_REST
        exp = tl.exp2(powers)
        return exp + tl.where(powers > -126.0, exp * rest * LN_2, 0.0)
    return tl.exp2(y)


@triton.jit
def add_scores(scores, v, highest, total, acc, OF_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums with some positions more: scores [rows, positions], v [positions, features]."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # all closed so far
    powers = _power(scores - base[:, None], OF_E)
    rest = _power(highest - base, OF_E)
    total = total * rest + tl.sum(powers, 1)
    acc = tl.dot(powers.to(v.dtype), v, acc * rest[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def leave_sums(  # type: ignore[no-untyped-def]
    highest, total, acc, row, is_row, f, sums_ptr, split, splits, num_rows, F: tl.constexpr
):
    """For `put_together`. row: of out."""
    place = row * splits + split
    is_stored = is_row[:, None] & (f < F)[None, :]
    tl.store(sums_ptr + place[:, None] * F + f[None, :], acc, mask=is_stored)
    highest_ptr = sums_ptr + num_rows.to(tl.int64) * splits * F
    tl.store(highest_ptr + place, highest, mask=is_row)
    tl.store(highest_ptr + num_rows.to(tl.int64) * splits + place, total, mask=is_row)


@triton.jit
def store_mean(  # type: ignore[no-untyped-def]
    highest,
    total,
    acc,
    row,
    is_row,
    f,
    sinks_ptrs,
    out_ptr,
    F: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OF_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The end where a program has all positions. sinks_ptrs: of each row's head."""
    if HAS_SINKS:
        sink = _sink(tl.load(sinks_ptrs, mask=is_row, other=0.0), OF_E)
        base = tl.maximum(highest, sink)
        base = tl.where(base == float("-inf"), 0.0, base)
        rest = _power(highest - base, OF_E)
        total = total * rest + _power(sink - base, OF_E)
        acc *= rest[:, None]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # NaN stays NaN
    acc = rounded(acc, out_ptr.dtype.element_ty, True, INTERPRETED)
    out_ptrs = out_ptr + row[:, None] * F + f[None, :]
    is_stored = is_row[:, None] & (f < F)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit(do_not_specialize=["splits", "num_rows", "stride_sink"])
def put_together_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,
    sinks_ptr,
    out_ptr,
    splits,
    num_rows,
    stride_sink,
    A: tl.constexpr,
    Q: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    F: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    """The splits' sums, brought to one highest score, over the sum of their powers."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_P)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    highest_ptr = sums_ptr + num_rows.to(tl.int64) * splits * F + row * splits
    total_ptr = highest_ptr + num_rows.to(tl.int64) * splits
    is_split = split < splits
    ptrs = sums_ptr + row * splits * F + split[:, None] * F + f[None, :]
    parts = tl.load(ptrs, mask=is_split[:, None] & (f < F)[None, :], other=0.0)
    highest = tl.load(highest_ptr + split, mask=is_split, other=float("-inf"))
    totals = tl.load(total_ptr + split, mask=is_split, other=0.0)
    OF_E: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    base = tl.max(highest, 0)
    if HAS_SINKS:
        sink = _sink(tl.load(sinks_ptr + row // (Q * A) * stride_sink + row % A), OF_E)
        base = tl.maximum(base, sink)
    base = tl.where(base == float("-inf"), 0.0, base)  # all closed
    weights = _power(highest - base, OF_E)
    total = tl.sum(weights * totals, 0)
    if HAS_SINKS:
        total += _power(sink - base, OF_E)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    out = rounded(out, out_ptr.dtype.element_ty, True, INTERPRETED)
    tl.store(out_ptr + row * F + f, out.to(out_ptr.dtype.element_ty), mask=f < F)


def put_together(
    sums: Tensor, sinks: Tensor, stride_sink: int, out_BAQF: Tensor, splits: int, has_sinks: bool
) -> None:
    """Fill out, which is stored as [B, Q, A, F], from what `leave_sums` left: a program a row."""
    B, A, Q, F = out_BAQF.shape
    # As many numbers for each thread as ptxas loads before it waits for the first of them.
    BLOCK_P = triton.next_power_of_2(splits)
    BLOCK_F = min(max(32, 1024 // BLOCK_P), 128, triton.next_power_of_2(F))
    put_together_kernel[(B * Q * A, triton.cdiv(F, BLOCK_F))](
        sums,
        sinks,
        out_BAQF,
        splits,
        B * Q * A,
        stride_sink,
        A=A,
        Q=Q,
        HAS_SINKS=has_sinks,
        F=F,
        INTERPRETED=not sums.is_cuda,
        BLOCK_P=BLOCK_P,
        BLOCK_F=BLOCK_F,
        num_warps=max(1, BLOCK_P // 32),
        **overlap(sums),
    )
