"""Which nodes of a graph depend on parameters alone."""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from moe_compile.passes._graph import aten, is_parameter, prims

_NAMESPACES = ("aten", "prims", "moe_compile")
# What may be made from nothing and yet be the same in every call; seeds and empties are not.
MADE = (
    aten.full.default,
    aten.scalar_tensor.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    prims.iota.default,
)


def constant_nodes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """The nodes that are the same in every call until a parameter changes: from parameters?"""
    found: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if is_parameter(node):
            found[node] = True
        elif node.op == "call_function" and _is_pure(node):
            inputs = node.all_input_nodes
            if all(i in found for i in inputs) and (inputs or node.target in MADE):
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
    values = list(tensors_of(node))
    inputs = [v for i in node.all_input_nodes for v in tensors_of(i)]
    static = all(isinstance(n, int) for v in values for n in (*v.shape, *v.stride()))
    return bool(values) and static and len({v.device for v in (*values, *inputs)}) == 1


def tensors_of(node: fx.Node) -> Iterator[Tensor]:
    """The tensors among the outputs of a node."""
    value = node.meta.get("val")
    for v in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(v, Tensor):
            yield v
