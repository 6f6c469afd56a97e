"""The kernel of `route` for many tokens and few experts without groups: several tokens a program.

A warp has 32 lanes for the logits of one token: of 8 experts it leaves most of them idle, and
thousands of programs of one warp take longer to start than to run. Here a program reads lines of 4
experts of a token, one line by one lane, of all its tokens before the next 4 experts. So with 32
tokens a warp each lane has a token to itself and finds its experts without a word to others; with 8
tokens four lanes share one.

The value and the number of an expert, one key in `route_kernel`, are searched for in turn: in a
lane the maximum of 32 bits is one instruction, and that of 64 bits four.
"""

import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._route_kernel import _ordered, _score, _unordered

MOST_TOKENS_ALONE = 512  # up to which each token has a program of `route_kernel`
MOST_EXPERTS = 128
PROGRAMS = 512  # about four for each SM of an H100 or H200


def choose_rows(T: int, E: int) -> int:
    """Tokens of one program; 1 means the kernel of one token.

    At least as many as give each lane one line of 4 experts, and at most as many as give it four.
    One H200 (torch 2.11, Triton 3.6, 2026-11-22), us with these and by one token each: 8 experts,
    top 2, of 1024 tokens 1.29 and 1.82, of 8192 1.38 and 10.6 (64 tokens with two warps 1.20); 32,
    top 4, 1.71 and 2.06, 2.11 and 10.5; 64, top 8, 2.54 and 2.65, 4.03 and 10.5; 128, top 8, 2.76
    and 2.96, 6.76 and 10.8.
    """
    if T <= MOST_TOKENS_ALONE or E > MOST_EXPERTS:
        return 1
    block = _block_of(E)
    wanted: int = triton.next_power_of_2(triton.cdiv(T, PROGRAMS))
    return min(max(wanted, MOST_EXPERTS // block), 4 * MOST_EXPERTS // block)


def _block_of(E: int) -> int:
    """Experts of one token's tile."""
    return max(4, int(triton.next_power_of_2(E)))


@triton.jit(do_not_specialize=["T"])
def route_many_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    T,
    eps,
    scale,
    E: tl.constexpr,
    STRIDE_T: tl.constexpr,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    line = tl.arange(0, BLOCK_E // 4 * BLOCK_T)  # 4 experts of a token
    token = first + line % BLOCK_T
    ids = (line // BLOCK_T * 4)[:, None] + tl.arange(0, 4)[None, :]
    mask = (ids < E) & (token < T)[:, None]
    place = (token * STRIDE_T)[:, None] + ids
    logits = tl.load(logits_ptr + place, mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.reshape(logits, [BLOCK_E // 4, BLOCK_T, 4])
    bias = 0.0
    if HAS_BIAS:  # for each token, so that it lies as the logits do
        bias = tl.load(bias_ptr + ids, mask=ids < E, other=0.0).to(tl.float32)
        bias = tl.reshape(bias, [BLOCK_E // 4, BLOCK_T, 4])
    ids = tl.reshape(ids, [BLOCK_E // 4, BLOCK_T, 4])
    inside = ids < E

    top = tl.zeros([BLOCK_T], tl.float32)
    total = top + 1.0
    if SCORE_FIRST and SCORE == "softmax":
        top = tl.max(tl.max(logits, 2), 0)  # NaN is dropped, and comes back with the sum
        total = tl.sum(tl.sum(tl.exp(logits - top[None, :, None]), 2), 0)
    choice = logits
    if SCORE_FIRST:
        choice = _score(logits, top[None, :, None], total[None, :, None], SCORE)
    if HAS_BIAS:
        choice += bias

    TAKEN = -0x80000000  # below every float
    values = tl.where(inside, _ordered(choice), TAKEN)
    slots = tl.arange(0, BLOCK_K)[:, None]
    best = tl.zeros([BLOCK_K, BLOCK_T], tl.int32)
    chosen = tl.zeros([BLOCK_K, BLOCK_T], tl.int32)
    for k in range(K):
        value = tl.max(tl.max(values, 2), 0)
        equal = tl.where(values == value[None, :, None], ids, 0x7FFFFFFF)
        expert = tl.min(tl.min(equal, 2), 0)
        best = tl.where(slots == k, value[None, :], best)
        chosen = tl.where(slots == k, expert[None, :], chosen)
        values = tl.where(ids == expert[None, :, None], TAKEN, values)

    token = first + tl.arange(0, BLOCK_T)
    real = slots < K
    mask = real & (token < T)[None, :]
    if HAS_BIAS:
        place = (token * STRIDE_T)[None, :] + chosen
        x = tl.load(logits_ptr + place, mask=mask, other=float("-inf")).to(tl.float32)
        weights = _score(x, top[None, :], total[None, :], SCORE)
    else:
        weights = _unordered(best)
    if not SCORE_FIRST:
        x = tl.where(real, weights, float("-inf"))
        if SCORE == "softmax":
            top = tl.max(x, 0)
            total = tl.sum(tl.exp(x - top[None, :]), 0)
        weights = _score(x, top[None, :], total[None, :], SCORE)
    weights = tl.where(real, weights, 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + eps)[None, :]
    place = (token * K)[None, :] + slots
    tl.store(weights_ptr + place, weights * scale, mask=mask)
    tl.store(ids_ptr + place, chosen.to(tl.int64), mask=mask)


def launch(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    results: tuple[Tensor, Tensor],
    rows: int,
    score: str,
    score_first: bool,
    renormalize: bool,
    eps: float,
    scale: float,
) -> None:
    """One program for `rows` tokens; its warps lie along tokens, so that none waits for another."""
    T, E = logits_TE.shape
    top_k = results[0].shape[1]
    route_many_kernel[(triton.cdiv(T, rows),)](
        logits_TE,
        logits_TE if bias_E is None else bias_E.contiguous(),
        *results,
        T,
        float(eps),
        float(scale),
        E=E,
        STRIDE_T=logits_TE.stride(0),
        K=top_k,
        SCORE=score,
        SCORE_FIRST=score_first,
        HAS_BIAS=bias_E is not None,
        RENORMALIZE=renormalize,
        BLOCK_T=rows,
        BLOCK_E=_block_of(E),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=max(1, rows // 32),
        **overlap(logits_TE),
    )
