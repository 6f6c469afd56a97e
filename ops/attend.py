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
Queries and keys may come in two parts, q and k and q_rot and k_rot, whose products are added up.
Without v, k are the values, too. So latents (MLA) and their rotary part are attended to where they
lie, and read once.

Letters: B batch, A query heads, G key heads (A a multiple of G), Q queries, S positions, D features
    of queries and keys, U of their second parts, F of values.
Shapes: q [B, A, Q, D], k [B, G, S, D], v [B, G, S, F], mask [B or 1, A or 1, Q or 1, S] or
    last [B or 1], sinks [B or 1, A], q_rot [B, A, Q, U] and k_rot [B, G, S, U] -> [B, A, Q, F],
    stored as [B, Q, A, F], which is the order that a model goes on with. Q up to MOST_QUERIES, D, F
    and U up to MOST_FEATURES, but D up to MOST_LATENTS without v; B and S may be 0.
    scale is 1 / sqrt(D + U) by default.
Dtypes: q, k, v, q_rot and k_rot float32, float16 or bfloat16, all the same, also returned; mask
    bool or one of these, of its own; sinks one of these, of their own; last int64 or int32. Softmax
    and sums in float32; as factors of v the weights have v's dtype.
Errors: ValueError for other ranks, dtypes or shapes, for a mask and last together, for one second
    part alone, or tensors on several devices.
Source: Flash-Decoding, Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html:
    positions are split over programs, and their results put together by their softmax' sums; the
    softmax as it goes of FlashAttention, Dao et al. 2022, arXiv:2205.14135. Sinks are those of
    gpt-oss, OpenAI 2025, arXiv:2508.10925; latents those of DeepSeek-V2, 2024, arXiv:2405.04434.
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
MOST_LATENTS = 512


