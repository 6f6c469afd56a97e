"""Turn queries and keys of one token as `rotate` does, and push keys and values into full caches.

Each position of a cache gets what the next one held, and the last one the new keys or values:

    k_cache = cat(k_cache[:, :, 1:], k')    v_cache = cat(v_cache[:, :, 1:], v)

with the k' of `rotate`. So a window slides on. Like `rotate_and_store` it writes to its inputs when
all kernels before it are done, and graphs hold it functionalised.

Letters: B batch, A query heads, G key heads, D features, F features of values, R features that are
    turned, S positions of the cache.
Shapes: q, k, cos, sin and weights as of `rotate` with Q = 1, v [B, 1, G, F], caches [B, G, S, D]
    and [B, G, S, F] -> q' [B, A, 1, D], stored as [B, 1, A, D]. Any strides. S is at least 1.
Dtypes: float32, float16 or bfloat16, the same for all.
Errors: ValueError for other ranks, dtypes or shapes, or tensors on several devices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_same_device
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap, wait_for_previous
from moe_compile.ops._rotate_kernel import rotate_heads, with_unit_stride
from moe_compile.ops.rotate import check_rotate, empty_heads, rotate_reference

# Of a head: one program moves it, as no other may write before it has read. In bfloat16 128 KB and
# eight blocks. Not measured yet.
MOST_ELEMENTS = 2**16
_BLOCK = 2**13  # elements moved at a time
_WARPS = 8
_HEADS = 8  # of queries in a program


def rotate_and_push_reference(
    q_B1AD: Tensor,
    k_B1GD: Tensor,
    v_B1GF: Tensor,
    cos_B1R: Tensor,
    sin_B1R: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What `rotate_and_push` means, in plain PyTorch."""
    q, k = rotate_reference(q_B1AD, k_B1GD, cos_B1R, sin_B1R, q_weight_D, k_weight_D, eps)
    for cache, new in ((k_cache_BGSD, k), (v_cache_BGSF, v_B1GF.transpose(1, 2))):
        cache.copy_(torch.cat([cache[:, :, 1:], new], 2))
    return q


