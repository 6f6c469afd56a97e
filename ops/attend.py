"""Attend with few queries to long keys and values: the attention of a decode step.

out[b, h, i] = sum over s of w[s] * v[b, g, s], with w the softmax over s of
scale * q[b, h, i] . k[b, g, s] + mask[b, h, i, s], and g = h // (A / G): neighbouring query heads
share a key head.
A bool mask says where to attend, a float one is added. Instead of a mask, last says up to which
position of each sequence to attend, that one included; negative, to none. With sinks the softmax
goes over one score more, the sink of the query's head, whose weight is dropped. A query that may
attend to nothing gives zeros. Keys and values that are closed (False, -inf, beyond last) to all
queries of their head are not read, so that what a cache holds beyond its end costs nothing and
reaches nothing.

Letters: B batch, A query heads, G key heads (A a multiple of G), Q queries, S positions, D features
    of queries and keys, F features of values.
Shapes: q [B, A, Q, D], k [B, G, S, D], v [B, G, S, F], mask [B or 1, A or 1, Q or 1, S] or
    last [B or 1], sinks [B or 1, A] -> [B, A, Q, F], stored as [B, Q, A, F], which is the order
    that a model goes on with. Q up to MOST_QUERIES, D and F up to MOST_FEATURES; B and S may be 0.
    scale is 1 / sqrt(D) by default.
Dtypes: q, k and v float32, float16 or bfloat16, all the same, also returned; mask bool or one of
    these, of its own; sinks one of these, of their own; last int64 or int32. Softmax and sums in
    float32; as factors of v the weights have v's dtype.
Errors: ValueError for other ranks, dtypes or shapes, for a mask and last together, or tensors on
    several devices.
Source: Flash-Decoding, Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html:
    positions are split over programs, and their results put together by their softmax' sums; the
    softmax as it goes of FlashAttention, Dao et al. 2022, arXiv:2205.14135. Sinks are those of
    gpt-oss, OpenAI 2025, arXiv:2508.10925.
"""

import math

import torch
from torch import Tensor

from moe_compile.ops._attend_blocks import Blocks
from moe_compile.ops._attend_kernel import launch
from moe_compile.ops._check import FLOATS, check, check_dims, check_float, check_same_device
from moe_compile.ops._library import define

MOST_QUERIES = 8
MOST_FEATURES = 256


def attend_reference(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What `attend` means, in plain PyTorch and in the dtype it is given."""
    (B, A, Q, D), (G, S) = q_BAQD.shape, k_BGSD.shape[1:3]
    if last is not None:
        mask = torch.arange(S, device=last.device) <= last.reshape(-1, 1, 1, 1)
    elif mask is None:
        mask = q_BAQD.new_ones(1, 1, 1, S, dtype=torch.bool)
    mask_BAQS = mask.expand(B, A, Q, S)
    is_open = mask_BAQS if mask.dtype == torch.bool else mask_BAQS != -math.inf
    is_read_BGS1 = is_open.reshape(B, G, A // G * Q, S).any(2).unsqueeze(-1)
    k_BASD = torch.where(is_read_BGS1, k_BGSD, 0).repeat_interleave(A // G, 1)
    v_BASF = torch.where(is_read_BGS1, v_BGSF, 0).repeat_interleave(A // G, 1)
    scores = q_BAQD @ k_BASD.mT * (D**-0.5 if scale is None else scale)
    if mask.dtype != torch.bool:
        scores = scores + mask_BAQS.to(scores.dtype)
    scores = scores.masked_fill(~is_open, -math.inf)
    if sinks is not None:
        sinks_BAQ1 = sinks.to(scores.dtype)[..., None, None].expand(B, A, Q, 1)
        scores = torch.cat([scores, sinks_BAQ1], -1)
    weights = scores.softmax(-1)[..., :S]
    return torch.where(is_open, weights, 0) @ v_BASF


def attend_triton(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernels: a program for each key head and split, then one for each row of out."""
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks)
    (B, A, Q, D), S = q_BAQD.shape, k_BGSD.shape[2]
    out_BAQF = _empty(q_BAQD, v_BGSF)
    if out_BAQF.numel() == 0 or S == 0:
        return out_BAQF.zero_()
    q, k, v = map(_with_unit_stride, (q_BAQD, k_BGSD, v_BGSF))
    mask_BAQS = None if mask is None else _with_unit_stride(mask).expand(B, A, Q, S)
    scale = D**-0.5 if scale is None else scale
    sinks = None if sinks is None else _with_unit_stride(sinks).expand(B, A)
    launch(q, k, v, mask_BAQS, last, sinks, out_BAQF, scale, blocks)
    return out_BAQF


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(q_BAQD: Tensor, v_BGSF: Tensor) -> Tensor:
    """out [B, A, Q, F] such that its [B, Q, A * F], which a model goes on with, is a view."""
    B, A, Q, _ = q_BAQD.shape
    return q_BAQD.new_empty(B, Q, A, v_BGSF.shape[3]).transpose(1, 2)


