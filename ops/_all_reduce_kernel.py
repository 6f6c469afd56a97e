"""The kernel behind `all_reduce_add_rms_norm`: one program sends, sums and normalises one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._symmetric_memory import Inbox

# Looks at a row that does not come before the GPU gives up, some ten minutes: as long as NCCL.
MOST_LOOKS = 1 << 30


@triton.jit
def _unpack(words, IS_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two 16-bit floats of each 32-bit word, as float32."""
    if IS_BF16:
        first = (words << 16).to(tl.float32, bitcast=True)
        second = (words & -65536).to(tl.float32, bitcast=True)
    else:
        first = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _all_reduce_add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [T, H] as words of two
    residual_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    inboxes_ptr,  # [RANKS] addresses
    exchanges_ptr,
    W,  # H / 2
    row_words,
    rows,
    eps,
    MOST_LOOKS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    IS_BF16: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_W)
    mask = cols < W
    dtype = sum_ptr.dtype.element_ty
    mine = tl.load(x_ptr + row * W + cols, mask=mask, other=0)

    if RANKS > 1:
        exchange = tl.load(exchanges_ptr + row) + 1
        # 0 stands in words never written; the halves go on alternating.
        exchange = tl.where(exchange == 0, 2, exchange)
        half = (exchange & 1).to(tl.int64)
        number = exchange.to(tl.int64) << 32
        packed = number | (mine.to(tl.int64) & 0xFFFFFFFF)
        row_at = row * row_words + cols
        part = rows * row_words
        for peer in tl.static_range(RANKS):
            if peer != RANK:
                theirs = tl.load(inboxes_ptr + peer).to(tl.pointer_type(tl.int64))
                at = theirs + (half * RANKS + RANK) * part + row_at
                tl.store(at, packed, mask=mask, cache_modifier=".wt")

    # Normalising needs the residual and the weight, which come while the peers' rows travel.
    pairs = tl.arange(0, 2 * BLOCK_W)
    inside = pairs < 2 * W
    residual = tl.load(residual_ptr + row * 2 * W + pairs, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + pairs, mask=inside, other=0.0).to(tl.float32)

    # In the order of ranks, so that all ranks get the same bits.
    first = tl.zeros([BLOCK_W], tl.float32)
    second = tl.zeros([BLOCK_W], tl.float32)
    for peer in tl.static_range(RANKS):
        words = mine
        if peer != RANK:
            own = tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int64))
            at = own + (half * RANKS + peer) * part + row_at
            got = tl.load(at, mask=mask, other=number, volatile=True)
            missing = tl.sum(((got >> 32).to(tl.int32) != exchange).to(tl.int32), 0)
            looks = 0
            while (missing > 0) & (looks < MOST_LOOKS):
                got = tl.load(at, mask=mask, other=number, volatile=True)
                missing = tl.sum(((got >> 32).to(tl.int32) != exchange).to(tl.int32), 0)
                looks += 1
            if missing > 0:
                tl.inline_asm_elementwise(
                    "trap; mov.u32 $0, $1;", "=r,r", [missing], tl.int32, is_pure=False, pack=1
                )
            words = got.to(tl.int32)
        a, b = _unpack(words, IS_BF16)
        first += a
        second += b
    if RANKS > 1:
        tl.store(exchanges_ptr + row, exchange)

    # Rounded where the model rounds: after the all-reduce, after the sum.
    total = tl.reshape(tl.join(first, second), [2 * BLOCK_W]).to(dtype).to(tl.float32)
    total = (total + residual.to(tl.float32)).to(dtype)
    tl.store(sum_ptr + row * 2 * W + pairs, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.where(inside, total * total, 0.0), 0) / (2 * W) + eps)
    normed = total * scale
    if ROUND_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(normed_ptr + row * 2 * W + pairs, normed * weight, mask=inside)


def launch(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    round_first: bool,
    inbox: Inbox | None,
) -> tuple[Tensor, Tensor]:
    """Exchange rows of 16-bit floats through the inbox, or take x as summed where there is none.

    T >= 1, H even, all contiguous.
    """
    T, H = x_TH.shape
    sum_TH, normed_TH = torch.empty_like(residual_TH), torch.empty_like(residual_TH)
    BLOCK_W = triton.next_power_of_2(H // 2)
    _all_reduce_add_rms_norm_kernel[(T,)](
        x_TH.view(torch.int32),
        residual_TH,
        weight_H,
        sum_TH,
        normed_TH,
        None if inbox is None else inbox.addresses,
        None if inbox is None else inbox.exchanges,
        H // 2,
        0 if inbox is None else inbox.row_words,
        0 if inbox is None else inbox.rows,
        eps,
        MOST_LOOKS=MOST_LOOKS,
        RANK=0 if inbox is None else inbox.rank,
        RANKS=1 if inbox is None else inbox.ranks,
        ROUND_FIRST=round_first,
        IS_BF16=x_TH.dtype == torch.bfloat16,
        BLOCK_W=BLOCK_W,
        num_warps=min(16, max(4, BLOCK_W // 128)),
    )
    return sum_TH, normed_TH
