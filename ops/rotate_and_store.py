"""Turn queries and keys as `rotate` does, and write keys and values to a cache in the same launch.

k_cache[:, :, position] = k' and v_cache[:, :, position] = v, with q' and k' those of `rotate`.

It and `rotate_and_push` alone write to their inputs. Graphs hold it functionalised, and Inductor,
which knows who else reads a cache, lets it write in place. On Hopper it writes, as it reads, only
after all kernels before it are done (ops/_overlap.py), so that none of them still reads the cache.

Letters: B batch, Q tokens, A query heads, G key heads, D features, F features of values, R features
    that are turned, S positions of the cache.
Shapes: q, k, cos, sin and weights as of `rotate`, v [B, Q, G, F], caches [B, G, S, D] and
    [B, G, S, F], position [Q] -> q' [B, A, Q, D], stored as [B, Q, A, D]. Any strides.
    Positions are in [-S, S), negative ones from the end; on a GPU what is outside is not stored.
Dtypes: float32, float16 or bfloat16, the same for all; position int64.
Errors: ValueError for other ranks, dtypes or shapes, or tensors on several devices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_same_device
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._rotate_kernel import heads_of_program, rotate_heads, with_unit_stride
from moe_compile.ops.rotate import check_rotate, empty_heads, rotate_reference


def rotate_and_store_reference(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    v_BQGF: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    position_Q: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What `rotate_and_store` means, in plain PyTorch."""
    q, k = rotate_reference(q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D, eps)
    k_cache_BGSD[:, :, position_Q] = k
    v_cache_BGSF[:, :, position_Q] = v_BQGF.transpose(1, 2)
    return q


@triton.jit
def _rotate_and_store_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    position_ptr,
    Q,
    A,
    G,
    S,
    eps,
    stride_qb,
    stride_qq,
    stride_qh,
    stride_kb,
    stride_kq,
    stride_kh,
    stride_vb,
    stride_vq,
    stride_vh,
    stride_cb,
    stride_cq,
    stride_sb,
    stride_sq,
    stride_kcb,
    stride_kcg,
    stride_kcs,
    stride_vcb,
    stride_vcg,
    stride_vcs,
    stride_p,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_F: tl.constexpr,
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
    blocks_of_k = tl.cdiv(G, HEADS)
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
        position = tl.load(position_ptr + place * stride_p).to(tl.int64)
        position = tl.where(position < 0, position + S, position)
        stored = tl.where((position >= 0) & (position < S), G, 0)
        if block < blocks_of_q + blocks_of_k:
            rotate_heads(
                k_ptr + batch * stride_kb + place * stride_kq,
                stride_kh,
                k_weight_ptr,
                cos_ptr,
                sin_ptr,
                k_cache_ptr + batch * stride_kcb + position * stride_kcs,
                stride_kcg,
                (block - blocks_of_q) * HEADS,
                stored,
                eps,
                HAS_K_WEIGHT,
                D,
                R,
                HEADS,
                BLOCK_L,
                BLOCK_U,
                INTERPRETED,
            )
        else:
            head = (block - blocks_of_q - blocks_of_k) * HEADS + tl.arange(0, HEADS)
            head = head.to(tl.int64)[:, None]
            f = tl.arange(0, BLOCK_F)[None, :]
            is_in = (head < stored) & (f < F)
            v_ptrs = v_ptr + batch * stride_vb + place * stride_vq + head * stride_vh + f
            v = tl.load(v_ptrs, mask=is_in, other=0.0)
            out_ptrs = v_cache_ptr + batch * stride_vcb + position * stride_vcs
            tl.store(out_ptrs + head * stride_vcg + f, v, mask=is_in)


