"""Find router chains: scores, top-k, renormalisation."""

from torch import fx

from moe_compile.passes._outcome import Outcome, exactness


@exactness("reassociating")
def find_routing(graph: fx.Graph) -> Outcome:
    return Outcome()
