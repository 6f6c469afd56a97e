"""The kernels of `attend`.

A program has one key head, up to BLOCK_R of its rows (the queries of all its query heads), and
every so many-th block of BLOCK_S positions: each key is read once for all of them, and tensor cores
multiply what would otherwise be 16 rows of nothing. Where several programs share a head, each
leaves its sums and the highest score that they are relative to, and a second kernel puts these
together. A decode of few sequences waits for memory a few times and does little else, so loads are
begun together, and early. Keys in two parts are two products with one sum, and keys that are the
values, too, are read once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._attend_blocks import Blocks, choose_blocks, shared_memory
from moe_compile.ops._attend_sums import add_scores, leave_sums, put_together, store_mean
from moe_compile.ops._gated import LOG2_E
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._tuned_kernels import ATTEND


@triton.jit
def _first_and_last(  # type: ignore[no-untyped-def]
    mask_ptr, S, split, splits, blocks, BLOCK_S: tl.constexpr
):
    """Of the blocks split, split + splits, ..: before which, and after which, all is closed."""
    SCAN: tl.constexpr = 1024 // BLOCK_S
    first = tl.full([SCAN, BLOCK_S], 1 << 30, tl.int32)
    last = tl.full([SCAN, BLOCK_S], -1, tl.int32)
    for start in range(split, blocks, splits * SCAN):
        block = (start + tl.arange(0, SCAN) * splits)[:, None]
        key = block * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        mask = tl.load(mask_ptr + key, mask=key < S, other=0)
        is_open = (key < S) & _is_open(mask)
        first = tl.where(is_open, tl.minimum(first, block), first)
        last = tl.where(is_open, block, last)
    return tl.min(tl.min(first, 1), 0), tl.max(tl.max(last, 1), 0)


@triton.jit
def _is_open(mask):  # type: ignore[no-untyped-def]
    return mask if mask.dtype == tl.int1 else mask != float("-inf")


# What changes with the batch or the cache is not specialised on: it would compile again.
@triton.jit(do_not_specialize=["S", "splits", "blocks", "num_rows", "stride_l", "stride_sink"])
def _attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    q_rot_ptr,
    k_rot_ptr,
    mask_ptr,
    last_ptr,
    sinks_ptr,
    out_ptr,
    sums_ptr,
    S,
    splits,
    blocks,
    num_rows,
    G,
    scale,
    stride_qb,
    stride_qa,
    stride_qq,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_qrb,
    stride_qra,
    stride_qrq,
    stride_krb,
    stride_krg,
    stride_krs,
    stride_mb,
    stride_ma,
    stride_mq,
    stride_l,
    stride_sink,
    REPEATS: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    U: tl.constexpr,
    VALUES_ARE_KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SCAN: tl.constexpr,
    ONE_STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_U: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    batch = (tl.program_id(0) // G).to(tl.int64)
    g = tl.program_id(0) % G
    split = tl.program_id(1)
    k_ptr += batch * stride_kb + g.to(tl.int64) * stride_kg
    v_ptr += batch * stride_vb + g.to(tl.int64) * stride_vg
    k_rot_ptr += batch * stride_krb + g.to(tl.int64) * stride_krg
    wait_for_previous(PDL)
    end = S
    if HAS_LAST:
        last_open = tl.load(last_ptr + batch * stride_l)
        end = tl.maximum(tl.minimum(last_open, S - 1), -1).to(tl.int32) + 1
    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = row < REPEATS * Q
    head = g * REPEATS + row // Q
    query = row % Q
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    s = tl.arange(0, BLOCK_S)
    q_ptrs = (
        q_ptr + batch * stride_qb + (head * stride_qa + query * stride_qq)[:, None] + d[None, :]
    )
    q = tl.load(q_ptrs, mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    if U:
        u = tl.arange(0, BLOCK_U)
        q_rot_ptrs = q_rot_ptr + batch * stride_qrb + u[None, :]
        q_rot_ptrs += (head * stride_qra + query * stride_qrq)[:, None]
        q_rot = tl.load(q_rot_ptrs, mask=is_row[:, None] & (u < U)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
        if U:
            q_rot = q_rot.to(tl.float32)
    mask_ptr += batch * stride_mb
    if BLOCK_M == 1:  # all rows have the same mask
        mask_ptr += (g * REPEATS).to(tl.int64) * stride_ma
        mask_ptrs = mask_ptr + s[None, :]
        has_mask_row = tl.full([1, 1], True, tl.int1)
    else:
        mask_ptrs = mask_ptr + (head.to(tl.int64) * stride_ma + query * stride_mq)[:, None]
        mask_ptrs += s[None, :]
        has_mask_row = is_row[:, None]

    OF_E: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    # Neighbouring blocks go to different splits: what is filled of a long cache is spread evenly.
    first, last = split, blocks - 1
    if SCAN:
        first, last = _first_and_last(mask_ptr, S, split, splits, blocks, BLOCK_S)
    if HAS_LAST:
        last = (end + BLOCK_S - 1) // BLOCK_S - 1
    steps = (last >= first).to(tl.int32)
    if not ONE_STEP:
        steps = (last - first + splits) // splits
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    # Counted from 0: with `first` as its bound Triton loses how pointers are aligned. A loop also
    # for one step: only in loops Triton copies to shared memory without waiting for each load.
    for step in tl.range(0, steps, num_stages=STAGES):
        start = tl.full([], BLOCK_S, tl.int64) * (first + step * splits)
        is_key = s < end - start
        is_open = is_key[None, :]
        if HAS_MASK:
            mask = tl.load(mask_ptrs + start, mask=is_key[None, :] & has_mask_row, other=0)
            is_open = is_open & has_mask_row & _is_open(mask)
            is_key = tl.max(is_open.to(tl.int32), 0) > 0
        k_ptrs = k_ptr + start * stride_ks + (s[:, None] * stride_ks + d[None, :])
        k = tl.load(k_ptrs, mask=is_key[:, None] & (d < D)[None, :], other=0.0)
        v = k
        if not VALUES_ARE_KEYS:
            v_ptrs = v_ptr + start * stride_vs + (s[:, None] * stride_vs + f[None, :])
            v = tl.load(v_ptrs, mask=is_key[:, None] & (f < F)[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if U:
            k_rot_ptrs = k_rot_ptr + start * stride_krs + (s[:, None] * stride_krs + u[None, :])
            k_rot = tl.load(k_rot_ptrs, mask=is_key[:, None] & (u < U)[None, :], other=0.0)
            if UPCAST:
                k_rot = k_rot.to(tl.float32)
            scores = tl.dot(q_rot, tl.trans(k_rot), scores, input_precision="ieee")
        scores *= scale
        if HAS_MASK and mask_ptr.dtype.element_ty != tl.int1:
            scores += mask.to(tl.float32) * (1.0 if OF_E else LOG2_E)
        scores = tl.where(is_open, scores, float("-inf"))
        highest, total, acc = add_scores(scores, v, highest, total, acc, OF_E)

    row_of_all = (batch * Q + query) * (G * REPEATS) + head
    if SPLIT:
        leave_sums(highest, total, acc, row_of_all, is_row, f, sums_ptr, split, splits, num_rows, F)
    else:
        sinks_ptrs = sinks_ptr + batch * stride_sink + head
        store_mean(
            highest, total, acc, row_of_all, is_row, f, sinks_ptrs, out_ptr,
            F, HAS_SINKS, OF_E, UPCAST,
        )  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask_BAQS: Tensor | None,
    last: Tensor | None,
    sinks_BA: Tensor | None,
    rot: tuple[Tensor, Tensor] | None,
    out_BAQF: Tensor,
    scale: float,
    blocks: Blocks | None = None,
) -> None:
    """Fill out, which is stored as [B, Q, A, F]: a program for each key head and split, then one
    for each row of out, where there are several splits. The last strides of all inputs are 1.

    rot: further features of queries and keys.
    """
    (B, A, Q, D), (G, S), F = q.shape, k.shape[1:3], out_BAQF.shape[3]
    q_rot, k_rot = (q, k) if rot is None else rot
    U = 0 if rot is None else q_rot.shape[3]
    read = [x for x in (k, v, None if rot is None else k_rot) if x is not None]
    mask = q if mask_BAQS is None else mask_BAQS
    stride_ma, stride_mq = mask.stride()[1:3]
    is_shared = mask_BAQS is None or ((A == G or stride_ma == 0) and (Q == 1 or stride_mq == 0))
    rows, num_rows = A // G * Q, B * A * Q
    masked = None if mask_BAQS is None else (mask.dtype, is_shared)
    how = blocks or ATTEND.chosen(
        q.device,
        (A // G, Q, D, 0 if v is None else F, U, q.dtype, "last" if last is not None else masked),
        (B * G, S),
        choose_blocks,
        *(B * G, rows, S, sum(x.shape[3] for x in read), q.dtype, F, shared_memory(q.device)),
    )
    sinks, stride_sink = (q, 0) if sinks_BA is None else (sinks_BA, sinks_BA.stride(0))
    sums = out_BAQF
    if how.splits > 1:
        sums = q.new_empty(num_rows * how.splits * (F + 2), dtype=torch.float32)
    num_blocks = triton.cdiv(S, how.positions)
    _attend_kernel[(B * G, how.splits, triton.cdiv(rows, how.rows))](
        q,
        k,
        k if v is None else v,
        q_rot,
        k_rot,
        mask,
        q if last is None else last,
        sinks,
        out_BAQF,
        sums,
        S,
        how.splits,
        num_blocks,
        num_rows,
        G,
        scale if q.dtype == torch.float32 else scale * math.log2(math.e),
        *q.stride()[:3],
        *k.stride()[:3],
        *(k if v is None else v).stride()[:3],
        *q_rot.stride()[:3],
        *k_rot.stride()[:3],
        *mask.stride()[:3],
        0 if last is None or last.shape[0] == 1 else last.stride(0),
        stride_sink,
        REPEATS=A // G,
        Q=Q,
        D=D,
        F=F,
        U=U,
        VALUES_ARE_KEYS=v is None,
        HAS_MASK=mask_BAQS is not None,
        HAS_LAST=last is not None,
        HAS_SINKS=sinks_BA is not None,
        SCAN=mask_BAQS is not None and is_shared and num_blocks > how.splits,
        ONE_STEP=num_blocks <= how.splits,
        SPLIT=how.splits > 1,
        UPCAST=not q.is_cuda,  # only the interpreter runs on the CPU; its bfloat16 dot is wrong
        BLOCK_M=1 if is_shared else how.rows,
        BLOCK_R=how.rows,
        BLOCK_S=how.positions,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_F=max(16, triton.next_power_of_2(F)),
        BLOCK_U=max(16, triton.next_power_of_2(U)),
        STAGES=how.stages,
        num_warps=how.warps,
        num_stages=how.stages,
        **overlap(q, sum(x.nbytes for x in read)),
    )
    if how.splits > 1:
        put_together(sums, sinks, stride_sink, out_BAQF, how.splits, sinks_BA is not None)