def rotate_and_store_triton(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    v_BQGF: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    position_Q: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    heads: int | None = None,
) -> Tensor:
    """Launch a program for each token and head of queries, keys and values, or for four heads.

    heads: of a program, a power of two; by default as `rotate` takes.
    """
    weights = q_weight_D, k_weight_D
    caches = k_cache_BGSD, v_cache_BGSF
    _check(q_BQAD, k_BQGD, v_BQGF, cos_BQR, sin_BQR, *caches, position_Q, *weights)
    q_out = empty_heads(q_BQAD)
    (B, Q, A, D), (G, F), R = q_BQAD.shape, v_BQGF.shape[2:], cos_BQR.shape[2]
    if B * Q == 0:
        return q_out
    q, k, v, cos, sin = map(with_unit_stride, (q_BQAD, k_BQGD, v_BQGF, cos_BQR, sin_BQR))
    cos, sin = cos.expand(B, Q, R), sin.expand(B, Q, R)
    heads = heads or heads_of_program(B * Q * (A + 2 * G))
    _rotate_and_store_kernel[(B * Q, triton.cdiv(A, heads) + 2 * triton.cdiv(G, heads))](
        q,
        k,
        v,
        cos,
        sin,
        q if q_weight_D is None else q_weight_D.contiguous(),
        k if k_weight_D is None else k_weight_D.contiguous(),
        q_out,
        *caches,
        position_Q,
        Q,
        A,
        G,
        k_cache_BGSD.shape[2],
        eps,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        *k_cache_BGSD.stride()[:3],
        *v_cache_BGSF.stride()[:3],
        position_Q.stride(0),
        HAS_Q_WEIGHT=q_weight_D is not None,
        HAS_K_WEIGHT=k_weight_D is not None,
        D=D,
        F=F,
        R=R,
        HEADS=heads,
        BLOCK_L=triton.next_power_of_2(R // 2),
        BLOCK_U=triton.next_power_of_2(max(1, D - R)),
        BLOCK_F=triton.next_power_of_2(F),
        INTERPRETED=not q.is_cuda,
        num_warps=heads,
        **overlap(q),
    )
    return q_out


def _check(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    v_BQGF: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    position_Q: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
) -> None:
    op = "rotate_and_store"
    check_rotate(op, q_BQAD, k_BQGD, cos_BQR, sin_BQR, q_weight_D, k_weight_D)
    check_dims(op, "v", v_BQGF, "[B, Q, G, F]")
    check_dims(op, "k_cache", k_cache_BGSD, "[B, G, S, D]")
    check_dims(op, "v_cache", v_cache_BGSF, "[B, G, S, F]")
    check_dims(op, "position", position_Q, "[Q]")
    (B, Q, G, D), F, S = k_BQGD.shape, v_BQGF.shape[3], k_cache_BGSD.shape[2]
    check(v_BQGF.shape == (B, Q, G, F), op, f"v [{B}, {Q}, {G}, F] for k", v_BQGF.shape)
    for name, x, features in ("k_cache", k_cache_BGSD, D), ("v_cache", v_cache_BGSF, F):
        shape = (B, G, S, features)
        check(x.shape == shape, op, f"{name} {list(shape)}", x.shape)
        check(x.stride(3) == 1, op, f"{name} with features beside each other", x.stride())
    check(position_Q.shape == (Q,), op, f"position [{Q}]", position_Q.shape)
    if position_Q.dtype != torch.int64:
        check(False, op, "int64 position", position_Q.dtype)
    others = {"v": v_BQGF, "k_cache": k_cache_BGSD, "v_cache": v_cache_BGSF}
    for name, x in others.items():
        check(x.dtype == q_BQAD.dtype, op, f"{name} in q's dtype {q_BQAD.dtype}", x.dtype)
    check_same_device(op, q=q_BQAD, position=position_Q, **others)


def _fake(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    v_BQGF: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    position_Q: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    caches, weights = (k_cache_BGSD, v_cache_BGSF), (q_weight_D, k_weight_D)
    _check(q_BQAD, k_BQGD, v_BQGF, cos_BQR, sin_BQR, *caches, position_Q, *weights)
    return empty_heads(q_BQAD)


def _cpu(
    q_BQAD: Tensor,
    k_BQGD: Tensor,
    v_BQGF: Tensor,
    cos_BQR: Tensor,
    sin_BQR: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    position_Q: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    given = q_BQAD, k_BQGD, v_BQGF, cos_BQR, sin_BQR, k_cache_BGSD, v_cache_BGSF, position_Q
    _check(*given, q_weight_D, k_weight_D)
    q = rotate_and_store_reference(*given, q_weight_D, k_weight_D, eps)
    return empty_heads(q_BQAD).copy_(q)


rotate_and_store = define(
    "rotate_and_store(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor position, Tensor? q_weight=None, Tensor? k_weight=None, "
    "float eps=1e-6) -> Tensor",
    cpu=_cpu,
    cuda=rotate_and_store_triton,
    fake=_fake,
)
