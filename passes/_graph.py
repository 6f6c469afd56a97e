"""What every pass needs of FX: ask what a node is, make a node, print a graph."""

import operator
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
SQUEEZES = (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)


def is_call(node: Any, *targets: Any) -> bool:
    """Does `node` call one of `targets`?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def args(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments, without FX's wide union type."""
    return tuple(node.args)


def arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """One argument, whether it was given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def val(node: fx.Node) -> Tensor:
    """The fake tensor of a node."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), node
    return value


def has_val(node: Any) -> bool:
    """Is `node` a node whose value is one tensor?"""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def same(a: Any, b: Any) -> bool:
    """Are two sizes known to be equal, without adding a guard?"""
    return bool(statically_known_true(a == b))


def same_shape(node: fx.Node, shape: Any) -> bool:
    """Has `node` this shape, for all values of its symbols?"""
    mine = val(node).shape
    return len(mine) == len(shape) and all(map(same, mine, shape))


def strip(node: Any, *targets: Any) -> Any:
    """Walk up the first argument while the node calls one of `targets`."""
    while is_call(node, *targets):
        node = node.args[0]
    return node


def view_source(node: Any) -> Any:
    """The node whose memory `node` is a view of, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    mine = storage(node)
    sources = [s for s in node.all_input_nodes if mine is not None and storage(s) == mine]
    return sources[0] if sources else None


def strip_views(node: Any) -> Any:
    """Walk up to the node that made the memory."""
    while (source := view_source(node)) is not None:
        node = source
    return node


def storage(node: fx.Node) -> Any:
    """What names the memory of a node's value, or of the first of several, if it has one."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def is_widening(node: Any) -> bool:
    """Is `node` a cast between floats that loses nothing?"""
    if not is_call(node, *CASTS):
        return False
    source, target = val(args(node)[0]).dtype, val(node).dtype
    return source == target or (source, target) in _WIDENINGS


_WIDENINGS = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def is_exact_cast(node: Any) -> bool:
    """Is `node` a cast that keeps indices and counts, which are whole and below 2 ** 24?"""
    exact = (torch.int32, torch.int64, torch.float32, torch.float64)
    if not is_call(node, *CASTS) or val(node).dtype not in exact:
        return False
    source = args(node)[0]
    whole = is_call(source, aten.histc.default, aten.cumsum.default) or is_exact_cast(source)
    return whole or not val(source).is_floating_point()


def operands(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The two operands of a commutative op, in both orders."""
    a, b = args(node)[:2]
    return (a, b), (b, a)


def constant(node: Any) -> Any:
    """The number that a literal or an `aten.full` holds, else None."""
    if isinstance(node, (int, float, bool)):
        return node
    node = strip(node, *CASTS, aten.expand.default)
    if is_call(node, aten.scalar_tensor.default):
        return node.args[0]
    if is_call(node, aten.full.default) and isinstance(node.args[1], (int, float, bool)):
        return node.args[1]
    return None


def call(
    graph: fx.Graph, target: Callable[..., Any], *arguments: Any, like: fx.Node, **kwargs: Any
) -> fx.Node:
    """A new call where the graph inserts, with its fake value and `like`'s place in the model."""
    node = graph.call_function(target, arguments, kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values = fx.map_arg((arguments, kwargs), lambda n: n.meta["val"])
    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None, f"{target} has no fake inputs"
    with fake_mode, torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return node


def unpack(graph: fx.Graph, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """The outputs of a call that returns several tensors."""
    return tuple(call(graph, operator.getitem, node, i, like=node) for i in range(count))


def is_input(node: fx.Node | None) -> bool:
    """Is `node` an input of the graph, or a transpose of one? Nothing is."""
    node = strip(node, *TRANSPOSES)
    return node is None or node.op in ("placeholder", "get_attr")


def move_before(place: fx.Node, node: fx.Node | None) -> None:
    """`node`, for which `is_input` holds, stands before `place`."""
    if node is None or node < place:
        return
    for source in node.all_input_nodes:
        move_before(place, source)
    place.prepend(node)


def readers_before(last: fx.Node, sources: Collection[fx.Node]) -> list[fx.Node]:
    """What lies before `last`, and that itself, if it is computed from `sources`, in order."""
    node, found, from_sources = min(sources), [], set(sources)
    while node is not last:
        node = node.next
        if node not in from_sources and not from_sources.isdisjoint(node.all_input_nodes):
            from_sources.add(node)
            found.append(node)
    return found


def reshaped(graph: fx.Graph, x: fx.Node, shape: Any, like: fx.Node) -> fx.Node:
    """x in another shape of known sizes: what x was reshaped from, if that has it, or a reshape."""
    source: Any = x
    while not same_shape(source, shape):
        if not is_call(source, *RESHAPES):
            return call(graph, aten.reshape.default, x, list(shape), like=like)
        source = args(source)[0]
    return source  # type: ignore[no-any-return]


_PARAMETER = "moe_compile_parameter"


def mark_parameter(node: fx.Node, unfit: str = "") -> None:
    """Say that a placeholder is a parameter or buffer.

    unfit: why nothing can be computed from it ahead of the call, if so.
    """
    node.meta[_PARAMETER] = unfit


def is_parameter(node: Any) -> bool:
    """Is `node` the placeholder of a parameter or buffer that this graph only reads?"""
    return isinstance(node, fx.Node) and node.meta.get(_PARAMETER) == ""


def why_unfit(node: fx.Node) -> str:
    """Why the placeholder of a parameter can't be computed with ahead, or ""."""
    return str(node.meta.get(_PARAMETER, ""))


def clean(graph: fx.Graph) -> None:
    """Drop what a rewrite left without users, and check the graph."""
    graph.eliminate_dead_code()
    graph.lint()


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.float8_e4m3fn: "f8e4m3",
}


def render(graph: fx.Graph, renumber: bool = True) -> str:
    """The graph as text, a node a line: the notation of the passes' docstrings, tests and reports.

    Nodes are numbered anew by what they call, so that the text is equal on every torch version; or
    they keep their names, so that two states of one graph can be compared line by line.
    """
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        base = node.name if node.op in ("placeholder", "get_attr") else _base(node)
        fresh = f"{base}_{counts[base]}" if counts[base] else base
        names[node] = fresh if renumber else node.name
        counts[base] += 1
        lines.append(_line(node, names))
    return "\n".join(lines)


def _base(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    value = node.meta.get("val")
    kind = f": {_kind(value)}" if isinstance(value, Tensor) else ""
    if node.op == "placeholder":
        return f"{names[node]}{kind}"
    if node.op == "output":
        return f"return {_arg(node.args[0], names)}"
    if node.op == "get_attr":
        return f"{names[node]}{kind} = self.{node.target}"
    words = [_arg(a, names) for a in node.args]
    words += [f"{k}={_arg(v, names)}" for k, v in node.kwargs.items() if k not in _UNTOLD]
    if node.target is operator.getitem:
        return f"{names[node]}{kind} = {words[0]}[{words[1]}]"
    target = node.target if isinstance(node.target, torch._ops.OpOverload) else _base(node)
    return f"{names[node]}{kind} = {str(target).removesuffix('.default')}({', '.join(words)})"


_UNTOLD = {"layout", "pin_memory", "device", "requires_grad", "memory_format"}


def _kind(value: Tensor) -> str:
    return f"{_SHORT.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"


def _arg(argument: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(_arg(a, names) for a in argument)}]"
    if isinstance(argument, torch.dtype):
        return _SHORT.get(argument, str(argument))
    return repr(argument) if isinstance(argument, str) else str(argument)
