"""Products of few rows in float8 norm what they quantise, for `fuse_norm`."""

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_fp8_kernel import can_norm
from moe_compile.passes._graph import RESHAPES, args, call, is_call, reshaped, val
from moe_compile.passes._outcome import Declined
from moe_compile.passes._quantised import arguments_of
from moe_compile.passes._rms_norm import RMSNorm


def norm_before_quantising(graph: fx.Graph, node: fx.Node, source: fx.Node, norm: RMSNorm) -> str:
    """Norm in the `skinny_mms_fp8` that is `node`, and say what was done; or decline."""
    how = arguments_of(node)
    _check(norm, how["x"], how["power_of_two"], how["amax_floor"])
    if how["norm"] is not None:
        raise Declined("a product that norms its rows already")
    M, K = val(how["x"]).shape
    given = {"norm": norm.weight, "norm_eps": norm.eps}
    given |= {} if norm.round_first else {"round_first": False}
    with graph.inserting_before(node):
        rows = reshaped(graph, source, (M, K), like=node)
        product = (rows, *args(node)[1:])
        kwargs = {**node.kwargs, **given}
        new = call(graph, moe.skinny_mms_fp8.default, *product, like=node, **kwargs)
        node.replace_all_uses_with(new)
    return f"{M} rows of {K} normed in the float8 product with {len(how['w'])} weights"


def _check(norm: RMSNorm, x: fx.Node, power_of_two: bool, amax_floor: float) -> None:
    """Decline what the kernel does not norm, or what others read, too."""
    if not all(isinstance(size, int) for size in val(x).shape):
        raise Declined("a number of rows that is not known")
    (M, K), features = val(x).shape, val(norm.value).shape[-1]
    if features != K:
        raise Declined(f"a norm over {features} features of {K}")
    if not can_norm(val(x), power_of_two, amax_floor, norm.eps):
        kind = "powers of two" if power_of_two else "plain scales"
        raise Declined(f"{M} rows in float8 by {kind}, amax_floor {amax_floor}, eps {norm.eps}")
    if not _is_read_by_products_alone(norm.value):
        raise Declined("rows that others than products in float8 read")


def _is_read_by_products_alone(value: fx.Node) -> bool:
    """Are all readers of `value`, and of its reshapes, products that norm what they read?"""
    for user in value.users:
        if is_call(user, *RESHAPES):
            if not _is_read_by_products_alone(user):
                return False
        elif not is_call(user, moe.skinny_mms_fp8.default) or args(user)[0] is not value:
            return False
    return True
