"""Fuse an activation with the quantisation to float8 behind it."""

from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._gated_silu import Inputs, NoGatedSilu, gated_silu_of
from moe_compile.passes._graph import args, aten, call, is_call, same, unpack, val
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._quant_group import QuantGroup, casts_to_fp8, quant_group_of
from moe_compile.passes._quant_scale import VIEWS, peel

_GEMMS = (moe.grouped_mm_fp8.default, moe.linear_fp8.default)


@exactness("reassociating")
def fuse_activation_quant(graph: fx.Graph) -> Outcome:
    """Make silu(gate) * up and the quantisation of its groups one op.

    Before:
        arg0_1: bf16[4, 512]
        split = aten.split.Tensor(arg0_1, 256, -1)
        getitem: bf16[4, 256] = split[0]
        getitem_1: bf16[4, 256] = split[1]
        convert_element_type: f32[4, 256] = prims.convert_element_type(getitem, f32)
        neg: f32[4, 256] = aten.neg(convert_element_type)
        exp: f32[4, 256] = aten.exp(neg)
        add: f32[4, 256] = aten.add.Tensor(exp, 1)
        div: f32[4, 256] = aten.div.Tensor(convert_element_type, add)
        convert_element_type_1: bf16[4, 256] = prims.convert_element_type(div, bf16)
        mul: bf16[4, 256] = aten.mul.Tensor(convert_element_type_1, getitem_1)
        reshape: bf16[4, 2, 128] = aten.reshape(mul, [4, 2, 128])
        convert_element_type_2: f32[4, 2, 128] = prims.convert_element_type(reshape, f32)
        abs: f32[4, 2, 128] = aten.abs(convert_element_type_2)
        amax: f32[4, 2, 1] = aten.amax(abs, [-1], True)
        clamp_min: f32[4, 2, 1] = aten.clamp_min(amax, 1e-10)
        div_1: f32[4, 2, 1] = aten.div.Tensor(clamp_min, 448)
        div_2: f32[4, 2, 128] = aten.div.Tensor(convert_element_type_2, div_1)
        convert_element_type_3: f8e4m3[4, 2, 128] = prims.convert_element_type(div_2, f8e4m3)
        return [convert_element_type_3, div_1]

    After:
        arg0_1: bf16[4, 512]
        silu_mul_quant = moe_compile.silu_mul_quant(arg0_1, round_silu=True, round_product=True, amax_floor=1.000000013351432e-10)
        getitem: f8e4m3[4, 256] = silu_mul_quant[0]
        getitem_1: f32[4, 2] = silu_mul_quant[1]
        reshape: f8e4m3[4, 2, 128] = aten.reshape(getitem, [4, 2, 128])
        reshape_1: f32[4, 2, 1] = aten.reshape(getitem_1, [4, 2, 1])
        return [reshape, reshape_1]

    Known: silu and gate * sigmoid(gate), with alpha, clamps and a shifted up; halves by chunk, split or
    slices, side by side or interleaved, or two tensors; the largest magnitude by amax, max or a norm; floors on it or on
    the scale, and epsilons added behind it; division, multiplication by the reciprocal or by 448 / amax; powers of
    two; any views between; scales computed twice, or copied to be stored by columns; columns filled up with zeros to
    a group, by pad, cat or into a tensor of zeros, and cut off again before the cast or after it. And
    `quant_fp8` behind any of these, where rows of no expert are skipped if just a GEMM reads them.
    Left alone: groups other than 64 and 128; columns that no group divides, or padded elsewhere, with other numbers
    or beyond the next group; padding that is read; scales rounded to less than float32, of other values, or other
    than those returned; epsilons that are no constant, negative, added in 16 bits or before a floor; activations
    that anything else reads; static scales; quantisation without an activation, which Inductor fuses.
    Numerics: rounds to x's dtype where the model does; exp differs in the last places of float32, and
    so does 448 / amax, for which the op takes the scale's reciprocal.
    """  # noqa: E501
    outcome = Outcome()
    for cast in casts_to_fp8(graph):
        try:
            _fuse(graph, quant_group_of(cast), outcome)
        except Declined as reason:
            outcome.decline(cast, str(reason))
    for quant in graph.find_nodes(op="call_function", target=moe.quant_fp8.default):
        try:
            _fuse_op(graph, quant, outcome)
        except NoGatedSilu:
            continue  # the rows that enter a layer
        except Declined as reason:
            outcome.decline(quant, str(reason))
    return outcome


def _fuse(graph: fx.Graph, found: QuantGroup, outcome: Outcome) -> None:
    inputs, activation = gated_silu_of(found.y)
    _is_read_only_there(found)
    # Where both exist: before the first of them that anything reads.
    first = min(found.cast, *found.scales)
    options = {**activation, **_unusual(found.options)}
    by_columns = [copy for scale in found.scales for copy in _copies_by_columns(scale)]
    if by_columns:
        options["column_major"] = True
    if _shows_strides(found):
        options["pad_rows"] = True
    with graph.inserting_before(first):
        rows = _rows(graph, inputs, first)
        new = call(graph, moe.silu_mul_quant.default, *rows, like=found.cast, **options)
        q, scale = unpack(graph, new, 2)
        replaced = [(part, q) for part in found.parts] + [(old, scale) for old in found.scales]
        for old, made in replaced:
            old.replace_all_uses_with(_shaped(graph, made, old))
        for copy in by_columns:
            copy.replace_all_uses_with(call(graph, aten.permute.default, scale, [1, 0], like=copy))
    outcome.rewrote(found.cast, _describe(options, val(found.y).shape[-1]))


