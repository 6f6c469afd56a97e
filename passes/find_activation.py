"""Find the activation between the GEMMs of experts."""

import math
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._gates import (
    alpha_of,
    halves_of,
    limit_of,
    negated_exp_plus_one,
    shift_of,
    uncast,
)
from moe_compile.passes._graph import (
    CASTS,
    aten,
    call,
    has_val,
    is_call,
    operands,
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
        found = matcher(uncast(h))
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
        up, shift = shift_of(right)
        clamped = limit_of(gate, up)
        if clamped is None:
            return None
        gate, up, limit = clamped
        halves = halves_of(gate, up)
        if halves is None:
            return None
        x, interleaved = halves
        given = {"interleaved": interleaved, "alpha": alpha, "limit": limit, "up_shift": shift}
        plain = {"interleaved": False, "alpha": 1.0, "limit": None, "up_shift": 0.0}
        return x, moe.silu_mul.default, {k: v for k, v in given.items() if v != plain[k]}
    return None


def _swish(node: Any) -> tuple[Any, float] | None:
    """(g, alpha) of g * sigmoid(alpha * g)."""
    node = uncast(node)
    if is_call(node, aten.silu.default):
        return uncast(node.args[0]), 1.0
    if is_call(node, aten.div.Tensor):  # g / (1 + exp(-alpha * g))
        gate, below = map(uncast, node.args)
        scaled = negated_exp_plus_one(below)
        return alpha_of(scaled, gate) if scaled is not None else None
    if is_call(node, aten.mul.Tensor):
        for gate, sigmoid in operands(node):
            gate, sigmoid = uncast(gate), uncast(sigmoid)
            if is_call(sigmoid, aten.sigmoid.default):
                found = alpha_of(uncast(sigmoid.args[0]), gate)
                if found is not None:
                    return found
    return None


def _gelu_mul(h: fx.Node) -> Found | None:
    if not is_call(h, aten.mul.Tensor):
        return None
    for left, right in operands(h):
        gelu = _gelu(uncast(left))
        halves = halves_of(gelu[0], uncast(right)) if gelu is not None else None
        if gelu is not None and halves is not None and not halves[1]:
            return halves[0], moe.gelu_mul.default, {"approximate": gelu[1]}
    return None


def _gelu(node: Any) -> tuple[Any, str] | None:
    """(g, kind) of 0.5 * g * (1 + erf(g / sqrt 2)), or of its tanh approximation."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for half, one_plus in operands(node):
        gate, inner = _scaled_by(half, 0.5), shift_of(one_plus)
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
    node = uncast(node)
    if is_call(node, aten.mul.Tensor):
        for y, number in operands(node):
            if isinstance(number, (int, float)) and math.isclose(number, factor, rel_tol=1e-7):
                return uncast(y)
    return None


def _cubic(node: Any, g: Any) -> bool:
    """Is `node` g + 0.044715 * g ** 3?"""
    if not is_call(node, aten.add.Tensor):
        return False
    for linear, cubic in operands(node):
        cube = _scaled_by(cubic, 0.044715)
        if uncast(linear) is g and cube is not None and _is_power(cube, g, 3):
            return True
    return False


def _is_power(node: Any, base: Any, exponent: int) -> bool:
    node = uncast(node)
    if node is base:
        return exponent == 1
    if is_call(node, aten.pow.Tensor_Scalar):
        return uncast(node.args[0]) is base and node.args[1] == exponent
    if is_call(node, aten.mul.Tensor):
        return any(
            _is_power(a, base, exponent - 1) and uncast(b) is base for a, b in operands(node)
        )
    return False


def _relu2(h: fx.Node) -> Found | None:
    relu = next((n for n in map(uncast, h.args) if is_call(n, aten.relu.default)), None)
    if relu is None or not _is_power(h, relu, 2):
        return None
    x = uncast(relu.args[0])
    return (x, moe.relu2.default, {}) if has_val(x) and val(x).ndim == 2 else None
