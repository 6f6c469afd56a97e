"""The kernel of `route`: one program, mostly one warp, for one token.

`_route_many_kernel.py` has the one of several tokens, for many tokens and few experts.

A value and the expert it belongs to travel as one int64 key: the float's bits in an order that
compares as an integer (NaN above everything, -0 equal to 0), then the expert's number counted down.
So one integer maximum gives the best value and, of equal ones, the lowest expert; and whatever the
logits hold, K maxima give K different experts in range.
"""

import triton
import triton.language as tl

from moe_compile.ops._overlap import wait_for_previous


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
def _keys(x, ids):  # type: ignore[no-untyped-def]
    return (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _value(key):  # type: ignore[no-untyped-def]
    return _unordered((key >> 32).to(tl.int32))


@triton.jit
def _id(key):  # type: ignore[no-untyped-def]
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _score(x, top, total, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`top` and `total` are softmax's: the largest logit, and the sum of exp(logit - top)."""
    if SCORE == "softmax":
        return tl.exp(x - top) / total
    if SCORE == "sigmoid":
        return tl.sigmoid(x)
    return x


@triton.jit
def _largest(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """The maximum, or NaN where there is one; the hardware's maximum drops NaN."""
    has_nan = tl.max((x != x).to(tl.int32), axis) > 0
    return tl.where(has_nan, float("nan"), tl.max(x, axis))


@triton.jit
def _keep_groups(  # type: ignore[no-untyped-def]
    choice, ids, inside, num_groups, top_groups, PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr
):
    """-inf for every expert outside the `top_groups` groups whose best 1 or 2 sum highest."""
    TAKEN = -0x8000000000000000  # below the key of every float
    groups = tl.arange(0, BLOCK_P)
    keys = tl.where(inside, _keys(choice, ids), TAKEN)
    first = tl.max(keys, 1)
    best = _value(first)
    if PER_GROUP == 2:
        best += _value(tl.max(tl.where(keys == first[:, None], TAKEN, keys), 1))
    keys = tl.where(groups < num_groups, _keys(best, groups), TAKEN)
    kept = groups < 0
    for _ in range(top_groups):
        key = tl.max(keys, 0)
        kept = kept | (keys == key)
        keys = tl.where(keys == key, TAKEN, keys)
    return tl.where(kept[:, None], choice, float("-inf"))


@triton.jit
def route_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_t,
    per_group,
    num_groups,
    top_groups,
    eps,
    scale,
    K: tl.constexpr,
    SCORE: tl.constexpr,
    SCORE_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    TAKEN = -0x8000000000000000
    token = tl.program_id(0).to(tl.int64)
    row = logits_ptr + token * stride_t
    group = tl.arange(0, BLOCK_P)[:, None]
    slot = tl.arange(0, BLOCK_S)[None, :]
    ids = group * per_group + slot  # [groups, experts of a group]
    inside = (group < num_groups) & (slot < per_group)
    logits = tl.load(row + ids, mask=inside, other=float("-inf")).to(tl.float32)

    top = 0.0
    total = 1.0
    if SCORE_FIRST and SCORE == "softmax":
        top = _largest(_largest(logits, 1), 0)
        total = tl.sum(tl.sum(tl.exp(logits - top), 1), 0)
    choice = _score(logits, top, total, SCORE) if SCORE_FIRST else logits
    if HAS_BIAS:
        choice += tl.load(bias_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    if GROUPED:
        choice = _keep_groups(choice, ids, inside, num_groups, top_groups, PER_GROUP, BLOCK_P)

    keys = tl.reshape(tl.where(inside, _keys(choice, ids), TAKEN), [BLOCK_P * BLOCK_S])
    slots = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for k in range(K):
        key = tl.max(keys, 0)
        chosen = tl.where(slots == k, _id(key), chosen)
        keys = tl.where(keys == key, TAKEN, keys)

    # Their logits are read again, from L1, rather than carried through the search.
    real = slots < K
    x = tl.load(row + chosen, mask=real, other=float("-inf")).to(tl.float32)
    if not SCORE_FIRST and SCORE == "softmax":
        top = _largest(x, 0)
        total = tl.sum(tl.exp(x - top), 0)
    weights = tl.where(real, _score(x, top, total, SCORE), 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + eps)
    tl.store(weights_ptr + token * K + slots, weights * scale, mask=real)
    tl.store(ids_ptr + token * K + slots, chosen.to(tl.int64), mask=real)