def _check(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor,
    mask: Tensor | None,
    last: Tensor | None,
    sinks: Tensor | None,
) -> None:
    op = "attend"
    check_dims(op, "q", q_BAQD, "[B, A, Q, D]")
    check_dims(op, "k", k_BGSD, "[B, G, S, D]")
    check_dims(op, "v", v_BGSF, "[B, G, S, F]")
    check_float(op, "q", q_BAQD)
    for name, x in ("k", k_BGSD), ("v", v_BGSF):
        check(x.dtype == q_BAQD.dtype, op, f"{name} in q's dtype {q_BAQD.dtype}", x.dtype)
    check_same_device(op, q=q_BAQD, k=k_BGSD, v=v_BGSF, mask=mask, last=last, sinks=sinks)
    (B, A, Q, D), (G, S, F) = q_BAQD.shape, v_BGSF.shape[1:]
    check(Q <= MOST_QUERIES, op, f"up to {MOST_QUERIES} queries", Q)
    for features in (D, F):
        check(features <= MOST_FEATURES, op, f"up to {MOST_FEATURES} features", features)
    check(k_BGSD.shape == (B, G, S, D), op, f"k [{B}, {G}, {S}, {D}] for q and v", k_BGSD.shape)
    check(v_BGSF.shape[0] == B, op, f"v [{B}, G, S, F] for q", v_BGSF.shape)
    check(G > 0 and A % G == 0, op, f"query heads in multiples of v's {G} heads", A)
    if mask is not None:
        _check_mask(op, mask, (B, A, Q, S))
    if last is not None:
        check(mask is None, op, "a mask or last, not both", "both")
        check_dims(op, "last", last, "[B or 1]")
        check(last.dtype in (torch.int64, torch.int32), op, "last in int64 or int32", last.dtype)
        check(last.shape[0] in (1, B), op, f"last [{B} or 1]", last.shape)
    if sinks is not None:
        check_dims(op, "sinks", sinks, "[B or 1, A]")
        check_float(op, "sinks", sinks)
        fits = sinks.shape[0] in (1, B) and sinks.shape[1] == A
        check(fits, op, f"sinks [{B} or 1, {A}]", sinks.shape)


def _check_mask(op: str, mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    check_dims(op, "mask", mask, "[B or 1, A or 1, Q or 1, S]")
    expected = "mask in bool, float32, float16 or bfloat16"
    check(mask.dtype == torch.bool or mask.dtype in FLOATS, op, expected, mask.dtype)
    fits = all(size in (1, whole) for size, whole in zip(mask.shape[:3], shape, strict=False))
    expected = "mask [{} or 1, {} or 1, {} or 1, {}]".format(*shape)
    check(fits and mask.shape[3] == shape[3], op, expected, mask.shape)


def _fake(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks)
    return _empty(q_BAQD, v_BGSF)


def _cpu(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks)
    q, k, v = q_BAQD.float(), k_BGSD.float(), v_BGSF.float()
    return _empty(q_BAQD, v_BGSF).copy_(attend_reference(q, k, v, mask, scale, last, sinks))


attend = define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask=None, float? scale=None, Tensor? last=None,"
    " Tensor? sinks=None) -> Tensor",
    cpu=_cpu,
    cuda=attend_triton,
    fake=_fake,
)
