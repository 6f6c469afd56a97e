"""Take the user's marks out of the graph once nothing reads them any more."""

from torch import fx

from moe_compile.passes._collectives import MARK
from moe_compile.passes._constants import escapes
from moe_compile.passes._graph import args, aten, call
from moe_compile.passes._outcome import Outcome, exactness


@exactness("bitwise")
def drop_marks(graph: fx.Graph) -> Outcome:
    """Replace `mark_placement(x)` by x.

    Before:
        arg0_1: f32[4, 8]
        mark_placement: f32[4, 8] = moe_compile.mark_placement(arg0_1, 'replicated', 0, '0')
        sin: f32[4, 8] = aten.sin(mark_placement)
        return [sin]

    After:
        arg0_1: f32[4, 8]
        sin: f32[4, 8] = aten.sin(arg0_1)
        return [sin]

    A mark that is returned becomes a copy: a caller gets memory of its own.
    """
    outcome = Outcome()
    for node in graph.find_nodes(op="call_function", target=MARK):
        x = args(node)[0]
        outcome.rewrote(node, f"mark of {args(node)[1]} read")
        if escapes(node):
            with graph.inserting_before(node):
                x = call(graph, aten.clone.default, x, like=node)
        node.replace_all_uses_with(x)
        graph.erase_node(node)
    return outcome
