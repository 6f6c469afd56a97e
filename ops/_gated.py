"""What kernels with a gate share: silu(gate) * up, rounded where a model rounds."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950216293335)  # as float32 holds it
LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def kept_bits(y, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """y to so many bits behind the leading one, to nearest even.

    Only for Triton's interpreter, whose casts to bfloat16 and float8 do not round like a GPU's.
    """
    bits = y.to(tl.int32, bitcast=True)
    bits += (1 << (22 - BITS)) - 1 + ((bits >> (23 - BITS)) & 1)
    bits &= -(1 << (23 - BITS))
    return tl.where(y == y, bits.to(tl.float32, bitcast=True), y)


@triton.jit
def rounded(y, dtype, ROUND: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """y in float32, rounded to the dtype where the model rounds."""
    if ROUND:
        if INTERPRETED and dtype == tl.bfloat16:
            y = kept_bits(y, 7)
        y = y.to(dtype).to(tl.float32)
    return y


@triton.jit
def _inverse(y, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / y to one unit in the last place; 0 where that is below the normal numbers."""
    if INTERPRETED:
        return 1.0 / y
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exp2(y, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """2 ** y to two units in the last place; 0 where that is below the normal numbers."""
    if INTERPRETED:
        return tl.exp2(y)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gated(  # type: ignore[no-untyped-def]
    gate,
    up,
    alpha,
    limit,
    up_shift,
    dtype,
    HAS_LIMIT: tl.constexpr,
    ROUND_TERMS: tl.constexpr,
    ROUND_SIGMOID: tl.constexpr,
    ROUND_SILU: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if HAS_LIMIT:  # by comparisons, which leave NaN as it is
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    minus = rounded(-alpha * gate, dtype, ROUND_TERMS, INTERPRETED)
    up = rounded(up + up_shift, dtype, ROUND_TERMS, INTERPRETED)
    power = minus * LOG2_E
    exp = _exp2(power, INTERPRETED)
    if dtype == tl.float32:  # the product's rounding would be seen: a unit for each unit of gate
        rest = tl.fma(minus, tl.full(power.shape, LOG2_E, tl.float32), -power)
        exp += tl.where(tl.abs(power) < 126.0, exp * (rest + minus * LOG2_E_REST) * LN_2, 0.0)
    below = 1.0 + exp
    # Without the scaling of a full division: where it would matter, silu is below 1e-35.
    silu = gate * rounded(_inverse(below, INTERPRETED), dtype, ROUND_SIGMOID, INTERPRETED)
    return rounded(silu, dtype, ROUND_SILU, INTERPRETED) * up