@triton.jit
def _move_up(  # type: ignore[no-untyped-def]
    cache_ptr, stride_s, S, F: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Each position of a head gets what the next one holds: all of a block is read before any of it
    is written, and no later block reads that."""
    s = tl.arange(0, BLOCK_S)[:, None]
    f = tl.arange(0, BLOCK_F)[None, :]
    ptrs = cache_ptr + s.to(tl.int64) * stride_s + f
    step = tl.full([], BLOCK_S, tl.int64) * stride_s
    for start in range(0, S - 1, BLOCK_S):
        is_in = (s < S - 1 - start) & (f < F)
        x = tl.load(ptrs + stride_s, mask=is_in)
        tl.debug_barrier()
        tl.store(ptrs, x, mask=is_in)
        ptrs += step


@triton.jit
def _rotate_and_push_kernel(  # type: ignore[no-untyped-def]
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
    A,
    G,
    S,
    eps,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_cb,
    stride_sb,
    stride_kcb,
    stride_kcg,
    stride_kcs,
    stride_vcb,
    stride_vcg,
    stride_vcs,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    K_POSITIONS: tl.constexpr,
    V_POSITIONS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    batch = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)  # heads of caches first, which take longest
    last = tl.full([], 0, tl.int64) + S - 1
    cos_ptr += batch * stride_cb
    sin_ptr += batch * stride_sb
    if program < G:
        head = program.to(tl.int64)
        cache_ptr = k_cache_ptr + batch * stride_kcb + head * stride_kcg
        _move_up(cache_ptr, stride_kcs, S, D, K_POSITIONS, BLOCK_D)
        rotate_heads(
            k_ptr + batch * stride_kb + head * stride_kh,
            0,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            cache_ptr + last * stride_kcs,
            0,
            0,
            1,
            eps,
            HAS_K_WEIGHT,
            D,
            R,
            1,
            BLOCK_L,
            BLOCK_U,
            INTERPRETED,
        )
    elif program < 2 * G:
        head = (program - G).to(tl.int64)
        cache_ptr = v_cache_ptr + batch * stride_vcb + head * stride_vcg
        _move_up(cache_ptr, stride_vcs, S, F, V_POSITIONS, BLOCK_F)
        f = tl.arange(0, BLOCK_F)
        v = tl.load(v_ptr + batch * stride_vb + head * stride_vh + f, mask=f < F)
        tl.store(cache_ptr + last * stride_vcs + f, v, mask=f < F)
    else:
        rotate_heads(
            q_ptr + batch * stride_qb,
            stride_qh,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr + batch * A * D,
            D,
            (program - 2 * G) * HEADS,
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


def rotate_and_push_triton(
    q_B1AD: Tensor,
    k_B1GD: Tensor,
    v_B1GF: Tensor,
    cos_B1R: Tensor,
    sin_B1R: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
    block: int = _BLOCK,
) -> Tensor:
    """Launch a program for each head of a cache, and for some heads of queries.

    block: elements that a program moves at a time, a power of two.
    """
    caches, weights = (k_cache_BGSD, v_cache_BGSF), (q_weight_D, k_weight_D)
    _check(q_B1AD, k_B1GD, v_B1GF, cos_B1R, sin_B1R, *caches, *weights)
    q_out = empty_heads(q_B1AD)
    (B, _, A, D), (G, F), R = q_B1AD.shape, v_B1GF.shape[2:], cos_B1R.shape[2]
    if B == 0:
        return q_out
    q, k, v, cos, sin = map(with_unit_stride, (q_B1AD, k_B1GD, v_B1GF, cos_B1R, sin_B1R))
    cos, sin = cos.expand(B, 1, R), sin.expand(B, 1, R)
    S, up = k_cache_BGSD.shape[2], triton.next_power_of_2
    positions = [min(up(max(1, S - 1)), max(1, block // up(n))) for n in (D, F)]
    _rotate_and_push_kernel[(B, 2 * G + triton.cdiv(A, _HEADS))](
        q,
        k,
        v,
        cos,
        sin,
        q if q_weight_D is None else q_weight_D.contiguous(),
        k if k_weight_D is None else k_weight_D.contiguous(),
        q_out,
        *caches,
        A,
        G,
        S,
        eps,
        *(stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))),
        cos.stride(0),
        sin.stride(0),
        *k_cache_BGSD.stride()[:3],
        *v_cache_BGSF.stride()[:3],
        HAS_Q_WEIGHT=q_weight_D is not None,
        HAS_K_WEIGHT=k_weight_D is not None,
        D=D,
        F=F,
        R=R,
        HEADS=_HEADS,
        BLOCK_L=up(R // 2),
        BLOCK_U=up(max(1, D - R)),
        BLOCK_D=up(D),
        BLOCK_F=up(F),
        K_POSITIONS=positions[0],
        V_POSITIONS=positions[1],
        INTERPRETED=not q.is_cuda,
        num_warps=_WARPS,
        **overlap(q),
    )
    return q_out


def _check(
    q_B1AD: Tensor,
    k_B1GD: Tensor,
    v_B1GF: Tensor,
    cos_B1R: Tensor,
    sin_B1R: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
) -> None:
    op = "rotate_and_push"
    check_rotate(op, q_B1AD, k_B1GD, cos_B1R, sin_B1R, q_weight_D, k_weight_D)
    check_dims(op, "v", v_B1GF, "[B, 1, G, F]")
    check_dims(op, "k_cache", k_cache_BGSD, "[B, G, S, D]")
    (B, Q, G, D), F, S = k_B1GD.shape, v_B1GF.shape[3], k_cache_BGSD.shape[2]
    check(Q == 1, op, "one token", Q)
    check(v_B1GF.shape == (B, 1, G, F), op, f"v [{B}, 1, {G}, F] for k", v_B1GF.shape)
    check(S > 0, op, "at least one position", S)
    for name, x, features in ("k_cache", k_cache_BGSD, D), ("v_cache", v_cache_BGSF, F):
        shape = (B, G, S, features)
        check(x.shape == shape, op, f"{name} {list(shape)}", x.shape)
        check(x.stride(3) == 1, op, f"{name} with features beside each other", x.stride())
    others = {"v": v_B1GF, "k_cache": k_cache_BGSD, "v_cache": v_cache_BGSF}
    for name, x in others.items():
        check(x.dtype == q_B1AD.dtype, op, f"{name} in q's dtype {q_B1AD.dtype}", x.dtype)
    check_same_device(op, q=q_B1AD, **others)


def _fake(
    q_B1AD: Tensor,
    k_B1GD: Tensor,
    v_B1GF: Tensor,
    cos_B1R: Tensor,
    sin_B1R: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    caches, weights = (k_cache_BGSD, v_cache_BGSF), (q_weight_D, k_weight_D)
    _check(q_B1AD, k_B1GD, v_B1GF, cos_B1R, sin_B1R, *caches, *weights)
    return empty_heads(q_B1AD)


def _cpu(
    q_B1AD: Tensor,
    k_B1GD: Tensor,
    v_B1GF: Tensor,
    cos_B1R: Tensor,
    sin_B1R: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSF: Tensor,
    q_weight_D: Tensor | None = None,
    k_weight_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    given = q_B1AD, k_B1GD, v_B1GF, cos_B1R, sin_B1R, k_cache_BGSD, v_cache_BGSF
    _check(*given, q_weight_D, k_weight_D)
    q = rotate_and_push_reference(*given, q_weight_D, k_weight_D, eps)
    return empty_heads(q_B1AD).copy_(q)


rotate_and_push = define(
    "rotate_and_push(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor? q_weight=None, Tensor? k_weight=None, float eps=1e-6) -> Tensor",
    cpu=_cpu,
    cuda=rotate_and_push_triton,
    fake=_fake,
)
