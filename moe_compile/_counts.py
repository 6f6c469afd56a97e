"""Python ints that count up with every call, read by a graph on a GPU from memory.

A cache that counts its tokens in a Python int (transformers' sliding window does) gives the graph
an int as input, and CUDA-graph trees record anew for each value that they meet: for every token.
Where such an int decides no shape, the graph can as well take it as a tensor. What the graph makes
of it for Python, the next count, is computed by the host.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import free_symbols

from moe_compile.passes._graph import args, aten, call, clean, has_val, is_call, val

_DEVICES = ("cuda",)  # where there are CUDA graphs
# What a host computes of ints, and the same of a tensor and another, or an int.
_ON_TENSORS: dict[Any, tuple[Any, Any]] = {
    operator.add: (aten.add.Tensor, aten.add.Tensor),
    operator.sub: (aten.sub.Tensor, aten.sub.Tensor),
    operator.mul: (aten.mul.Tensor, aten.mul.Tensor),
    torch.sym_max: (aten.maximum.default, aten.clamp_min.default),
    torch.sym_min: (aten.minimum.default, aten.clamp_max.default),
}
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
# What may have an int for its second argument, and the same with a tensor there.
_TAKERS = {op: op for op in _SUMS} | {op.Scalar: op.Tensor for op in _COMPARISONS}
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class CountedGraph:
    """A compiled graph that takes counts as tensors, called with ints."""

    _boxed_call = True

    def __init__(
        self,
        compiled: Callable[[list[Any]], Any],
        devices: Mapping[int, torch.device | None],
        next_counts: Callable[..., Sequence[int]],
        outputs: Sequence[int],
    ) -> None:
        self._compiled, self._devices = compiled, devices
        self._next_counts, self._outputs = next_counts, outputs
        self._first: dict[int, int] = {}

    def __call__(self, inputs: list[Any]) -> Any:
        counts = [inputs[i] for i in self._devices]
        for i, device in self._devices.items():
            if device is None:  # nothing reads it: always the same to whom it would make a key
                inputs[i] = self._first.setdefault(i, inputs[i])
            else:  # the number is an argument of the kernel that writes it: no copy to wait for
                inputs[i] = torch.full((), inputs[i], dtype=torch.int64, device=device)
        results = list(self._compiled(inputs))
        for i, count in zip(self._outputs, self._next_counts(*counts), strict=True):
            results[i] = count
        return results


def take_counts(
    gm: fx.GraphModule, example_inputs: list[Any], how: Mapping[str, Any]
) -> Callable[[Callable[[list[Any]], Any]], Any]:
    """Make tensors of the counts of `gm`, in the graph and in its example inputs.

    Returns what wraps the compiled graph, so that it is called with ints as before.
    how: what Inductor was told of the graph.
    Left alone: ints on which a shape depends, or anything but sums, products and comparisons with
    int64; other devices, and graphs on several; graphs for a backward, which may keep ints for it.
    """
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    if not (how.get("is_inference") and any(map(_is_int, placeholders))):
        return lambda compiled: compiled
    symbols = _free_symbols(graph)
    takers = [node for node in graph.nodes if _is_taker(node) and _symbols(node.args[1]) <= symbols]
    counts = {p: i for i, p in enumerate(placeholders) if _is_int(p) and _symbols(p) <= symbols}
    if not counts or len({val(args(node)[0]).device for node in takers}) > 1:
        return lambda compiled: compiled
    next_counts, outputs = _take_out(graph, counts)
    devices: dict[int, torch.device | None] = dict.fromkeys(counts.values())
    tensors: dict[fx.Node, fx.Node] = {}
    for node in takers:
        count = _tensor(graph, args(node)[1], val(args(node)[0]), tensors)
        node.target = _TAKERS[node.target]
        node.update_arg(1, count)
    for p in counts.keys() & tensors.keys():
        devices[counts[p]], example_inputs[counts[p]] = val(p).device, val(p)
    clean(graph)
    gm.recompile()
    return lambda compiled: CountedGraph(compiled, devices, next_counts, outputs)


def _free_symbols(graph: fx.Graph) -> set[Any]:
    """The symbols of those ints that nothing has to know before it runs."""
    bound: set[Any] = set()
    for node in graph.nodes:
        if has_val(node):
            bound |= free_symbols(node.meta["val"])
        if not (_is_of_ints(node) or _is_taker(node) or node.op in ("placeholder", "output")):
            bound = bound.union(_symbols(node), *map(_symbols, node.all_input_nodes))
    sums = [_symbols(node) for node in graph.nodes if _is_int(node)]
    free = set().union(*sums) - bound
    while mixed := [some for some in sums if some & free and not some <= free]:
        free = free.difference(*mixed)
    return free


def _symbols(node: fx.Node) -> set[Any]:
    value = node.meta.get("val")
    return set(free_symbols(value)) if isinstance(value, _SYMBOLIC) else set()


def _is_int(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.SymInt)


def _is_of_ints(node: fx.Node) -> bool:
    """Is it what a host can compute of ints?"""
    return is_call(node, *_ON_TENSORS) and all(_is_int(a) or isinstance(a, int) for a in node.args)


def _is_taker(node: fx.Node) -> bool:
    """Is it a tensor's sum or comparison with an int, int64 both?"""
    if not is_call(node, *_TAKERS) or node.kwargs or not _is_int(node.args[1]):
        return False
    x = val(args(node)[0])
    return x.dtype == torch.int64 and x.device.type in _DEVICES


def _take_out(graph: fx.Graph, counts: Iterable[fx.Node]) -> tuple[Any, list[int]]:
    """What computes the counts that `graph` returned from those it is given, and their places."""
    (output,) = graph.find_nodes(op="output")
    results = list(args(output)[0])
    host = fx.Graph()
    mine = {p: host.placeholder(p.name) for p in counts}
    for node in graph.nodes:
        if _is_of_ints(node) and all(a in mine for a in node.all_input_nodes):
            mine[node] = host.call_function(node.target, fx.map_arg(node.args, mine.__getitem__))
    places = [i for i, result in enumerate(results) if result in mine]
    host.output([mine[results[i]] for i in places])
    host.eliminate_dead_code()
    output.update_arg(0, [None if i in places else r for i, r in enumerate(results)])
    if "user_visible_output_idxs" in output.meta:  # Inductor looks at what these are views of
        seen = output.meta["user_visible_output_idxs"]
        output.meta["user_visible_output_idxs"] = [i for i in seen if i not in places]
    return fx.GraphModule({}, host), places


def _tensor(graph: fx.Graph, x: Any, like: Tensor, made: dict[fx.Node, fx.Node]) -> Any:
    """The int64 tensor of what is computed of counts; a plain int stays one."""
    if not isinstance(x, fx.Node) or x in made:
        return made.get(x, x)
    if x.op == "placeholder":
        fake_mode = detect_fake_mode(like)
        assert fake_mode is not None
        with fake_mode:
            x.meta["val"] = torch.empty((), dtype=torch.int64, device=like.device)
        made[x] = x
        return x
    a, b = (_tensor(graph, each, like, made) for each in x.args)
    with graph.inserting_before(x.next):
        if not isinstance(a, fx.Node) and x.target is operator.sub:  # a - b = b * -1 + a
            a, b = call(graph, aten.mul.Tensor, b, -1, like=x), a
            made[x] = call(graph, aten.add.Tensor, a, b, like=x)
        else:
            a, b = (a, b) if isinstance(a, fx.Node) else (b, a)
            target = _ON_TENSORS[x.target][not isinstance(b, fx.Node)]
            made[x] = call(graph, target, a, b, like=x)
    return made[x]
