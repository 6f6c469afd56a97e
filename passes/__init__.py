"""Passes over FX graphs, in the order in which they run."""

if __name__ != "moe_compile.passes":
    raise ImportError(f"{__name__!r} is moe_compile.passes: import it by that name")

from moe_compile.passes._outcome import Pass
from moe_compile.passes.choose_attention import choose_attention
from moe_compile.passes.choose_kernels import choose_kernels
from moe_compile.passes.choose_linear import choose_linear
from moe_compile.passes.find_activation import find_activation
from moe_compile.passes.find_experts import find_experts
from moe_compile.passes.find_routing import find_routing
from moe_compile.passes.hoist_constants import hoist_constants

PASSES: tuple[Pass, ...] = (
    find_experts,
    find_routing,
    find_activation,
    hoist_constants,
    choose_kernels,
    choose_linear,
    choose_attention,
)
