"""The routing of a few tokens by one program, and the kernel of `route`, a program for each token.

`_route_many_kernel.py` has the one for many tokens and few experts.

Floats are compared as integers of the same order (NaN above everything, -0 equal to 0): the best
value, then the lowest expert that has it. Either is an extremum of 32 bits, which a warp finds in
one instruction; and whatever the logits hold, K of them are K different experts in range.

Sums are exact, or in an order that no layout decides: so a token's results are the same to the bit
whether a program routes it alone or among others, as in `router`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._overlap import wait_for_previous
from moe_compile.ops._skinny_mm_sums import append

LANES = 32
TAKEN = tl.constexpr(-0x80000000)  # below every float
NO_EXPERT = tl.constexpr(0x7FFFFFFF)


class Routing(NamedTuple):
    """How experts are chosen and weighed: the arguments of `route` after its logits."""

    top_k: int
    score: str = "softmax"
    score_first: bool = True
    bias: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    dtype: torch.dtype | None = None

    def constants(self, E: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """What `route_rows` calls HOW, for logits of a dtype: a lane of a warp reads 16 bytes."""
        block = max(LANES, triton.next_power_of_2(E))
        line = min(block, LANES * 16 // dtype.itemsize)
        line = max(line, triton.next_power_of_2(self.top_k))
        best = 1 if self.group_score == "max" else 2
        choice = (self.top_k, self.score, self.score_first, self.bias is not None)
        groups = (self.num_groups, self.top_groups, best)
        return (E, *choice, *groups, self.renormalize, block // line, line)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """The bits of floats, as integers in the order of what they stand for."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def _unordered(bits):  # type: ignore[no-untyped-def]
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _score(x, top, total, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`top` and `total` are softmax's: the largest logit, and the sum of exp(logit - top)."""
    if SCORE == "softmax":
        return tl.exp(x - top) / total
    if SCORE == "sigmoid":
        return tl.sigmoid(x)
    return x


@triton.jit
def _largest(values):  # type: ignore[no-untyped-def]
    """Of each row, the first dim."""
    return tl.max(tl.max(values, 1), 1)


@triton.jit
def _first(values, value, ids):  # type: ignore[no-untyped-def]
    """The first expert of each row that has the row's value."""
    equal = tl.where(values == value[:, None, None], ids, NO_EXPERT)
    return tl.min(tl.min(equal, 1), 1)


@triton.jit
def _sum_of_exps(logits, top):  # type: ignore[no-untyped-def]
    """Of each row, by whole multiples of 2 ** -40: exact, so that it has no order."""
    exps = tl.exp(logits - top[:, None, None])
    steps = (tl.where(exps == exps, exps, 0.0) * 1099511627776.0).to(tl.int64)
    total = tl.sum(tl.sum(steps, 1), 1).to(tl.float32) * 9.094947017729282e-13
    return tl.where(tl.abs(top) < float("inf"), total, float("nan"))


@triton.jit
def _keep_groups(  # type: ignore[no-untyped-def]
    choice,
    inside,
    ids,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BEST: tl.constexpr,
):
    """-inf for every expert outside the TOP_GROUPS groups whose 1 or 2 BEST sum highest.

    A group is kept if fewer are better, or as good and before it.
    """
    values = tl.where(inside, _ordered(choice), TAKEN)
    bests = ()
    for group in tl.static_range(NUM_GROUPS):
        mine = tl.where(ids // SIZE == group, values, TAKEN)
        value = _largest(mine)
        best = _unordered(value)
        if BEST == 2:
            first = _first(mine, value, ids)[:, None, None]
            best += _unordered(_largest(tl.where(ids == first, TAKEN, mine)))
        bests = append(bests, _ordered(best))
    kept = values < TAKEN
    for group in tl.static_range(NUM_GROUPS):
        better = tl.zeros(bests[group].shape, tl.int32)
        for other in tl.static_range(NUM_GROUPS):
            if other < group:
                better += (bests[other] >= bests[group]).to(tl.int32)
            else:
                better += (bests[other] > bests[group]).to(tl.int32)
        kept = kept | ((ids // SIZE == group) & (better < TOP_GROUPS)[:, None, None])
    return tl.where(kept, choice, float("-inf"))


@triton.jit
def route_rows(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    first,
    T,
    stride_t,
    eps,
    scale,
    HOW: tl.constexpr,
    ROWS: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Route ROWS tokens from `first` on, as many as there are before T."""
    E: tl.constexpr = HOW[0]
    K: tl.constexpr = HOW[1]
    SCORE: tl.constexpr = HOW[2]
    SCORE_FIRST: tl.constexpr = HOW[3]
    HAS_BIAS: tl.constexpr = HOW[4]
    NUM_GROUPS: tl.constexpr = HOW[5]
    TOP_GROUPS: tl.constexpr = HOW[6]
    BEST: tl.constexpr = HOW[7]
    RENORMALIZE: tl.constexpr = HOW[8]
    LINES: tl.constexpr = HOW[9]
    LINE: tl.constexpr = HOW[10]
    # With as many rows as warps each has one to itself.
    row = (first + tl.arange(0, ROWS)).to(tl.int64)
    ids = (tl.arange(0, LINES) * LINE)[None, :, None] + tl.arange(0, LINE)[None, None, :]
    ptrs = logits_ptr + (row * stride_t)[:, None, None] + ids
    mask = (ids < E) & (row < T)[:, None, None]
    logits = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    inside = tl.broadcast_to(ids, logits.shape) < E
    logits = tl.where(inside, logits, float("-inf"))

    choice = logits
    if SCORE_FIRST:
        top, total = 0.0, 1.0
        if SCORE == "softmax":
            top = _unordered(_largest(_ordered(logits)))
            total = _sum_of_exps(logits, top)[:, None, None]
            top = top[:, None, None]
        choice = _score(logits, top, total, SCORE)
    OTHERS: tl.constexpr = HAS_BIAS or NUM_GROUPS > 1  # other values choose than weigh
    if OTHERS:
        scores = _ordered(choice)
    if HAS_BIAS:
        bias_ptrs = tl.broadcast_to(bias_ptr + ids, logits.shape)  # to lie as the logits do
        choice += tl.load(bias_ptrs, mask=inside, other=0.0).to(tl.float32)
    if NUM_GROUPS > 1:
        choice = _keep_groups(choice, inside, ids, NUM_GROUPS, TOP_GROUPS, E // NUM_GROUPS, BEST)

    values = tl.where(inside, _ordered(choice), TAKEN)
    slots = tl.arange(0, LINE)[None, :]
    chosen = tl.zeros([ROWS, LINE], tl.int32)
    weights = tl.zeros([ROWS, LINE], tl.float32)
    most = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for k in range(K):
        value = _largest(values)
        expert = _first(values, value, ids)
        taken = ids == expert[:, None, None]
        values = tl.where(taken, TAKEN, values)
        if OTHERS:
            value = _largest(tl.where(taken, scores, TAKEN))
        weight = _unordered(value)
        if not SCORE_FIRST:
            most = tl.where(k == 0, weight, most)
            weight = _score(weight, most, 1.0, SCORE)
        total += weight
        chosen = tl.where(slots == k, expert[:, None], chosen)
        weights = tl.where(slots == k, weight[:, None], weights)
    if not SCORE_FIRST and SCORE == "softmax":
        weights = weights / total[:, None]
        total = tl.full([ROWS], 1.0, tl.float32)
    if RENORMALIZE:
        weights = weights / (total + eps)[:, None]
    place = (row * K)[:, None] + slots
    mask = (slots < K) & (row < T)[:, None]
    tl.store(weights_ptr + place, weights * scale, mask=mask)
    tl.store(ids_ptr + place, chosen.to(tl.int64), mask=mask)


@triton.jit
def route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_t,
    eps,
    scale,
    HOW: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    route_rows(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, tl.program_id(0), tl.num_programs(0), stride_t,
        eps, scale, HOW, 1, "",
    )  # fmt: skip
