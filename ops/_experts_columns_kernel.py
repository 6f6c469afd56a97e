"""The two kernels of `experts` for few tokens, of weights whose columns are contiguous.

In the first each (token, slot) pair finds its expert in the ids, and each program some features of
one pair: their columns of gate and of up. In the second a program has a few columns of one token,
and reads them of K weights at once. Neighbouring threads read neighbouring columns, 16 bytes each,
and a program all rows of its columns: sums that several shared would need atomics.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import rounded
from moe_compile.ops._grouped_mm_kernel import Gate, gated_pairs, one_row
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._skinny_mm_kernel import SMS
from moe_compile.ops._tuned_kernels import EXPERTS_DOWN_COLUMNS, EXPERTS_UP_COLUMNS


class ColumnsBlocks(NamedTuple):
    """Columns of what is computed, depth of one program, and how Triton compiles it."""

    n: int
    k: int
    warps: int
    stages: int


def choose_up_blocks(R: int, F: int) -> ColumnsBlocks:
    """The widest for two programs an SM, each with three blocks of 8 KB on the way.

    Not measured yet. grouped_mm's first product of gpt-oss-120b, T = 1, with blocks of as many
    bytes on tensor cores: 33 to 35 us on one H200, 82 % of the roof.
    """
    n = 1 << max(0, (R * F // (2 * SMS)).bit_length() - 1)
    n = min(64, max(16, n))
    return ColumnsBlocks(n, 2048 // n, 4, 4)


def choose_down_blocks(T: int, C: int, K: int) -> ColumnsBlocks:
    """For K experts a token, rounded up to a power of two: the widest that keep two thirds of the
    SMs busy, each with three blocks of 16 KB on the way. Not measured yet."""
    n = 16
    while n < 64 and 2 * SMS * (2 * n) <= 3 * T * C:
        n *= 2
    return ColumnsBlocks(n, max(16, 8192 // (K * n)), 8, 4)


@triton.jit
def up_columns_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    ids_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    E,
    H,
    F,
    top_k,
    stride_xt,
    stride_we,
    stride_wh,
    alpha,
    limit,
    up_shift,
    INTERLEAVED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    num_columns = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // num_columns).to(tl.int64)
    first = (tl.program_id(0) % num_columns) * BLOCK_F
    expert = tl.load(ids_ptr + row).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    i = tl.arange(0, 2 * BLOCK_F)
    if INTERLEAVED:
        cols = 2 * first + i
        is_in = cols < 2 * F
    else:  # the features of gate, then those of up
        feature = first + i % BLOCK_F
        cols = (i // BLOCK_F) * F + feature
        is_in = feature < F
    k = tl.arange(0, BLOCK_K)[:, None]
    x_ptrs = x_ptr + (row // top_k) * stride_xt + k
    w_ptrs = w_ptr + expert * stride_we + k * stride_wh + cols[None, :]
    w_step = tl.full([], BLOCK_K, tl.int64) * stride_wh
    y = one_row(
        x_ptrs, w_ptrs, is_in[None, :], H, w_step, EVEN_H, BLOCK_F * 2, BLOCK_K, STAGES
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * (2 * F) + cols, mask=is_in, other=0.0)
        y += bias.to(tl.float32)
    if not INTERLEAVED:
        y = tl.reshape(tl.trans(tl.reshape(y, [2, BLOCK_F])), [2 * BLOCK_F])
    dtype = h_ptr.dtype.element_ty
    h = gated_pairs(y[None, :], alpha, limit, up_shift, dtype, HAS_LIMIT, False, INTERPRETED)
    f = first + tl.arange(0, BLOCK_F)[None, :]
    tl.store(h_ptr + row * F + f, h.to(dtype), mask=f < F)


def launch_up_columns(
    x_TH: Tensor,
    ids_TK: Tensor,
    w_EHG: Tensor,
    bias_EG: Tensor | None,
    h_RF: Tensor,
    gate: Gate,
    blocks: ColumnsBlocks | None = None,
) -> None:
    """Fill the rows of h that have an expert; w's last dim is contiguous."""
    (R, F), (E, H, G), K = h_RF.shape, w_EHG.shape, ids_TK.shape[1]
    x = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    kind = (x.dtype, gate.interleaved, K)
    blocks = blocks or EXPERTS_UP_COLUMNS.chosen(x.device, kind, (R, H, G), choose_up_blocks, R, F)
    up_columns_kernel[(R * triton.cdiv(F, blocks.n),)](
        x,
        ids_TK.contiguous(),
        w_EHG,
        x if bias_EG is None else bias_EG.contiguous(),
        h_RF,
        E,
        H,
        F,
        K,
        x.stride(0),
        *w_EHG.stride()[:2],
        float(gate.alpha),
        0.0 if gate.limit is None else float(gate.limit),
        float(gate.up_shift),
        INTERLEAVED=gate.interleaved,
        HAS_LIMIT=gate.limit is not None,
        HAS_BIAS=bias_EG is not None,
        EVEN_H=H % blocks.k == 0,
        BLOCK_F=blocks.n,
        BLOCK_K=blocks.k,
        STAGES=blocks.stages,
        INTERPRETED=not x.is_cuda,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(x, R * H * G * w_EHG.element_size()),
    )


