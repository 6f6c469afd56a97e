"""Let products norm the rows that they read."""

import operator
from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_kernel import MOST_ROWS_OF_SUMS, can_keep, fits
from moe_compile.passes._graph import (
    RESHAPES,
    arg,
    args,
    aten,
    call,
    is_call,
    reshaped,
    same_shape,
    strip,
    unpack,
    val,
)
from moe_compile.passes._norm_fp8 import norm_before_quantising
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rms_norm import RMSNorm, rms_norm_behind

_VIEWS = (aten.permute.default, aten.t.default, *RESHAPES)


@exactness("reassociating")
def fuse_norm(graph: fx.Graph) -> Outcome:
    """On a GPU, norm few rows in the product that reads them first.

    Before:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64]
        arg2_1: bf16[64, 32]
        convert_element_type: f32[2, 64] = prims.convert_element_type(arg0_1, f32)
        pow: f32[2, 64] = aten.pow.Tensor_Scalar(convert_element_type, 2)
        mean: f32[2, 1] = aten.mean.dim(pow, [-1], True)
        add: f32[2, 1] = aten.add.Tensor(mean, 1e-06)
        rsqrt: f32[2, 1] = aten.rsqrt(add)
        mul: f32[2, 64] = aten.mul.Tensor(convert_element_type, rsqrt)
        convert_element_type_1: bf16[2, 64] = prims.convert_element_type(mul, bf16)
        mul_1: bf16[2, 64] = aten.mul.Tensor(arg1_1, convert_element_type_1)
        skinny_mm: bf16[2, 32] = moe_compile.skinny_mm(mul_1, arg2_1)
        return [skinny_mm]

    After:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64]
        arg2_1: bf16[64, 32]
        rms_norm_mms = moe_compile.rms_norm_mms(arg0_1, arg1_1, 1e-06, [arg2_1], [None])
        getitem: bf16[2, 32] = rms_norm_mms[0]
        return [getitem]

    `skinny_mms` likewise; `skinny_mms_fp8` takes the norm itself, where only such products read the
    rows (`_norm_fp8.py`). Where others read the normed rows, too, the op returns them as the last
    of its results, and stands where the first of their readers was.
    Left alone: CPUs; norms over other features than are multiplied; products that add a residual,
    or whose weights are computed after the first reader of the norm; more than MOST_ROWS_OF_SUMS
    rows (8 and 16 rows times 2048 x 128 take 13.5 us normed on an H200, 3.8 without), and rows that
    others read where programs are too few to store them. In float8 also other readers, scales that
    are powers of two, and an amax_floor above 1e-8.
    Numerics: the rows multiplied are not rounded, or once, and the sums are scaled in float32.
    """
    outcome = Outcome()
    ops = (moe.skinny_mm.default, moe.skinny_mms.default, moe.skinny_mms_fp8.default)
    for node in sorted(n for op in ops for n in graph.find_nodes(op="call_function", target=op)):
        x = args(node)[0]
        found = rms_norm_behind(strip(x, *RESHAPES)) if val(x).device.type == "cuda" else None
        if found is None:
            continue
        try:
            in_float8 = is_call(node, moe.skinny_mms_fp8.default)
            fuse = norm_before_quantising if in_float8 else _fuse
            outcome.rewrote(node, fuse(graph, node, *found))
        except Declined as reason:
            outcome.decline(node, str(reason))
    return outcome


def _fuse(graph: fx.Graph, node: fx.Node, source: fx.Node, norm: RMSNorm) -> str:
    """Norm in the product `node`, and say what was done; or decline."""
    ws, biases = _weights(node)
    place = min(norm.value.users)
    for given in (*ws, *biases):
        if not _can_stand_before(place, given):
            raise Declined("a weight that is computed after the normed rows are first read")
    keep = _is_read_by_others(norm.value, node)
    _check_sizes(norm.value, args(node)[0], ws, keep)
    M, K = val(args(node)[0]).shape
    how = {} if norm.round_first else {"round_first": False}
    how |= {"keep": True} if keep else {}
    with graph.inserting_before(place):
        for given in (*ws, *biases):
            _move_before(place, given)
        rows = reshaped(graph, source, (M, K), like=node)
        product = (rows, norm.weight, norm.eps, ws, biases)
        new = call(graph, moe.rms_norm_mms.default, *product, like=node, **how)
        parts = unpack(graph, new, len(ws) + keep)
        _replace(node, parts)
        if keep:
            _read(graph, norm.value, parts[-1])
    kept = ", and kept" if keep else ""
    return f"{M} rows of {K} normed in the product with {len(ws)} weights{kept}"


def _weights(node: fx.Node) -> tuple[list[Any], list[Any]]:
    """The weights and biases of a product."""
    if is_call(node, moe.skinny_mm.default):
        if arg(node, 3, "residual") is not None:
            raise Declined("a product that adds a residual")
        return [arg(node, 1, "w")], [arg(node, 2, "bias")]
    if not all(is_call(user, operator.getitem) for user in node.users):
        raise Declined("products that are read as a list")
    return list(arg(node, 1, "w")), list(arg(node, 2, "bias"))


def _is_read_by_others(value: fx.Node, node: fx.Node) -> bool:
    """Does anything but `node` read `value`, or a reshape of it on the way there?"""
    reader, x = node, args(node)[0]
    while set(x.users) == {reader} and x is not value:
        reader, x = x, args(x)[0]
    return set(x.users) != {reader}


def _check_sizes(value: fx.Node, x: fx.Node, ws: list[fx.Node], keep: bool) -> None:
    """Decline what the kernel does not norm, or not keep."""
    if not all(isinstance(size, int) for size in val(value).shape):
        raise Declined("a number of rows that is not known")
    (M, K), weights = val(x).shape, [val(w) for w in ws]
    if val(value).shape[-1] != K:
        raise Declined(f"a norm over {val(value).shape[-1]} features of {K}")
    if M > MOST_ROWS_OF_SUMS:
        raise Declined(f"{M} rows, whose norm costs less by itself")
    if not fits(val(x), weights, norm=True):
        raise Declined(f"{M} rows in {val(x).dtype}, or weights not stored alike")
    if keep and not can_keep(val(x), weights):
        raise Declined("too few programs to keep the normed rows, which others read, too")


def _can_stand_before(place: fx.Node, given: Any) -> bool:
    """Is a weight or bias there already, or an input, or a view of one?"""
    if given is None or given < place:
        return True
    return strip(given, *_VIEWS).op in ("placeholder", "get_attr")


def _move_before(place: fx.Node, node: fx.Node | None) -> None:
    if node is None or node < place:
        return
    for source in node.all_input_nodes:
        _move_before(place, source)
    place.prepend(node)


def _replace(node: fx.Node, parts: tuple[fx.Node, ...]) -> None:
    if is_call(node, moe.skinny_mm.default):
        node.replace_all_uses_with(parts[0])
        return
    for user in list(node.users):
        user.replace_all_uses_with(parts[args(user)[1]])


def _read(graph: fx.Graph, value: fx.Node, normed: fx.Node) -> None:
    """All that read `value` read `normed`, which has the same rows."""
    for user in list(value.users):
        if is_call(user, *RESHAPES) and same_shape(user, val(normed).shape):
            user.replace_all_uses_with(normed)
    value.replace_all_uses_with(reshaped(graph, normed, val(value).shape, like=value))
