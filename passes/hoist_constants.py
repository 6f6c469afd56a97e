"""Compute what depends on parameters alone when they change, and not in every forward."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moe_compile.passes._constants import (
    escapes,
    make_recipe,
    replace_by_constant,
    storage_bytes,
)
from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    call,
    has_val,
    is_call,
    is_parameter,
    is_widening,
    prims,
    strip_views,
    val,
    view_source,
    why_unfit,
)
from moe_compile.passes._outcome import Outcome, exactness
from moe_compile.passes._settings import settings_of

# A constant so small is taken whatever it saves: it costs no traffic worth counting.
SMALL = 2**20

_NAMESPACES = ("aten", "prims", "moe_compile")
# What may be made from nothing and yet be the same in every call; seeds and empties are not.
_MADE = (
    aten.full.default,
    aten.scalar_tensor.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    prims.iota.default,
)
_MOVES = (
    aten.clone.default,
    aten.cat.default,
    aten.stack.default,
    aten.constant_pad_nd.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
)
_LOOKUPS = (
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)
_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
)
_PROMOTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class _Candidate:
    """A node computed from parameters alone, and what a constant in its place is worth."""

    node: fx.Node
    saved: int  # bytes less to move in every forward
    is_exact: bool  # moved and cast only, so that nothing rounds in another way

    @property
    def size(self) -> int:
        return storage_bytes(val(self.node))


@exactness("bitwise")
def hoist_constants(graph: fx.Graph) -> Outcome:
    """Replace casts and other pure functions of parameters by inputs kept up to date.

    Before:
        arg0_1: bf16[5, 32]
        arg1_1: bf16[64, 32]
        convert_element_type: f32[5, 32] = prims.convert_element_type(arg0_1, f32)
        convert_element_type_1: f32[64, 32] = prims.convert_element_type(arg1_1, f32)
        permute: f32[32, 64] = aten.permute(convert_element_type_1, [1, 0])
        mm: f32[5, 64] = aten.mm(convert_element_type, permute)
        return [mm]

    After:
        arg0_1: bf16[5, 32]
        arg1_1: bf16[64, 32]
        constant_0: f32[64, 32]
        convert_element_type: f32[5, 32] = prims.convert_element_type(arg0_1, f32)
        permute: f32[32, 64] = aten.permute(constant_0, [1, 0])
        mm: f32[5, 64] = aten.mm(convert_element_type, permute)
        return [mm]

    Worth: what feeds a kernel of its own (a GEMM, an op of ours) is read, written and read again
    without a constant, and read once with it. What Inductor fuses into its reader is only read
    elsewhere, so a constant is taken if it is not larger than its sources, or at most SMALL. The
    constants of one graph take at most `constant_budget_mb`, those that save most first.
    Left alone: what depends on an input, on a parameter that the graph writes to, on chance or on
    another device; what is, or may share memory with, an output; graphs that want gradients.
    Numerics: casts and moves are bitwise. Arithmetic, and casts to a narrower dtype that Inductor
    would fuse, round as uncompiled and not as fused; exactness="bitwise" leaves these alone.
    """
    outcome = Outcome()
    settings = settings_of(graph)
    promoted = _write_out_promotions(graph)
    constant = _constants(graph)
    _decline_casts(graph, constant, outcome)
    left = settings.constant_budget
    taken = []
    for c in sorted(_candidates(graph, constant), key=lambda c: -c.saved):
        if reason := _unfit(c, settings.exactness, left):
            if c.node not in promoted:
                outcome.decline(c.node, reason)
            continue
        left -= c.size
        taken.append((c, *make_recipe(c.node)))  # all of them before the first is replaced
    for c, sources, recipe in taken:
        names = ", ".join(map(_shown, sources))
        less = f", {_bytes(c.saved)} less to move in a forward" if c.saved > 0 else ""
        outcome.rewrote(c.node, f"constant {_shown(c.node)} from {names}{less}")
        replace_by_constant(c.node, sources, recipe)
    for node in promoted:  # those not taken
        node.replace_all_uses_with(args(node)[0])
    return outcome


def _constants(graph: fx.Graph) -> dict[fx.Node, bool]:
    """The nodes that are the same in every call until a parameter changes: from parameters?"""
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if is_parameter(node):
            found[node] = True
        elif node.op == "call_function" and _is_pure(node):
            inputs = node.all_input_nodes
            if all(i in found for i in inputs) and (inputs or node.target in _MADE):
                found[node] = any(found[i] for i in inputs)
    return found


def _is_pure(node: fx.Node) -> bool:
    """Does `node` give the same static tensors for the same inputs, on their device?"""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES:
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    values = list(_tensors(node))
    inputs = [v for i in node.all_input_nodes for v in _tensors(i)]
    static = all(isinstance(n, int) for v in values for n in (*v.shape, *v.stride()))
    return bool(values) and static and len({v.device for v in (*values, *inputs)}) == 1


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for v in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(v, Tensor):
            yield v


def _candidates(graph: fx.Graph, constant: dict[fx.Node, bool]) -> list[_Candidate]:
    """Where constants end: made in memory of its own, and read by something that is no constant."""
    found: dict[fx.Node, None] = {}
    for node, from_parameters in constant.items():
        if from_parameters and any(user not in constant for user in node.users):
            root = strip_views(node)
            if root.op == "call_function" and has_val(root):
                found[root] = None
    return [_value(root, constant) for root in found]


def _value(root: fx.Node, constant: dict[fx.Node, bool]) -> _Candidate:
    readers = [r for r in _readers(root) if r[1] not in constant]
    looked_up = any(_is_lookup(source, reader) for source, reader in readers)
    fused = all(_is_fused(reader) for _, reader in readers)
    size, read = storage_bytes(val(root)), _bytes_read(root)
    saved = -size if looked_up else read - size if fused else read + size
    chain = [n for n in _chain(root) if n.op == "call_function" and view_source(n) is None]
    is_exact = all(
        is_call(n, *_MOVES, *_MADE) or is_widening(n) or (is_call(n, *CASTS) and not fused)
        for n in chain
    )
    return _Candidate(root, saved, is_exact)


def _readers(root: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Those that read `root` or a view of it, each with what it reads."""
    for user in root.users:
        if user.op == "call_function" and view_source(user) is root:
            yield from _readers(user)
        else:
            yield root, user