def _fuse_op(graph: fx.Graph, quant: fx.Node, outcome: Outcome) -> None:
    y = peel(args(quant)[0])
    if val(y).dtype != val(args(quant)[0]).dtype:
        raise Declined("what is quantised was widened first")
    if not same(val(y).shape[-1], val(args(quant)[0]).shape[-1]):
        raise Declined("the rows quantised are not those of the activation")
    inputs, activation = gated_silu_of(y)
    schema = [a.name for a in moe.quant_fp8.default._schema.arguments]
    given = {**dict(zip(schema[1:], args(quant)[1:], strict=False)), **quant.kwargs}
    if given.get("offsets") is None and (offsets := _offsets_of_reader(quant)) is not None:
        given["offsets"] = offsets
    options = {**activation, **given}
    with graph.inserting_before(quant):
        rows = _rows(graph, inputs, quant)
        new = call(graph, moe.silu_mul_quant.default, *rows, like=quant, **options)
    quant.replace_all_uses_with(new)
    shown = {k: v for k, v in options.items() if not isinstance(v, fx.Node)}
    outcome.rewrote(quant, _describe(shown, val(y).shape[-1]))


def _unusual(options: dict[str, Any]) -> dict[str, Any]:
    """Without the op's defaults."""
    schema = moe.silu_mul_quant.default._schema.arguments
    defaults = {a.name: a.default_value for a in schema}
    return {k: v for k, v in options.items() if defaults[k] != v}


def _is_read_only_there(found: QuantGroup) -> None:
    """Does nothing but the quantisation read the activation, which then needs no memory?"""
    made = {found.cast, *found.scales}
    if _is_returned(found.y, made | {found.amax}):
        raise Declined("the activation itself is returned, too")
    if _is_returned(found.amax, made):
        raise Declined("another scale than the one that values are divided by is returned")
    if sum(_is_returned(scale, set(), *VIEWS) for scale in found.scales) > 1:
        raise Declined("the scale is computed and returned twice")


def _is_returned(node: fx.Node, but_by: set[fx.Node], *targets: Any) -> bool:
    """Does `node` reach the output, by calls of `targets` if given, and not through `but_by`?"""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen | but_by and (not targets or is_call(user, *targets)):
                seen.add(user)
                todo.append(user)
    return False


def _shows_strides(found: QuantGroup) -> bool:
    """Could a reader of q know how far apart the rows of a padded tensor lay?

    Copies and our own ops do not; the model may, or a kernel that was traced with those strides.
    """
    cuts = [part for part in found.parts if not val(part).is_contiguous()]
    readers = {user for cut in cuts for user in cut.users} - set(found.parts)
    return any(getattr(reader.target, "namespace", "") != "moe_compile" for reader in readers)


def _copies_by_columns(scale: fx.Node) -> list[fx.Node]:
    """Copies of the scales [R, G] as [G, R], which the op can write itself."""
    found, todo = [], [scale]
    while todo:
        for user in todo.pop().users:
            if is_call(user, *VIEWS):
                todo.append(user)
            elif is_call(user, aten.permute.default) and list(args(user)[1]) == [1, 0]:
                copies = [c for c in user.users if is_call(c, aten.clone.default)]
                found += [c for c in copies if val(c).is_contiguous()]
    return found


def _offsets_of_reader(quant: fx.Node) -> Any:
    """The offsets that say which rows exist, if just one grouped GEMM reads q and its scales."""
    readers = {user for part in quant.users for user in part.users}
    if len(readers) != 1 or not is_call(reader := readers.pop(), moe.grouped_mm_fp8.default):
        return None
    x, x_scale, _, _, offsets, *rest = args(reader)
    has_rows = (rest and rest[0] is not None) or reader.kwargs.get("rows") is not None
    inputs = {x, x_scale} == set(quant.users)
    is_before = offsets.op == "placeholder" or offsets < quant
    return offsets if inputs and not has_rows and is_before else None


def _rows(graph: fx.Graph, inputs: Inputs, like: fx.Node) -> list[fx.Node]:
    """x, or gate and up, with all dims but the last as one."""
    given = [x for x in inputs if x is not None]
    shapes = [[-1, val(x).shape[-1]] for x in given]
    return [
        x if val(x).ndim == 2 else call(graph, aten.reshape.default, x, shape, like=like)
        for x, shape in zip(given, shapes, strict=True)
    ]


def _shaped(graph: fx.Graph, made: fx.Node, old: fx.Node) -> fx.Node:
    """`made` in the shape of what it replaces."""
    if val(made).shape == val(old).shape:
        return made
    return call(graph, aten.reshape.default, made, _sizes(graph, old), like=old)


def _sizes(graph: fx.Graph, old: fx.Node) -> list[Any]:
    """The shape, with -1 for the one size that may be symbolic."""
    sizes: list[Any] = list(val(old).shape)
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) > 1:
        raise Declined("several sizes that are not known")
    if symbolic:
        sizes[symbolic[0]] = -1
    return sizes


def _describe(options: dict[str, Any], F: int) -> str:
    words = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"silu_mul_quant({words}), {F} columns"
