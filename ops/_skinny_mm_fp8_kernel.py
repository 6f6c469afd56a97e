"""The kernel of `skinny_mms_fp8`, and the choice of its blocks.

As `skinny_mm`'s: a program computes a few columns of one weight for all rows, over all of K. It
quantises x itself, as it comes to it, so that no kernel before it has to; several rows may be
quantised ahead instead, since every program would quantise all of them.

Rows that it quantises itself it can norm, too. A group's float8 values don't change where all of it
is scaled, so they are made of x times the norm's weight; the squares are added up meanwhile, and
the sums scaled at the end (`_skinny_mm_fp8_sums.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import rounded
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._quant_kernel import FP8, LARGEST
from moe_compile.ops._quant_kernel import launch as launch_quant
from moe_compile.ops._skinny_mm_fp8_sums import GROUP, rows_by_dot, rows_of_sums
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS, MOST_ROWS_OF_SUMS, SMS, Norm
from moe_compile.ops._skinny_mm_sums import append

READ_AT_ONCE = 16  # values of w, by one thread

# Rows that are normed are quantised before their factor is known, so that nothing can be compared
# with amax_floor. LEAST_AMAX is there against a quotient of zeros. With LEAST_EPS the factor is 1e6
# at most: no group whose normed amax is one of FLOORS or more is below LEAST_AMAX.
LEAST_AMAX = 1e-27
LEAST_EPS = 1e-12
FLOORS = (1e-20, 1e-8)


class Blocks(NamedTuple):
    """Columns and depth of one program, and how Triton compiles it.

    dot: on tensor cores, one group deep. ahead: x is quantised by a kernel of its own.
    """

    n: int
    k: int
    dot: bool
    ahead: bool
    warps: int
    stages: int


def choose_blocks(M: int, K: int, N: int) -> Blocks:
    """Blocks for M rows times weights of K by N, which is the sum of the columns of all.

    As `skinny_mm`'s, with twice as many values of half the bytes. A program of 16 rows has more to
    quantise than its columns of w to multiply, so that is done ahead; eight columns and more than
    two rows would take all registers. One H200, 2026-11-22, sweep_skinny_mm_fp8.py, one row, us:
    q, k and v of Qwen3-30B-A3B with these 5.9 (8 x 1024 with 2 warps 5.8), o 5.1 (5.0); 4 columns,
    8 warps for o 6.3; `quant_fp8` and `linear_fp8` 21.0 and 12.2. More rows were not measured.
    """
    if M > MOST_ROWS_OF_SUMS:
        n = 1 << max(0, (N // (2 * SMS)).bit_length() - 1)  # the widest for two programs an SM
        return Blocks(max(8, min(n, 32)), 128, True, True, 4, 6)
    n = 1 << max(0, (N // 240).bit_length() - 1)  # not quite two
    warps = _warps(K)
    stages = min(3, 1 + triton.cdiv(K, 512 * warps))
    return Blocks(max(2, min(n, 8 if M <= 2 else 4)), 512 * warps, False, False, warps, stages)


def _warps(K: int) -> int:
    """Side by side along K: as many as divide it, else rather padding than few loads at a time."""
    fitting = [w for w in (4, 2) if 512 * w <= K]
    even = [w for w in fitting if K % (512 * w) == 0]
    return (even or fitting or [1])[0]


@triton.jit
def _stored(  # type: ignore[no-untyped-def]
    y, residual, dtype, HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr
):
    """y in its dtype, or the sum of that and the residual, rounded again."""
    if HAS_RESIDUAL or INTERPRETED:  # the interpreter's cast does not round
        y = rounded(y, dtype, True, INTERPRETED)
    if HAS_RESIDUAL:
        y = rounded(y + residual, dtype, True, INTERPRETED)
    return y.to(dtype)


@triton.jit(do_not_specialize=["M"])
def skinny_mm_fp8_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    xs_ptr,
    norm_ptr,
    w_ptrs,
    ws_ptrs,
    bias_ptrs,
    residual_ptr,
    y_ptrs,
    Ns,
    bias_Ns,
    strides_w,
    M,
    K,
    stride_xm,
    amax_floor,
    eps,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    AHEAD: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_K: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(not (NORM and (DOT or AHEAD)))
    # The programs of a weight come after those of the weights before it.
    program = tl.program_id(0)
    zero = tl.full([], 0, tl.int64)  # makes a tensor of what Triton knows to be 1
    w_ptr, ws_ptr, bias_ptr, y_ptr = w_ptrs[0], ws_ptrs[0], bias_ptrs[0], y_ptrs[0]
    N, bias_N, stride_w, first = Ns[0] + zero, bias_Ns[0] + zero, strides_w[0] + zero, zero
    end = tl.cdiv(N, BLOCK_N)
    for i in tl.static_range(1, COUNT):
        if program >= end:
            w_ptr, ws_ptr, bias_ptr, y_ptr = w_ptrs[i], ws_ptrs[i], bias_ptrs[i], y_ptrs[i]
            N, bias_N, stride_w, first = Ns[i] + zero, bias_Ns[i] + zero, strides_w[i] + zero, end
        end += tl.cdiv(Ns[i] + zero, BLOCK_N)

    column = (program - first) * BLOCK_N  # BLOCK_N divides 128: one row of scales
    cols = column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dtype = y_ptr.dtype.element_ty
    w_ptrs = w_ptr + k[:, None] + cols[None, :] * stride_w
    w_mask = (cols < N)[None, :]
    ws_ptr += (column // GROUP) * tl.cdiv(K, GROUP)
    wait_for_previous(PDL)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < bias_N, other=0.0).to(tl.float32)
    if DOT:
        m = tl.arange(0, ROWS)[:, None]
        residual = 0.0
        if HAS_RESIDUAL:
            at = residual_ptr + m * N + cols[None, :]
            residual = tl.load(at, mask=(m < M) & w_mask).to(tl.float32)
        x_ptrs = x_ptr + m.to(tl.int64) * stride_xm + k[None, :]
        y = rows_by_dot(
            x_ptrs, xs_ptr + m * tl.cdiv(K, GROUP), m < M, w_ptrs, ws_ptr, w_mask, K, amax_floor,
            AHEAD, POWER_OF_TWO, DIVIDE, INTERPRETED, EVEN_K, ROWS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y_at = y_ptr + m * N + cols[None, :]
        y = _stored(y + bias[None, :], residual, dtype, HAS_RESIDUAL, INTERPRETED)
        tl.store(y_at, y, mask=(m < M) & w_mask)
    else:
        residuals = ()
        for m in tl.static_range(ROWS):
            residual = 0.0
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + m * N + cols, mask=cols < N).to(tl.float32)
            residuals = append(residuals, residual)
        rows = rows_of_sums(
            x_ptr + k[:, None], xs_ptr, norm_ptr + k[:, None], w_ptrs, ws_ptr, w_mask, K,
            stride_xm + zero, amax_floor, eps, NORM, AHEAD, POWER_OF_TWO, DIVIDE, INTERPRETED,
            EVEN_K, ROWS, FOLD, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        for m in tl.static_range(ROWS):
            y_at = y_ptr + m * N + cols
            y = _stored(rows[m] + bias, residuals[m], dtype, HAS_RESIDUAL, INTERPRETED)
            tl.store(y_at, y, mask=cols < N)


def fits(x_MK: Tensor) -> bool:
    """Does the kernel take x? Not many rows."""
    M, K = x_MK.shape
    return 0 < M <= MOST_ROWS and K > 0


def can_norm(x_MK: Tensor, power_of_two: bool, amax_floor: float, eps: float) -> bool:
    """Does the kernel norm x? Few rows, plain scales, and a floor that hardly matters.

    Groups whose amax is above amax_floor are quantised as they would be after the norm. Those below
    are quantised finer: both roundings move a value by at most a sixteenth of the floor, so the two
    are an eighth of it apart at most.
    """
    is_floor_small = FLOORS[0] <= amax_floor <= FLOORS[1]
    few = fits(x_MK) and x_MK.shape[0] <= MOST_ROWS_OF_SUMS
    return few and not power_of_two and is_floor_small and eps >= LEAST_EPS


def is_division_needed(amax_floor: float) -> bool:
    """Might a scale have no inverse that is a normal number? See `quantized`."""
    return amax_floor / LARGEST < 1e-30


def launch(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    ys: Sequence[Tensor],
    power_of_two: bool,
    amax_floor: float,
    blocks: Blocks | None = None,
    residual_MN: Tensor | None = None,
    norm: Norm | None = None,
) -> None:
    """Fill ys with x times each of the weights [N, K], which are stored along K.

    residual: added to the product with a single weight.
    norm: of x before, which `can_norm`.
    """
    M, K = x_MK.shape
    Ns = [w.shape[0] for w in ws]
    if sum(Ns) == 0:
        return
    blocks = blocks or choose_blocks(M, K, sum(Ns))
    amax_floor = LEAST_AMAX if norm else amax_floor
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    q = x_scale = x
    if blocks.ahead:
        q = x.new_empty(M, K, dtype=FP8)
        x_scale = x.new_empty(M, triton.cdiv(K, 128), dtype=torch.float32)
        launch_quant(x, (q, x_scale), 128, power_of_two, amax_floor, 0.0, (False, False))
    skinny_mm_fp8_kernel[(sum(triton.cdiv(N, blocks.n) for N in Ns),)](
        q,
        x_scale,
        norm.weight.contiguous() if norm else x,
        tuple(ws),
        tuple(scale.contiguous() for scale in w_scales),
        tuple(y if b is None else b.contiguous() for b, y in zip(biases, ys, strict=True)),
        None if residual_MN is None else residual_MN.contiguous(),
        tuple(ys),
        tuple(Ns),
        tuple(0 if bias is None else N for bias, N in zip(biases, Ns, strict=True)),
        tuple(w.stride(0) for w in ws),
        M,
        K,
        q.stride(0),
        amax_floor,
        norm.eps if norm else 0.0,
        COUNT=len(ws),
        HAS_BIAS=any(bias is not None for bias in biases),
        HAS_RESIDUAL=residual_MN is not None,
        NORM=norm is not None,
        AHEAD=blocks.ahead,
        POWER_OF_TWO=power_of_two,
        DIVIDE=not x.is_cuda or is_division_needed(amax_floor),
        INTERPRETED=not x.is_cuda,  # only the interpreter runs on the CPU
        EVEN_K=K % blocks.k == 0,
        DOT=blocks.dot,
        ROWS=MOST_ROWS if blocks.dot else M,
        FOLD=READ_AT_ONCE,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x, sum(w.nbytes for w in ws)),
    )
