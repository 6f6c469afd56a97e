"""Turn the heads of queries and keys by the angles of their positions, after their RMSNorm: one
launch for what a decode step does between its projections and its cache.

y = x * rsqrt(mean(x ** 2) + eps) * weight where a weight is given, else x; then of the first R
features
    y' = y * cos + cat(-y[R / 2 :], y[: R / 2]) * sin
and of the others y' = y.

Letters: B batch, Q tokens, A query heads, G key heads, H heads of either, D features, R features
    that are turned (even, up to D).
Shapes: q [B, Q, A, D], k [B, Q, G, D], cos and sin [B or 1, Q, R], weights [D]
    -> q' [B, A, Q, D] and k' [B, G, Q, D], stored as [B, Q, A, D] and [B, Q, G, D]. B and Q may
    be 0. Any strides; heads whose features are not beside each other are copied first.
Dtypes: float32, float16 or bfloat16, the same for all, also returned. Rounded where PyTorch rounds:
    the norm is computed in float32 and rounded, and so is each product and sum after it.
Errors: ValueError for other ranks, dtypes or shapes, or tensors on several devices.
Source: RoFormer, Su et al. 2021, arXiv:2104.09864, eq. 34, with halves for its pairs, as in
    transformers' `apply_rotary_pos_emb`; RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float, check_same_device
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._rotate_kernel import heads_of_program, rotate_heads, with_unit_stride


def rotate_reference(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """What `rotate` means, in plain PyTorch and with the roundings of the dtype it is given."""
    cos_BQ1R, sin_BQ1R = cos_BQR.unsqueeze(2), sin_BQR.unsqueeze(2)
    q_BQAD, k_BQGD = _normed(q_BQAD, q_weight_D, eps), _normed(k_BQGD, k_weight_D, eps)
    q_BQAD, k_BQGD = (_turned(x, cos_BQ1R, sin_BQ1R) for x in (q_BQAD, k_BQGD))
    return q_BQAD.transpose(1, 2), k_BQGD.transpose(1, 2)


def _normed(x_BQHD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    if weight_D is None:
        return x_BQHD
    wide = x_BQHD.to(torch.promote_types(x_BQHD.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x_BQHD.dtype) * weight_D


def _turned(x_BQHD: Tensor, cos_BQ1R: Tensor, sin_BQ1R: Tensor) -> Tensor:
    R = cos_BQ1R.shape[-1]
    x_BQHR = x_BQHD[..., :R]
    low, high = x_BQHR.chunk(2, -1)
    turned = x_BQHR * cos_BQ1R + torch.cat([-high, low], -1) * sin_BQ1R
    return torch.cat([turned, x_BQHD[..., R:]], -1)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    Q,
    A,
    G,
    eps,
    stride_qb,
    stride_qq,
    stride_qh,
    stride_kb,
    stride_kq,
    stride_kh,
    stride_cb,
    stride_cq,
    stride_sb,
    stride_sq,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // Q, token % Q
    block = tl.program_id(1)
    cos_ptr += batch * stride_cb + place * stride_cq
    sin_ptr += batch * stride_sb + place * stride_sq
    blocks_of_q = tl.cdiv(A, HEADS)
    if block < blocks_of_q:
        rotate_heads(
            q_ptr + batch * stride_qb + place * stride_qq,
            stride_qh,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr + token * A * D,
            D,
            block * HEADS,
            A,
            eps,
            HAS_Q_WEIGHT,
            D,
            R,
            HEADS,
            BLOCK_L,
            BLOCK_U,
            INTERPRETED,
        )
    else:
        rotate_heads(
            k_ptr + batch * stride_kb + place * stride_kq,
            stride_kh,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            k_out_ptr + token * G * D,
            D,
            (block - blocks_of_q) * HEADS,
            G,
            eps,
            HAS_K_WEIGHT,
            D,
            R,
            HEADS,
            BLOCK_L,
            BLOCK_U,
            INTERPRETED,
        )


def rotate_triton(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a program for each token and head, or for four heads of a token where those are many.

    heads: of a program, a power of two; by default as said.
    """
    check_rotate("rotate", q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D)
    q_out, k_out = empty_heads(q_BQAD), empty_heads(k_BQGD)
    (B, Q, A, D), G, R = q_BQAD.shape, k_BQGD.shape[2], cos_BQR.shape[2]
    if B * Q == 0:
        return q_out, k_out
    q, k, cos, sin = map(with_unit_stride, (q_BQAD, k_BQGD, cos_BQR, sin_BQR))
    cos, sin = cos.expand(B, Q, R), sin.expand(B, Q, R)
    heads = heads or heads_of_program(B * Q * (A + G))
    _rotate_kernel[(B * Q, triton.cdiv(A, heads) + triton.cdiv(G, heads))](
        q,
        k,
        cos,
        sin,
        q if q_weight_D is None else q_weight_D.contiguous(),
        k if k_weight_D is None else k_weight_D.contiguous(),
        q_out,
        k_out,
        Q,
        A,
        G,
        eps,
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        HAS_Q_WEIGHT=q_weight_D is not None,
        HAS_K_WEIGHT=k_weight_D is not None,
        D=D,
        R=R,
        HEADS=heads,
        BLOCK_L=triton.next_power_of_2(R // 2),
        BLOCK_U=triton.next_power_of_2(max(1, D - R)),
        INTERPRETED=not q.is_cuda,
        num_warps=heads,
        **overlap(q),
    )
    return q_out, k_out


def empty_heads(x_BQHD: Tensor) -> Tensor:
    """[B, H, Q, D], in memory as [B, Q, H, D]."""
    return x_BQHD.new_empty(x_BQHD.shape).transpose(1, 2)


def check_rotate(
    op: str,
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
) -> None:
    """The inputs are such as `rotate` takes."""
    check_dims(op, "q", q_BQAD, "[B, Q, A, D]")
    check_dims(op, "k", k_BQGD, "[B, Q, G, D]")
    check_float(op, "q", q_BQAD)
    (B, Q, _, D), G = q_BQAD.shape, k_BQGD.shape[2]
    check(k_BQGD.shape == (B, Q, G, D), op, f"k [{B}, {Q}, G, {D}] for q", k_BQGD.shape)
    for name, x in ("cos", cos_BQR), ("sin", sin_BQR):
        check_dims(op, name, x, "[B or 1, Q, R]")
        fits = x.shape[0] in (1, B) and x.shape[1] == Q
        check(fits, op, f"{name} [{B} or 1, {Q}, R]", x.shape)
    R = cos_BQR.shape[2]
    check(0 < R <= D and R % 2 == 0, op, f"an even number R of turned features, up to {D}", R)
    check(sin_BQR.shape[2] == R, op, f"sin of cos' {R} features", sin_BQR.shape)
    for name, weight in ("q_weight", q_weight_D), ("k_weight", k_weight_D):
        if weight is not None:
            check(weight.shape == (D,), op, f"{name} [{D}]", weight.shape)
    given: dict[str, Tensor | None] = {"k": k_BQGD, "cos": cos_BQR, "sin": sin_BQR}
    given |= {"q_weight": q_weight_D, "k_weight": k_weight_D}
    for name, other in given.items():
        if other is not None and other.dtype != q_BQAD.dtype:
            check(False, op, f"{name} in q's dtype {q_BQAD.dtype}", other.dtype)
    check_same_device(op, q=q_BQAD, **given)


def _fake(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    check_rotate("rotate", q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D)
    return empty_heads(q_BQAD), empty_heads(k_BQGD)


def _cpu(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    check_rotate("rotate", q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D)
    tensors = q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D
    q_out, k_out = rotate_reference(*tensors, eps)
    return empty_heads(q_BQAD).copy_(q_out), empty_heads(k_BQGD).copy_(k_out)


rotate = define(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, "
    "Tensor? k_weight=None, float eps=1e-6) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=rotate_triton,
    fake=_fake,
)
