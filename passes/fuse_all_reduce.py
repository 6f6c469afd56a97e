"""Fuse an all-reduce with the residual add and the norm behind it."""

from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._symmetric_memory import inbox_of
from moe_compile.passes._collectives import ALL_REDUCE, Group, collective_of, group_of
from moe_compile.passes._graph import (
    RESHAPES,
    args,
    aten,
    call,
    has_val,
    is_call,
    operands,
    same_shape,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._rms_norm import RMSNorm, rms_norms_of


@exactness("reassociating")
def fuse_all_reduce(graph: fx.Graph) -> Outcome:
    """Make all-reduce, residual add and RMSNorm one op, where that was measured to be faster.

    Before:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[2, 64]
        arg2_1: bf16[64]
        all_reduce: bf16[2, 64] = _c10d_functional.all_reduce(arg0_1, 'sum', '0')
        wait_tensor: bf16[2, 64] = _c10d_functional.wait_tensor(all_reduce)
        add: bf16[2, 64] = aten.add.Tensor(arg1_1, wait_tensor)
        convert_element_type: f32[2, 64] = prims.convert_element_type(add, f32)
        pow: f32[2, 64] = aten.pow.Tensor_Scalar(convert_element_type, 2)
        mean: f32[2, 1] = aten.mean.dim(pow, [-1], True)
        add_1: f32[2, 1] = aten.add.Tensor(mean, 1e-06)
        rsqrt: f32[2, 1] = aten.rsqrt(add_1)
        mul: f32[2, 64] = aten.mul.Tensor(convert_element_type, rsqrt)
        convert_element_type_1: bf16[2, 64] = prims.convert_element_type(mul, bf16)
        mul_1: bf16[2, 64] = aten.mul.Tensor(arg2_1, convert_element_type_1)
        return [add, mul_1]

    After:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[2, 64]
        arg2_1: bf16[64]
        all_reduce_add_rms_norm = moe_compile.all_reduce_add_rms_norm(arg0_1, arg1_1, arg2_1, 1e-06, '0', True)
        getitem: bf16[2, 64] = all_reduce_add_rms_norm[0]
        getitem_1: bf16[2, 64] = all_reduce_add_rms_norm[1]
        return [getitem, getitem_1]

    Proof: the op is the same sums and roundings; nothing else reads what the all-reduce returns.
    Every rank decides alike: the graphs are equal, and the number of rows up to which the op is
    faster is one that the ranks agreed on in `moe_compile.parallel.use_symmetric_memory`.
    Left alone: groups for which that was not called; more rows, or a number not known; a sum
    without a norm; other dtypes; float32.
    Numerics: the ranks are summed in float32, in rank order, and the squares in another order.
    """  # noqa: E501
    outcome = Outcome()
    for node in graph.find_nodes(op="call_function", target=ALL_REDUCE):
        group = group_of(node)
        if group is None or args(node)[1] != "sum" or group.size == 1:
            continue
        if val(node).device.type == "cpu" and inbox_of(group.name) is None:
            continue
        try:
            add, residual, norm = _match(node)
            rows = _gains(add, group)
        except Declined as reason:
            outcome.decline(node, str(reason))
            continue
        with graph.inserting_before(add):
            x = _as(graph, args(node)[0], add)
            new = call(
                graph, moe.all_reduce_add_rms_norm.default,
                x, residual, norm.weight, norm.eps, group.name, norm.round_first, like=add,
            )  # fmt: skip
            total, normed = unpack(graph, new, 2)
        norm.value.replace_all_uses_with(normed)
        add.replace_all_uses_with(total)
        _erase_up_to(node, add)
        H = val(add).shape[-1]
        outcome.rewrote(add, f"all_reduce_add_rms_norm: {rows} rows of {H}, {group}")
    return outcome


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, RMSNorm]:
    """The add that alone reads the sum over ranks, its other summand, and the norm."""
    value = _only_user(node)
    if (found := collective_of(value, ALL_REDUCE)) is None or found.call is not node:
        raise Declined("the sum is not waited for where it is made")
    while is_call(reader := _only_user(value), *RESHAPES):
        value = reader
    if not is_call(reader, aten.add.Tensor) or reader.kwargs:
        raise Declined("the sum over ranks is not just added to a residual")
    residual: Any = next((b for a, b in operands(reader) if a is value), None)
    if not has_val(residual) or residual is value or not _alike(residual, value, reader):
        raise Declined("the residual has another shape or dtype")
    norms = [n for n in rms_norms_of(reader) if _stands_before(n.weight, reader)]
    if not norms:
        raise Declined("no RMSNorm reads the sum with the residual")
    return reader, residual, norms[0]


def _erase_up_to(node: fx.Node, last: fx.Node) -> None:
    """Erase `last` and what led to it from `node`; a wait is never dead to FX."""
    chain = [node]
    while chain[-1] is not last:
        chain.append(_only_user(chain[-1]))
    for dead in reversed(chain):
        dead.graph.erase_node(dead)


def _only_user(node: fx.Node) -> Any:
    if len(node.users) != 1:
        raise Declined("the sum over ranks is read more than once")
    return next(iter(node.users))


def _alike(a: fx.Node, b: fx.Node, total: fx.Node) -> bool:
    dtypes = {val(n).dtype for n in (a, b, total)}
    return len(dtypes) == 1 and same_shape(a, val(total).shape) and same_shape(b, val(total).shape)


def _stands_before(weight: fx.Node, node: fx.Node) -> bool:
    return weight.op in ("placeholder", "get_attr") or weight < node


def _gains(add: fx.Node, group: Group) -> int:
    """How many rows, if the fused op is faster for them."""
    *lead, H = val(add).shape
    inbox = inbox_of(group.name)
    if inbox is None:
        raise Declined(f"moe_compile.parallel.use_symmetric_memory was not called for {group}")
    rows = 1
    for size in lead:
        if not isinstance(size, int):
            raise Declined("a number of rows that is not known")
        rows *= size
    most = inbox.fastest.get((H, val(add).dtype))
    if most is None:
        raise Declined(f"not measured for rows of {H} in {val(add).dtype}")
    if not 0 < rows <= most:
        raise Declined(f"{rows} rows, where it was faster up to {most}")
    return rows


def _as(graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
    """x in the shape of `like`."""
    if same_shape(x, val(like).shape):
        return x
    return call(graph, aten.reshape.default, x, list(val(like).shape), like=like)