def _is_lookup(source: fx.Node, reader: fx.Node) -> bool:
    return is_call(reader, *_LOOKUPS) and args(reader)[0] is source


def _is_fused(reader: fx.Node) -> bool:
    """Does Inductor compute this inside a kernel that it writes?"""
    pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
    return pointwise or is_call(reader, *_REDUCTIONS, *_MOVES, *_LOOKUPS, *CASTS)


def _chain(root: fx.Node) -> set[fx.Node]:
    """All nodes that `root` is computed from, and itself."""
    found, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _bytes_read(root: fx.Node) -> int:
    """Bytes of the parameters, or of the parts of them, that computing `root` reads."""
    inner = [n for n in _chain(root) if n.op == "call_function" and view_source(n) is None]
    parts = {i for n in inner for i in n.all_input_nodes if strip_views(i).op == "placeholder"}
    return sum(
        min(storage_bytes(v), storage_bytes(val(strip_views(p))))
        for p in parts
        for v in _tensors(p)
    )


def _unfit(c: _Candidate, exactness: str, left: int) -> str:
    """Why a candidate stays in the graph, or ""."""
    if escapes(c.node):
        return "the forward returns it, or may return its memory, which the caller may then change"
    if exactness == "bitwise" and not c.is_exact:
        return "its arithmetic would round as uncompiled, not as fused, and exactness=bitwise"
    if c.saved < 0 and c.size > SMALL:
        return (
            f"a constant of {_bytes(c.size)} would cost {_bytes(-c.saved)} more traffic a forward"
        )
    if c.size > left:
        return f"constant_budget_mb: {_bytes(c.size)} wanted, {_bytes(left)} left"
    return ""


def _write_out_promotions(graph: fx.Graph) -> list[fx.Node]:
    """Give a parameter that arithmetic widens, as in f32[T, E] + bf16[E], a cast of its own."""
    new = []
    for target in _PROMOTING:
        for node in graph.find_nodes(op="call_function", target=target):
            for index, operand in enumerate(args(node)[:2]):
                if not (has_val(operand) and is_parameter(strip_views(operand))):
                    continue
                with graph.inserting_before(node):
                    cast = call(
                        graph,
                        prims.convert_element_type.default,
                        operand,
                        val(node).dtype,
                        like=node,
                    )
                if val(cast).dtype != val(operand).dtype and is_widening(cast):
                    node.update_arg(index, cast)
                    new.append(cast)
                else:
                    graph.erase_node(cast)
    return new


def _decline_casts(graph: fx.Graph, constant: dict[fx.Node, bool], outcome: Outcome) -> None:
    """Say why casts that look like those of parameters stay."""
    activations = []
    for node in graph.nodes:
        if not is_call(node, *CASTS) or node in constant:
            continue
        source = strip_views(args(node)[0])
        if reason := why_unfit(source):
            outcome.decline(node, reason)
        elif args(node)[0] in constant or _leaves_device(source, constant):
            outcome.decline(node, "it goes to another device, or its shape is not static")
        elif _is_random(source):
            outcome.decline(node, "it is random")
        else:
            activations.append(node)
    if activations:
        text = f"{len(activations)} casts of activations change with every call"
        outcome.decline(activations[0], text)


def _leaves_device(node: fx.Node, constant: dict[fx.Node, bool]) -> bool:
    """Does `node` copy what would be a constant to another device?"""
    inputs = node.all_input_nodes if has_val(node) else []
    return any(i in constant and has_val(i) and val(i).device != val(node).device for i in inputs)


def _is_random(node: fx.Node) -> bool:
    """Does chance enter here or just before?"""
    near = [n for n in (node, *node.all_input_nodes) if n.op == "call_function"]
    return any(
        torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        or "random" in getattr(n.target, "__name__", "")
        for n in near
    )


def _shown(node: fx.Node) -> str:
    value: Any = val(node)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if abs(count) >= 2**20 else f"{count} bytes"