def attend_reference(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor | None,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
    q_rot: Tensor | None = None,
    k_rot: Tensor | None = None,
) -> Tensor:
    """What `attend` means, in plain PyTorch and in the dtype it is given."""
    v_BGSF = k_BGSD if v_BGSF is None else v_BGSF
    if q_rot is not None and k_rot is not None:
        q_BAQD, k_BGSD = torch.cat([q_BAQD, q_rot], -1), torch.cat([k_BGSD, k_rot], -1)
    (B, A, Q, D), (G, S) = q_BAQD.shape, k_BGSD.shape[1:3]
    if last is not None:
        mask = torch.arange(S, device=last.device) <= last.reshape(-1, 1, 1, 1)
    elif mask is None:
        mask = q_BAQD.new_ones(1, 1, 1, S, dtype=torch.bool)
    mask_BAQS = mask.expand(B, A, Q, S)
    is_open = mask_BAQS if mask.dtype == torch.bool else mask_BAQS != -math.inf
    is_read_BGS1 = is_open.reshape(B, G, A // G * Q, S).any(2).unsqueeze(-1)
    k_BGSD, v_BGSF = (torch.where(is_read_BGS1, x, 0) for x in (k_BGSD, v_BGSF))
    scores = (q_BAQD.reshape(B, G, A // G * Q, D) @ k_BGSD.mT).reshape(B, A, Q, S)
    scores = scores * (D**-0.5 if scale is None else scale)
    if mask.dtype != torch.bool:
        scores = scores + mask_BAQS.to(scores.dtype)
    scores = scores.masked_fill(~is_open, -math.inf)
    if sinks is not None:
        sinks_BAQ1 = sinks.to(scores.dtype)[..., None, None].expand(B, A, Q, 1)
        scores = torch.cat([scores, sinks_BAQ1], -1)
    weights = scores.softmax(-1)[..., :S]
    weights = torch.where(is_open, weights, 0).reshape(B, G, A // G * Q, S)
    return (weights @ v_BGSF).reshape(B, A, Q, v_BGSF.shape[3])


def attend_triton(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor | None,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
    q_rot: Tensor | None = None,
    k_rot: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernels: a program for each key head and split, then one for each row of out."""
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks, q_rot, k_rot)
    (B, A, Q, D), S = q_BAQD.shape, k_BGSD.shape[2]
    out_BAQF = _empty(q_BAQD, k_BGSD, v_BGSF)
    if out_BAQF.numel() == 0 or S == 0:
        return out_BAQF.zero_()
    q, k, rot, v = *map(_with_unit_stride, (q_BAQD, k_BGSD)), None, v_BGSF
    if q_rot is not None and k_rot is not None:
        rot, D = (_with_unit_stride(q_rot), _with_unit_stride(k_rot)), D + q_rot.shape[3]
    v = None if v is None else _with_unit_stride(v)
    mask_BAQS = None if mask is None else _with_unit_stride(mask).expand(B, A, Q, S)
    scale = D**-0.5 if scale is None else scale
    sinks = None if sinks is None else _with_unit_stride(sinks).expand(B, A)
    launch(q, k, v, mask_BAQS, last, sinks, rot, out_BAQF, scale, blocks)
    return out_BAQF


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(q_BAQD: Tensor, k_BGSD: Tensor, v_BGSF: Tensor | None) -> Tensor:
    """out [B, A, Q, F] such that its [B, Q, A * F], which a model goes on with, is a view."""
    B, A, Q, _ = q_BAQD.shape
    F = (k_BGSD if v_BGSF is None else v_BGSF).shape[3]
    return q_BAQD.new_empty(B, Q, A, F).transpose(1, 2)


def _check(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor | None,
    mask: Tensor | None,
    last: Tensor | None,
    sinks: Tensor | None,
    q_rot: Tensor | None,
    k_rot: Tensor | None,
) -> None:
    op = "attend"
    check_dims(op, "q", q_BAQD, "[B, A, Q, D]")
    check_dims(op, "k", k_BGSD, "[B, G, S, D]")
    if v_BGSF is not None:
        check_dims(op, "v", v_BGSF, "[B, G, S, F]")
    check_float(op, "q", q_BAQD)
    for name, x in {"k": k_BGSD, "v": v_BGSF, "q_rot": q_rot, "k_rot": k_rot}.items():
        if x is not None:
            expected = f"{name} in q's dtype {q_BAQD.dtype}"
            check(x.dtype == q_BAQD.dtype, op, expected, x.dtype)
    tensors = {"mask": mask, "last": last, "sinks": sinks, "q_rot": q_rot, "k_rot": k_rot}
    check_same_device(op, q=q_BAQD, k=k_BGSD, v=v_BGSF, **tensors)
    _check_shapes(op, q_BAQD, k_BGSD, v_BGSF)
    (B, A, Q, _), (G, S) = q_BAQD.shape, k_BGSD.shape[1:3]
    if q_rot is not None or k_rot is not None:
        _check_rot(op, q_rot, k_rot, (B, A, Q), (B, G, S))
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


def _check_shapes(op: str, q_BAQD: Tensor, k_BGSD: Tensor, v_BGSF: Tensor | None) -> None:
    (B, A, Q, D), (_, G, S, F) = q_BAQD.shape, (k_BGSD if v_BGSF is None else v_BGSF).shape
    most = MOST_LATENTS if v_BGSF is None else MOST_FEATURES
    check(Q <= MOST_QUERIES, op, f"up to {MOST_QUERIES} queries", Q)
    for features in (D, F):
        check(features <= most, op, f"up to {most} features", features)
    others = "q" if v_BGSF is None else "q and v"
    check(k_BGSD.shape == (B, G, S, D), op, f"k [{B}, {G}, {S}, {D}] for {others}", k_BGSD.shape)
    if v_BGSF is not None:
        check(v_BGSF.shape[0] == B, op, f"v [{B}, G, S, F] for q", v_BGSF.shape)
    check(G > 0 and A % G == 0, op, f"query heads in multiples of v's {G} heads", A)


def _check_rot(
    op: str,
    q_rot: Tensor | None,
    k_rot: Tensor | None,
    queries: tuple[int, int, int],
    positions: tuple[int, int, int],
) -> None:
    if q_rot is None or k_rot is None:
        check(False, op, "q_rot and k_rot, or neither", "one")
        return
    for name, x, shape in ("q_rot", q_rot, queries), ("k_rot", k_rot, positions):
        expected = f"{name} [{', '.join(map(str, shape))}, U]"
        check_dims(op, name, x, "[B, A or G, Q or S, U]")
        check(x.shape[:3] == shape, op, expected, x.shape)
    U = q_rot.shape[3]
    check(k_rot.shape[3] == U, op, f"{U} features of k_rot, as of q_rot", k_rot.shape[3])
    check(U <= MOST_FEATURES, op, f"up to {MOST_FEATURES} features", U)


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
    v_BGSF: Tensor | None,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
    q_rot: Tensor | None = None,
    k_rot: Tensor | None = None,
) -> Tensor:
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks, q_rot, k_rot)
    return _empty(q_BAQD, k_BGSD, v_BGSF)


def _cpu(
    q_BAQD: Tensor,
    k_BGSD: Tensor,
    v_BGSF: Tensor | None,
    mask: Tensor | None = None,
    scale: float | None = None,
    last: Tensor | None = None,
    sinks: Tensor | None = None,
    q_rot: Tensor | None = None,
    k_rot: Tensor | None = None,
) -> Tensor:
    _check(q_BAQD, k_BGSD, v_BGSF, mask, last, sinks, q_rot, k_rot)
    v, q2, k2 = (None if x is None else x.float() for x in (v_BGSF, q_rot, k_rot))
    out = attend_reference(q_BAQD.float(), k_BGSD.float(), v, mask, scale, last, sinks, q2, k2)
    return _empty(q_BAQD, k_BGSD, v_BGSF).copy_(out)


attend = define(
    "attend(Tensor q, Tensor k, Tensor? v, Tensor? mask=None, float? scale=None, Tensor? last=None,"
    " Tensor? sinks=None, Tensor? q_rot=None, Tensor? k_rot=None) -> Tensor",
    cpu=_cpu,
    cuda=attend_triton,
    fake=_fake,
)
