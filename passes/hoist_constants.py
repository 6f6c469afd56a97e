"""Compute what depends on parameters alone when they change, and not in every forward."""

from typing import Any

import torch
from torch import fx

from moe_compile.passes._constants import escapes, make_recipe, replace_by_constant
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
    why_unfit,
)
from moe_compile.passes._outcome import Outcome, exactness
from moe_compile.passes._pure import constant_nodes
from moe_compile.passes._rms_norm import is_weight_of_norm
from moe_compile.passes._settings import settings_of
from moe_compile.passes._worth import Candidate, candidates

# A constant so small is taken whatever it saves: it costs no traffic worth counting.
SMALL = 2**20

_PROMOTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


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
    another device; what is, or may share memory with, an output; large weights quantised to one
    byte; weights that an RMSNorm widens, which `fuse_norm` wants as they are; graphs that want
    gradients.
    Numerics: casts and moves are bitwise. Arithmetic, and casts to a narrower dtype that Inductor
    would fuse, round as uncompiled and not as fused; exactness="bitwise" leaves these alone.
    """
    outcome = Outcome()
    settings = settings_of(graph)
    promoted = _write_out_promotions(graph)
    constant = constant_nodes(graph)
    _decline_casts(graph, constant, outcome)
    left = settings.constant_budget
    taken = []
    for c in sorted(candidates(graph, constant), key=lambda c: -c.saved):
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


def _unfit(c: Candidate, exactness: str, left: int) -> str:
    """Why a candidate stays in the graph, or ""."""
    if escapes(c.node):
        return "the forward returns it, or may return its memory, which the caller may then change"
    if is_widening(c.node) and is_weight_of_norm(c.node):
        return "an RMSNorm widens it as it reads it"
    if exactness == "bitwise" and not c.is_exact:
        return "its arithmetic would round as uncompiled, not as fused, and exactness=bitwise"
    if c.saved < 0 and c.size > SMALL:
        return (
            f"a constant of {_bytes(c.size)} would cost {_bytes(-c.saved)} more traffic a forward"
        )
    if c.unpacks and c.size > SMALL:
        return f"a constant of {_bytes(c.size)} would undo what quantisation saves"
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
