"""The kernel of `quant_fp8` and `silu_mul_quant`: rows in float8 with a scale for each group."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_compile.ops._gated import gated, kept_bits, rounded
from moe_compile.ops._overlap import overlap, wait_for_previous

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3


@triton.jit
def to_e4m3(y, dtype, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:
        small = (y * 512.0 + 12582912.0) - 12582912.0  # steps of 2 ** -9 below 2 ** -6
        y = tl.where(tl.abs(y) < 0.015625, small / 512.0, kept_bits(y, 3))
    return y.to(dtype)


@triton.jit
def _quotient(y, scale, DIVIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """y / scale as IEEE rounds it, with one division for each group and not for each value.

    Markstein's correction: the remainder of y * (1 / scale) is exact in an fma, and corrects the
    last bit. It asks for a scale whose inverse is a normal number; DIVIDE where that is not sure.
    """
    if DIVIDE:
        return tl.math.div_rn(y, tl.broadcast_to(scale, y.shape))
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    near = y * inverse
    normal = scale < 1e30  # others are left uncorrected: a remainder of y, times nothing
    rest = tl.fma(-near, tl.broadcast_to(tl.where(normal, scale, 0.0), y.shape), y)
    return tl.fma(rest, tl.broadcast_to(tl.where(normal, inverse, 0.0), y.shape), near)


@triton.jit
def _power_of_two(scale):  # type: ignore[no-untyped-def]
    """The least power of two that is not below the scale."""
    bits = scale.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    # Powers below the normal ones are 2 ** -126; infinity and NaN stay what they are.
    exponent = tl.where(exponent < 1, 1, exponent)
    return tl.where((bits >> 23) == 255, scale, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def quantized(  # type: ignore[no-untyped-def]
    y,
    amax_floor,
    scale_floor,
    POWER_OF_TWO: tl.constexpr,
    SCALE_BY_RECIPROCAL: tl.constexpr,
    QUANT_BY_RECIPROCAL: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    AMAX_EPS: tl.constexpr = 0.0,
    SCALE_EPS: tl.constexpr = 0.0,
):
    """y [rows, groups, group] -> what to cast to float8, and the scale of each group."""
    amax = tl.max(tl.abs(y), 2)
    amax = tl.where(amax < amax_floor, amax_floor, amax)
    if AMAX_EPS != 0.0:
        amax += tl.full(amax.shape, AMAX_EPS, tl.float32)
    if SCALE_BY_RECIPROCAL:
        scale = amax * (1.0 / 448.0)
    else:
        scale = tl.math.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.where(scale < scale_floor, scale_floor, scale)
    if SCALE_EPS != 0.0:  # behind the floor, so that no fma takes the product's rounding away
        scale += tl.full(scale.shape, SCALE_EPS, tl.float32)
    if POWER_OF_TWO:
        scale = _power_of_two(scale)
    if QUANT_BY_RECIPROCAL:
        q = y * tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, :, None]
    else:
        q = _quotient(y, scale[:, :, None], DIVIDE)
    if INTERPRETED:  # a GPU's cast saturates
        q = tl.where(q > 448.0, 448.0, tl.where(q < -448.0, -448.0, q))
    return q, scale


@triton.jit(do_not_specialize=["R"])
def quant_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    up_ptr,
    weights_ptr,
    offsets_ptr,
    q_ptr,
    scale_ptr,
    R,
    E,
    stride_xr,
    stride_ur,
    stride_sr,
    stride_sg,
    alpha,
    limit,
    up_shift,
    amax_floor,
    scale_floor,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    ROUND_TERMS: tl.constexpr,
    ROUND_SIGMOID: tl.constexpr,
    ROUND_SILU: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SCALE_BY_RECIPROCAL: tl.constexpr,
    QUANT_BY_RECIPROCAL: tl.constexpr,
    DIVIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    AMAX_EPS: tl.constexpr,
    SCALE_EPS: tl.constexpr,
    F: tl.constexpr,
    STRIDE_Q: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    BLOCK_F: tl.constexpr = GROUP * GROUPS
    num_blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    rows = (tl.program_id(0) // num_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(0) % num_blocks
    end = R
    if HAS_OFFSETS:  # rows of no expert are neither read nor written
        end = tl.load(offsets_ptr + E - 1)
        if (tl.program_id(0) // num_blocks) * BLOCK_R >= end:
            return
    cols = block * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < end)[:, None] & (cols < F)[None, :]
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xr
    dtype = x_ptr.dtype.element_ty
    if GATED:
        if INTERLEAVED:  # one contiguous load, parted in registers
            pairs = 2 * block * BLOCK_F + tl.arange(0, 2 * BLOCK_F)
            both = (rows < end)[:, None] & (pairs < 2 * F)[None, :]
            x = tl.load(x_rows + pairs[None, :], mask=both, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(x, [BLOCK_R, BLOCK_F, 2]))
        else:
            gate = tl.load(x_rows + cols[None, :], mask=mask, other=0.0)
            up_rows = up_ptr + rows.to(tl.int64)[:, None] * stride_ur
            up = tl.load(up_rows + cols[None, :], mask=mask, other=0.0)
        y = gated(
            gate, up, alpha, limit, up_shift, dtype,
            HAS_LIMIT, ROUND_TERMS, ROUND_SIGMOID, ROUND_SILU, INTERPRETED,
        )  # fmt: skip
        y = rounded(y, dtype, ROUND_PRODUCT, INTERPRETED)
    else:
        y = tl.load(x_rows + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHTS:
        y *= tl.load(weights_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)[:, None]

    q, scale = quantized(
        tl.reshape(y, [BLOCK_R, GROUPS, GROUP]), amax_floor, scale_floor,
        POWER_OF_TWO, SCALE_BY_RECIPROCAL, QUANT_BY_RECIPROCAL, DIVIDE, INTERPRETED,
        AMAX_EPS, SCALE_EPS,
    )  # fmt: skip
    q = to_e4m3(tl.reshape(q, [BLOCK_R, BLOCK_F]), q_ptr.dtype.element_ty, INTERPRETED)
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * STRIDE_Q + cols[None, :], q, mask=mask)

    groups = block * GROUPS + tl.arange(0, GROUPS)
    scale_ptrs = scale_ptr + rows.to(tl.int64)[:, None] * stride_sr
    scale_ptrs += groups.to(tl.int64)[None, :] * stride_sg
    has_group = (rows < end)[:, None] & (groups * GROUP < F)[None, :]
    tl.store(scale_ptrs, scale, mask=has_group)


def launch(
    x_RX: Tensor,
    out: tuple[Tensor, Tensor],
    group: int,
    power_of_two: bool,
    amax_floor: float,
    scale_floor: float,
    reciprocals: tuple[bool, bool],
    offsets_E: Tensor | None = None,
    gated: bool = False,
    epsilons: tuple[float, float] = (0.0, 0.0),
    **activation: Any,
) -> None:
    """Quantise rows, or gated pairs of halves, into `out`.

    reciprocals: is amax multiplied by 1 / 448, are values multiplied by 1 / scale?
    epsilons: what is added to amax, and to the scale.
    activation: up, interleaved, alpha, limit, up_shift, weights, round_terms,
        round_sigmoid, round_silu, round_product.
    """
    q_RF, scale_RG = out
    R, F = q_RF.shape
    if R * F == 0:
        return
    x_RX = x_RX if x_RX.stride(1) == 1 else x_RX.contiguous()
    up = activation.get("up")
    if up is None:  # the second half, which the kernel reads only if that is what x holds
        up = x_RX[:, F:] if gated else x_RX
    up = up if up.stride(1) == 1 else up.contiguous()
    rows, columns, warps = choose_block(R, F)
    limit, weights = activation.get("limit"), activation.get("weights")
    least_scale = max((amax_floor + epsilons[0]) / LARGEST, scale_floor) + epsilons[1]
    quant_kernel[(triton.cdiv(R, rows) * triton.cdiv(F, columns),)](
        x_RX,
        up,
        weights if weights is None else weights.contiguous(),
        offsets_E if offsets_E is None else offsets_E.contiguous(),
        q_RF,
        scale_RG,
        R,
        0 if offsets_E is None else offsets_E.shape[0],
        x_RX.stride(0),
        up.stride(0),
        *scale_RG.stride(),
        float(activation.get("alpha", 1.0)),
        0.0 if limit is None else float(limit),
        float(activation.get("up_shift", 0.0)),
        amax_floor,
        scale_floor,
        GATED=gated,
        INTERLEAVED=activation.get("interleaved", False),
        HAS_LIMIT=limit is not None,
        HAS_WEIGHTS=weights is not None,
        HAS_OFFSETS=offsets_E is not None,
        ROUND_TERMS=activation.get("round_terms", False),
        ROUND_SIGMOID=activation.get("round_sigmoid", False),
        ROUND_SILU=activation.get("round_silu", False),
        ROUND_PRODUCT=activation.get("round_product", False),
        POWER_OF_TWO=power_of_two,
        SCALE_BY_RECIPROCAL=reciprocals[0],
        QUANT_BY_RECIPROCAL=reciprocals[1],
        DIVIDE=not x_RX.is_cuda or least_scale < 1e-30,
        INTERPRETED=not x_RX.is_cuda,
        AMAX_EPS=epsilons[0],
        SCALE_EPS=epsilons[1],
        F=F,
        STRIDE_Q=q_RF.stride(0),
        GROUP=group,
        BLOCK_R=rows,
        GROUPS=columns // group,
        num_warps=warps,
        **overlap(x_RX, R * F * (2 * x_RX.element_size() + 1)),
    )


def choose_block(R: int, F: int) -> tuple[int, int, int]:
    """Rows and columns of one program, and its warps.

    One H200, torch 2.11, Triton 3.6, 2026-11-22, by `bench_activation_quant.py --sweep`:
    microseconds of the best and of others, and of a kernel that moves as many bytes.
    """
    if R * F < 2**14:
        return 1, 128, 1  # 8 rows of 768: 1.21, with 4 rows of 256 1.41; bytes alone 1.31
    if R * F >= 2**20 and F % 1024 == 0:
        return 1, 1024, 4  # 65,536 rows of 2048: 155.8, of 14336: 1068; bytes alone 156.9, 1132
    # 8 rows of 2048: 1.43, 512: 3.4, 65,536: 155.9; 65,536 of 768: 60.6, with 1 row of 1024 61.0.
    return 4, 256, 4
