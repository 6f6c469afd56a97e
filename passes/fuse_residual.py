"""Let what ends a layer add the residual."""

import operator
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import (
    RESHAPES,
    args,
    aten,
    call,
    has_val,
    is_call,
    operands,
    reshaped,
    same_shape,
    strip,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._quantised import arguments_of

_ENDS = (
    moe.skinny_mm.default,
    moe.skinny_mms_fp8.default,
    moe.experts.default,
    moe.experts_fp8.default,
    moe.combine.default,
)


@exactness("bitwise")
def fuse_residual(graph: fx.Graph) -> Outcome:
    """On a GPU, add the residual where the last op of attention or MLP stores its rows.

    Before:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64, 32]
        arg2_1: bf16[2, 1, 32]
        skinny_mm: bf16[2, 32] = moe_compile.skinny_mm(arg0_1, arg1_1)
        view: bf16[2, 1, 32] = aten.view(skinny_mm, [2, 1, 32])
        add: bf16[2, 1, 32] = aten.add.Tensor(arg2_1, view)
        return [add]

    After:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64, 32]
        arg2_1: bf16[2, 1, 32]
        reshape: bf16[2, 32] = aten.reshape(arg2_1, [2, 32])
        skinny_mm: bf16[2, 32] = moe_compile.skinny_mm(arg0_1, arg1_1, residual=reshape)
        reshape_1: bf16[2, 1, 32] = aten.reshape(skinny_mm, [2, 1, 32])
        return [reshape_1]

    The ops are `skinny_mm`, `skinny_mms_fp8` of a single weight, `experts`, `experts_fp8` and
    `combine`. Where both summands come from
    such an op, the later one adds the other.
    Left alone: CPUs; rows that others read, too; summands of another shape or dtype; reshaped rows
    of a number that is not known.
    Numerics: what the op returned and the sum are rounded as before.
    """
    outcome = Outcome()
    for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if val(add).device.type != "cuda" or add.kwargs or not all(map(has_val, args(add))):
            continue
        ends = [(end, value) for value, _ in operands(add) if (end := _end(value)) is not None]
        for end, value in sorted(ends, key=lambda pair: pair[0], reverse=True):
            try:
                residual = _residual(add, end, value)
            except Declined as reason:
                outcome.decline(add, str(reason))
                continue
            name = _maker(end).target.name().removeprefix("moe_compile::")
            outcome.rewrote(add, f"{name} adds the residual, {val(end).shape[1]} columns")
            _rewrite(graph, add, end, residual)
            break
    return outcome


def _end(value: Any) -> Any:
    """The rows of a summand as an op makes them that adds nothing yet, or None."""
    end = strip(value, *RESHAPES)
    return end if is_call(_maker(end), *_ENDS) and _can_add(_maker(end)) else None


def _maker(end: Any) -> Any:
    """The op that makes `end`, perhaps as the only one of a list."""
    return args(end)[0] if is_call(end, operator.getitem) else end


def _can_add(maker: fx.Node) -> bool:
    given = arguments_of(maker)
    several = is_call(maker, moe.skinny_mms_fp8.default) and len(given["w"]) > 1
    return given["residual"] is None and not several


def _residual(add: fx.Node, end: fx.Node, value: fx.Node) -> fx.Node:
    """The other summand, or why `end` can't add it."""
    residual = next(b for a, b in operands(add) if a is value)
    if val(residual).dtype != val(value).dtype:
        raise Declined("a summand in another dtype than the rows to which it is added")
    shape = val(add).shape
    if not same_shape(residual, shape) or not same_shape(value, shape):
        raise Declined("a summand of another shape than the rows to which it is added")
    known = all(isinstance(size, int) for size in (*shape, *val(end).shape))
    if not known and not same_shape(end, shape):
        raise Declined("reshaped rows of a number that is not known")
    if residual is value or len(_chain(end, add)) == 0:
        raise Declined("the rows to which it is added are read by others, too")
    return residual  # type: ignore[no-any-return]


def _chain(end: fx.Node, add: fx.Node) -> list[fx.Node]:
    """From what makes `end` to before `add`, if each is read by the next alone."""
    chain = [_maker(end)]
    while len(chain[-1].users) == 1:
        reader = next(iter(chain[-1].users))
        if reader is add:
            return chain
        chain.append(reader)
    return []


def _rewrite(graph: fx.Graph, add: fx.Node, end: fx.Node, residual: fx.Node) -> None:
    """The op where the sum was, which all that both need comes before."""
    maker = _maker(end)
    target: Any = maker.target
    dead = [add, *reversed(_chain(end, add))]
    with graph.inserting_before(add):
        rows = reshaped(graph, residual, val(end).shape, like=add)
        new = call(graph, target, *args(maker), like=maker, **{**maker.kwargs, "residual": rows})
        if maker is not end:
            (new,) = unpack(graph, new, 1)
        add.replace_all_uses_with(reshaped(graph, new, val(add).shape, like=add))
    for node in dead:
        graph.erase_node(node)
