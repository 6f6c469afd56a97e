"""Passes over FX graphs, in the order in which they run."""

if __name__ != "moe_compile.passes":
    raise ImportError(f"{__name__!r} is moe_compile.passes: import it by that name")

from moe_compile.passes._outcome import Pass
from moe_compile.passes.absorb_latents import absorb_latents
from moe_compile.passes.choose_attention import choose_attention
from moe_compile.passes.choose_kernels import choose_kernels
from moe_compile.passes.choose_linear import choose_linear
from moe_compile.passes.count_together import count_together
from moe_compile.passes.drop_marks import drop_marks
from moe_compile.passes.elide_all_reduces import elide_all_reduces
from moe_compile.passes.find_activation import find_activation
from moe_compile.passes.find_experts import find_experts
from moe_compile.passes.find_routing import find_routing
from moe_compile.passes.fuse_activation_quant import fuse_activation_quant
from moe_compile.passes.fuse_all_reduce import fuse_all_reduce
from moe_compile.passes.fuse_epilogue import fuse_epilogue
from moe_compile.passes.fuse_norm import fuse_norm
from moe_compile.passes.fuse_residual import fuse_residual
from moe_compile.passes.hoist_constants import hoist_constants
from moe_compile.passes.lint_collectives import lint_collectives
from moe_compile.passes.read_cache import read_cache
from moe_compile.passes.rotate_together import rotate_together
from moe_compile.passes.store_together import store_together

PASSES: tuple[Pass, ...] = (
    find_experts,
    find_routing,
    find_activation,
    fuse_activation_quant,
    lint_collectives,
    elide_all_reduces,
    drop_marks,
    fuse_all_reduce,
    hoist_constants,
    choose_kernels,
    fuse_epilogue,
    choose_linear,
    fuse_residual,
    fuse_norm,
    choose_attention,
    count_together,
    rotate_together,
    read_cache,
    absorb_latents,
    store_together,
)
