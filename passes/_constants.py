"""Live constants in a graph: placeholders whose values are pure functions of parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moe_compile.passes._graph import strip_views, val

_KEY = "moe_compile_constant"


@dataclass(frozen=True)
class Constant:
    """How one extra input of a graph is made.

    sources: positions of the parameters among the graph's inputs.
    recipe: from the parameters, in that order, to the value.
    val: the fake value.
    """

    sources: tuple[int, ...]
    recipe: fx.GraphModule
    val: Tensor

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.val)


def constants_of(graph: fx.Graph) -> list[Constant]:
    """The constants of a graph, in the order of its placeholders, of which they are the last."""
    found = [node.meta.get(_KEY) for node in graph.find_nodes(op="placeholder")]
    constants = [c for c in found if c is not None]
    assert found[len(found) - len(constants) :] == constants, "constants are the last inputs"
    return constants


def storage_bytes(value: Tensor) -> int:
    """Bytes that a tensor of this shape takes."""
    return int(value.numel()) * value.element_size()


def make_recipe(root: fx.Node) -> tuple[list[fx.Node], fx.GraphModule]:
    """The placeholders that `root` is computed from, in the graph's order, and the computation."""
    needed: set[fx.Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    recipe = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sources: list[fx.Node] = []
    for node in root.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            copies[node] = recipe.placeholder(f"p{len(sources)}")
            sources.append(node)
        else:
            # Named by place, so that equal recipes print alike: they are shared between graphs.
            copies[node] = recipe.create_node(
                node.op,
                node.target,
                fx.map_arg(node.args, copies.__getitem__),
                fx.map_arg(node.kwargs, copies.__getitem__),
                name=f"v{len(copies)}",
            )
    recipe.output(copies[root])
    return sources, fx.GraphModule(torch.nn.Module(), recipe)


def replace_by_constant(root: fx.Node, sources: list[fx.Node], recipe: fx.GraphModule) -> None:
    """Make `root` an input of its graph; one of the same recipe and sources is used again."""
    graph = root.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    constant = Constant(tuple(map(placeholders.index, sources)), recipe, val(root))
    for node in placeholders:
        other = node.meta.get(_KEY)
        same_sources = other is not None and other.sources == constant.sources
        if same_sources and other.recipe.code == recipe.code:
            root.replace_all_uses_with(node)
            return
    with graph.inserting_after(placeholders[-1]):
        new = graph.placeholder(f"constant_{len(constants_of(graph))}")
    new.meta = {"val": constant.val, _KEY: constant}
    root.replace_all_uses_with(new)


def escapes(root: fx.Node) -> bool:
    """May a caller get hold of `root`'s memory: does an output, or what it may alias, reach it?"""
    todo, seen = [root], {root}
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen and may_alias(user):
                seen.add(user)
                todo.append(user)
    return False


def may_alias(node: fx.Node) -> bool:
    """May an output of `node` share memory with an input, as far as its schema tells?"""
    schema = getattr(node.target, "_schema", None)
    if schema is None or any(r.alias_info is not None for r in schema.returns):
        return True
    return strip_views(node) is not node
