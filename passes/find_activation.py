"""Find the activation between the GEMMs of experts."""

import math
import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import (
    CASTS,
    RESHAPES,
    SQUEEZES,
    aten,
    call,
    has_val,
    is_call,
    operands,
    same,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._outcome import Outcome, exactness

Found = tuple[fx.Node, Any, dict[str, Any]]  # x [R, 2F] or [R, F], the op, its attributes


@exactness("reassociating")
def find_activation(graph: fx.Graph) -> Outcome:
    """Replace what the activation of experts decomposes into by one op.

    Before:
        arg0_1: f32[8, 16]
        arg1_1: f32[4, 16, 24]
        arg2_1: i32[4]
        arg3_1: f32[4, 12, 16]
        grouped_mm: f32[8, 24] = moe_compile.grouped_mm(arg0_1, arg1_1, arg2_1)
        split = aten.split.Tensor(grouped_mm, 12, -1)
        getitem: f32[8, 12] = split[0]
        getitem_1: f32[8, 12] = split[1]
        neg: f32[8, 12] = aten.neg(getitem)
        exp: f32[8, 12] = aten.exp(neg)
        add: f32[8, 12] = aten.add.Tensor(exp, 1)
        div: f32[8, 12] = aten.div.Tensor(getitem, add)
        mul: f32[8, 12] = aten.mul.Tensor(div, getitem_1)
        grouped_mm_1: f32[8, 16] = moe_compile.grouped_mm(mul, arg3_1, arg2_1)
        return [grouped_mm_1]

    After:
        arg0_1: f32[8, 16]
        arg1_1: f32[4, 16, 24]
        arg2_1: i32[4]
        arg3_1: f32[4, 12, 16]
        grouped_mm: f32[8, 24] = moe_compile.grouped_mm(arg0_1, arg1_1, arg2_1)
        silu_mul: f32[8, 12] = moe_compile.silu_mul(grouped_mm)
        grouped_mm_1: f32[8, 16] = moe_compile.grouped_mm(silu_mul, arg3_1, arg2_1)
        return [grouped_mm_1]

    Known: silu(gate) * up in its spellings, with alpha and clamps (gpt-oss, DeepSeek-V4), halves
    side by side or interleaved; gelu(gate) * up, erf and tanh; relu squared.
    Left alone: any other function of the rows, which Inductor then fuses; halves from two GEMMs.
    Numerics: computed in float32 and rounded once, where the model rounds after each op.
    """
    outcome = Outcome()
    for gemm in graph.find_nodes(op="call_function", target=moe.grouped_mm.default):
        h = gemm.args[0]
        if not (isinstance(h, fx.Node) and _reads_gemm(h)) or _is_gemm(h):
            continue
        found = _match(h)
        if found is None:
            outcome.decline(h, "not an activation known to have an op; Inductor fuses it")
            continue
        x, op, attributes = found
        with graph.inserting_before(h):
            new = call(graph, op, x, like=h, **attributes)
        h.replace_all_uses_with(new)
        outcome.rewrote(h, _describe(op, attributes))
    return outcome


def _describe(op: Any, attributes: dict[str, Any]) -> str:
    words = [f"{k}={v}" for k, v in attributes.items()]
    return f"{op._schema.name.split('::')[1]}({', '.join(words)})"


def _is_gemm(node: Any) -> bool:
    return is_call(node, moe.grouped_mm.default)


def _reads_gemm(node: fx.Node, depth: int = 16) -> bool:
    """Is `node` computed from a grouped GEMM by a few steps, and not itself an op of ours?"""
    seen, todo = {node}, [(node, 0)]
    while todo:
        here, level = todo.pop()
        if _is_gemm(here):
            return True
        if here.op == "call_function" and level < depth and "moe_compile" not in str(here.target):
            new = [n for n in here.all_input_nodes if n not in seen]
            seen.update(new)
            todo += [(n, level + 1) for n in new]
    return False


def _match(h: fx.Node) -> Found | None:
    for matcher in (_silu_mul, _gelu_mul, _relu2):
        found = matcher(_uncast(h))
        if (
            found is not None
            and val(found[0]).dtype == val(h).dtype
            and _keeps_precision(h, found[0])
        ):
            return found
    return None


def _keeps_precision(h: fx.Node, x: fx.Node) -> bool:
    """Is h of x's dtype, and does nothing between them round to less?"""
    if val(h).dtype != val(x).dtype:
        return False
    seen, todo = {x, h}, [h]
    while todo:
        node = todo.pop()
        if is_call(node, *CASTS) and val(node).dtype.itemsize < val(x).dtype.itemsize:
            return False
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return True


def _silu_mul(h: fx.Node) -> Found | None:
    if not is_call(h, aten.mul.Tensor):
        return None
    for left, right in operands(h):
        swish = _swish(left)
        if swish is None:
            continue
        gate, alpha = swish
        up, shift = _shifted(right)
        clamped = _limited(gate, up)
        if clamped is None:
            return None
        gate, up, limit = clamped
        halves = _halves(gate, up)
        if halves is None:
            return None
        x, interleaved = halves
        given = {"interleaved": interleaved, "alpha": alpha, "limit": limit, "up_shift": shift}
        plain = {"interleaved": False, "alpha": 1.0, "limit": None, "up_shift": 0.0}
        return x, moe.silu_mul.default, {k: v for k, v in given.items() if v != plain[k]}
    return None


def _swish(node: Any) -> tuple[Any, float] | None:
    """(g, alpha) of g * sigmoid(alpha * g)."""
    node = _uncast(node)
    if is_call(node, aten.silu.default):
        return _uncast(node.args[0]), 1.0
    if is_call(node, aten.div.Tensor):  # g / (1 + exp(-alpha * g))
        gate, below = map(_uncast, node.args)
        scaled = _negated_exp_plus_one(below)
        return _times(scaled, gate) if scaled is not None else None
    if is_call(node, aten.mul.Tensor):
        for gate, sigmoid in operands(node):
            gate, sigmoid = _uncast(gate), _uncast(sigmoid)
            if is_call(sigmoid, aten.sigmoid.default):
                found = _times(_uncast(sigmoid.args[0]), gate)
                if found is not None:
                    return found
    return None


def _negated_exp_plus_one(node: Any) -> Any:
    """z of 1 + exp(-z)."""
    shifted, shift = _shifted(node)
    if shift != 1 or not is_call(shifted, aten.exp.default):
        return None
    negated = _uncast(shifted.args[0])
    return _uncast(negated.args[0]) if is_call(negated, aten.neg.default) else None


def _times(scaled: Any, gate: Any) -> tuple[Any, float] | None:
    """(gate, alpha) if `scaled` is alpha * gate."""
    if scaled is gate:
        return gate, 1.0
    if is_call(scaled, aten.mul.Tensor):
        for factor, alpha in operands(scaled):
            if isinstance(alpha, (int, float)) and _uncast(factor) is gate:
                return gate, float(alpha)
    return None


def _shifted(node: Any) -> tuple[Any, float]:
    """(y, c) of y + c, with c = 0 where nothing is added."""
    node = _uncast(node)
    if (
        is_call(node, aten.add.Tensor)
        and not node.kwargs
        and isinstance(node.args[1], (int, float))
    ):
        return _uncast(node.args[0]), float(node.args[1])
    return node, 0.0


def _clamped(node: Any) -> tuple[Any, float | None, float | None]:
    """(y, low, high) of clamp(y, low, high), with None for a bound that is not there."""
    low = high = None
    node = _uncast(node)
    while is_call(node, aten.clamp_min.default, aten.clamp_max.default):
        bound = node.args[1]
        if is_call(node, aten.clamp_min.default):
            low = bound if low is None else max(low, bound)
        else:
            high = bound if high is None else min(high, bound)
        node = _uncast(node.args[0])
    return node, low, high


def _limited(gate: Any, up: Any) -> tuple[Any, Any, float | None] | None:
    """(gate, up, limit) without their clamps, if gate is below limit and up between +-limit."""
    gate, gate_low, high = _clamped(gate)
    up, low, limit = _clamped(up)
    expected = (None, limit, None if limit is None else -limit)
    return (gate, up, limit) if (gate_low, high, low) == expected else None


def _gelu_mul(h: fx.Node) -> Found | None:
    if not is_call(h, aten.mul.Tensor):
        return None
    for left, right in operands(h):
        gelu = _gelu(_uncast(left))
        halves = _halves(gelu[0], _uncast(right)) if gelu is not None else None
        if gelu is not None and halves is not None and not halves[1]:
            return halves[0], moe.gelu_mul.default, {"approximate": gelu[1]}
    return None


def _gelu(node: Any) -> tuple[Any, str] | None:
    """(g, kind) of 0.5 * g * (1 + erf(g / sqrt 2)), or of its tanh approximation."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for half, one_plus in operands(node):
        gate, inner = _scaled_by(half, 0.5), _shifted(one_plus)
        if gate is None or inner[1] != 1:
            continue
        curve = inner[0]
        argument = curve.args[0] if curve.args else None
        if is_call(curve, aten.erf.default) and _scaled_by(argument, math.sqrt(0.5)) is gate:
            return gate, "none"
        inside = _scaled_by(argument, math.sqrt(2 / math.pi))
        if is_call(curve, aten.tanh.default) and _cubic(inside, gate):
            return gate, "tanh"
    return None


def _scaled_by(node: Any, factor: float) -> Any:
    """y of y * factor."""
    node = _uncast(node)
    if is_call(node, aten.mul.Tensor):
        for y, number in operands(node):
            if isinstance(number, (int, float)) and math.isclose(number, factor, rel_tol=1e-7):
                return _uncast(y)
    return None


def _cubic(node: Any, g: Any) -> bool:
    """Is `node` g + 0.044715 * g ** 3?"""
    if not is_call(node, aten.add.Tensor):
        return False
    for linear, cubic in operands(node):
        cube = _scaled_by(cubic, 0.044715)
        if _uncast(linear) is g and cube is not None and _is_power(cube, g, 3):
            return True
    return False


def _is_power(node: Any, base: Any, exponent: int) -> bool:
    node = _uncast(node)
    if node is base:
        return exponent == 1
    if is_call(node, aten.pow.Tensor_Scalar):
        return _uncast(node.args[0]) is base and node.args[1] == exponent
    if is_call(node, aten.mul.Tensor):
        return any(
            _is_power(a, base, exponent - 1) and _uncast(b) is base for a, b in operands(node)
        )
    return False


def _relu2(h: fx.Node) -> Found | None:
    relu = next((n for n in map(_uncast, h.args) if is_call(n, aten.relu.default)), None)
    if relu is None or not _is_power(h, relu, 2):
        return None
    x = _uncast(relu.args[0])
    return (x, moe.relu2.default, {}) if has_val(x) and val(x).ndim == 2 else None


def _halves(gate: Any, up: Any, ndim: int | None = 2) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) if gate and up are the two halves of x's columns, gate first."""
    read: Callable[[Any], tuple[Any, Any] | None]
    for read, interleaved in ((_part, False), (_stride, True)):
        first, second = read(gate), read(up)
        if first is None or second is None:
            continue
        (x, place), (other, next_place) = first, second
        x, other = _whole(x), _whole(other)
        if x is other and (place, next_place) == (0, 1) and ndim in (None, val(x).ndim):
            return x, interleaved
    return None


def _part(node: Any) -> tuple[Any, Any] | None:
    """(x, i) if `node` is half i of x's columns."""
    if not has_val(node):
        return None
    width = val(node).shape[-1]
    splits = (aten.split.Tensor, aten.split_with_sizes.default)
    if is_call(node, operator.getitem) and is_call(node.args[0], *splits):
        x, _, *dim = node.args[0].args
        even = dim and _is_last(dim[0], x) and same(val(x).shape[-1], 2 * width)
        return (x, node.args[1]) if even else None
    if is_call(node, aten.slice.Tensor) and len(node.args) == 4 and _is_last(node.args[1], node):
        x, _, start, _ = node.args
        start = start.meta["val"] if isinstance(start, fx.Node) else start
        if same(val(x).shape[-1], 2 * width) and (same(start, 0) or same(start, width)):
            return x, int(same(start, width))
    return None


def _is_last(dim: Any, x: fx.Node) -> bool:
    return bool(dim % val(x).ndim == val(x).ndim - 1)


def _stride(node: Any) -> tuple[Any, Any] | None:
    """(x, i) if `node` is every second column of x, from column i."""
    if is_call(node, aten.slice.Tensor) and len(node.args) == 5 and _is_last(node.args[1], node):
        x, _, start, _, step = node.args
        even = same(val(x).shape[-1], 2 * val(node).shape[-1])
        return (x, start) if step == 2 and start in (0, 1) and even else None
    return None


def _whole(x: fx.Node) -> fx.Node:
    """x without views that give back its own shape (a squeeze of an unsqueeze, say)."""
    source = strip(x, *SQUEEZES, *RESHAPES)
    return source if same_shape(source, val(x).shape) else x


def _uncast(node: Any) -> Any:
    """Through casts between float dtypes, which the ops make needless by computing in float32."""
    while is_call(node, *CASTS) and val(node).dtype.is_floating_point:
        if not val(node.args[0]).dtype.is_floating_point:
            return node
        node = node.args[0]
    return node
