from torch import fx
from moe_compile.passes._outcome import Outcome, exactness
@exactness("reassociating")
def find_experts(graph: fx.Graph) -> Outcome:
    return Outcome()