@triton.jit
def down_columns_kernel(  # type: ignore[no-untyped-def]
    h_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    E,
    F,
    C,
    stride_we,
    stride_wf,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_F: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    dtype = out_ptr.dtype.element_ty
    num_columns = tl.cdiv(C, BLOCK_O)
    token = (tl.program_id(0) // num_columns).to(tl.int64)
    cols = (tl.program_id(0) % num_columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_in = cols < C
    k = tl.arange(0, BLOCK_K)
    expert = tl.load(ids_ptr + token * K + k, mask=k < K, other=-1).to(tl.int64)
    owned = (expert >= 0) & (expert < E)
    weight = tl.load(weights_ptr + token * K + k, mask=owned, other=0.0).to(tl.float32)
    f = tl.arange(0, BLOCK_F)
    # In two dims: with a third, blocks of w would lie in threads as those of h do.
    h_ptrs = h_ptr + (token * K + k)[:, None] * F + f[None, :]
    w_ptrs = w_ptr + expert[:, None, None] * stride_we + f[None, :, None] * stride_wf
    w_ptrs += cols[None, None, :]
    h_mask = owned[:, None]
    w_mask = owned[:, None, None] & is_in[None, None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * C + cols, mask=is_in).to(tl.float32)
    sums = tl.zeros([BLOCK_K, BLOCK_F, BLOCK_O], tl.float32)
    for start in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        if EVEN_F:
            h = tl.load(h_ptrs, mask=h_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            h = tl.load(h_ptrs, mask=h_mask & (f < F - start)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (f < F - start)[None, :, None], other=0.0)
        sums += h.to(tl.float32)[:, :, None] * w.to(tl.float32)
        h_ptrs += BLOCK_F
        w_ptrs += BLOCK_F * stride_wf
    # First over K, which each thread has by itself.
    out = tl.sum(tl.sum(weight[:, None, None] * sums, 0), 0)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert[:, None] * C + cols[None, :]
        bias = tl.load(bias_ptrs, mask=h_mask & is_in[None, :], other=0.0).to(tl.float32)
        out += tl.sum(weight[:, None] * bias, 0)
    out = rounded(out, dtype, True, INTERPRETED)
    if HAS_RESIDUAL:
        out = rounded(out + residual, dtype, True, INTERPRETED)
    tl.store(out_ptr + token * C + cols, out.to(dtype), mask=is_in)


def launch_down_columns(
    h_RF: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_EFO: Tensor,
    bias_EO: Tensor | None,
    residual_TO: Tensor | None,
    out_TO: Tensor,
    blocks: ColumnsBlocks | None = None,
) -> None:
    """Fill out; w's last dim is contiguous."""
    (T, K), (E, F, C) = ids_TK.shape, w_EFO.shape
    block_k = triton.next_power_of_2(K)
    kind = (h_RF.dtype, K)
    blocks = blocks or EXPERTS_DOWN_COLUMNS.chosen(
        h_RF.device, kind, (T, F, C), choose_down_blocks, T, C, block_k
    )
    down_columns_kernel[(T * triton.cdiv(C, blocks.n),)](
        h_RF,
        ids_TK.contiguous(),
        weights_TK.contiguous(),
        w_EFO,
        h_RF if bias_EO is None else bias_EO.contiguous(),
        h_RF if residual_TO is None else residual_TO.contiguous(),
        out_TO,
        E,
        F,
        C,
        *w_EFO.stride()[:2],
        HAS_BIAS=bias_EO is not None,
        HAS_RESIDUAL=residual_TO is not None,
        EVEN_F=F % blocks.k == 0,
        K=K,
        BLOCK_K=block_k,
        BLOCK_F=blocks.k,
        BLOCK_O=blocks.n,
        STAGES=blocks.stages,
        INTERPRETED=not h_RF.is_cuda,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **overlap(h_RF, T * K * F * C * w_EFO.element_size()),
    )
