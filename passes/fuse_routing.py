"""Let the product of a router choose the experts."""

import operator
from typing import Any, NamedTuple

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._route_kernel import Routing
from moe_compile.ops.router import takes_one_launch
from moe_compile.passes._graph import (
    RESHAPES,
    args,
    call,
    is_call,
    is_input,
    move_before,
    same_shape,
    strip,
    unpack,
    val,
)
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._quantised import arguments_of

_PRODUCTS = (moe.skinny_mm.default, moe.skinny_mms.default, moe.rms_norm_mms.default)


class Product(NamedTuple):
    """What makes the logits; `kept` are the normed rows that it also returns."""

    node: fx.Node
    x: fx.Node
    w: fx.Node
    bias: fx.Node | None
    norm: fx.Node | None = None
    eps: float = 0.0
    round_first: bool = True
    keep: bool = False


@exactness("bitwise")
def fuse_routing(graph: fx.Graph) -> Outcome:
    """On a GPU, choose experts in the product that makes the logits.

    Before:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64]
        arg2_1: bf16[64, 32]
        rms_norm_mms = moe_compile.rms_norm_mms(arg0_1, arg1_1, 1e-06, [arg2_1], [None], True, True)
        getitem: bf16[2, 32] = rms_norm_mms[0]
        getitem_1: bf16[2, 64] = rms_norm_mms[1]
        route = moe_compile.route(getitem, 4)
        getitem_2: f32[2, 4] = route[0]
        getitem_3: i64[2, 4] = route[1]
        return [getitem_1, getitem_2, getitem_3]

    After:
        arg0_1: bf16[2, 64]
        arg1_1: bf16[64]
        arg2_1: bf16[64, 32]
        router = moe_compile.router(arg0_1, arg2_1, None, arg1_1, 1e-06, True, True, 4)
        getitem: f32[2, 4] = router[0]
        getitem_1: i64[2, 4] = router[1]
        getitem_2: bf16[2, 64] = router[2]
        return [getitem_2, getitem, getitem_1]

    The product is a `skinny_mm`, or an `rms_norm_mms` or `skinny_mms` of one weight.
    Left alone: CPUs; logits that others read, too, or that other ops make; a bias of the choice
    that is computed after the product; a number of rows that is not known, and more rows or experts
    than one program routes (`ops/_skinny_mm_kernel.py`).
    Numerics: the same to the bit.
    """
    outcome = Outcome()
    for route in graph.find_nodes(op="call_function", target=moe.route.default):
        logits = args(route)[0]
        made = strip(logits, *RESHAPES)
        maker = args(made)[0] if is_call(made, operator.getitem) else made
        if val(logits).device.type != "cuda" or not is_call(maker, *_PRODUCTS):
            continue
        try:
            product = _product(maker)
            routing = _routing(route, product, made)
        except Declined as reason:
            outcome.decline(route, str(reason))
            continue
        T, E = val(logits).shape
        outcome.rewrote(route, f"{T} rows choose {routing.top_k} of {E} experts in the product")
        _rewrite(graph, route, product)
    return outcome


def _product(maker: fx.Node) -> Product:
    given = arguments_of(maker)
    if is_call(maker, moe.skinny_mm.default):
        if given["residual"] is not None:
            raise Declined("logits to which a residual is added")
        return Product(maker, given["x"], given["w"], given["bias"])
    if len(given["w"]) > 1:
        raise Declined("logits that are made beside other products")
    (w,), (bias,) = given.pop("w"), given.pop("bias")
    return Product(maker, given.pop("x"), w, bias, **given)


def _routing(route: fx.Node, product: Product, made: fx.Node) -> Routing:
    """How `route` chooses, if `product` can do it."""
    logits, *how = arguments_of(route).values()
    reader, read = route, logits
    while set(read.users) == {reader} and read is not made:
        reader, read = read, args(read)[0]
    if set(read.users) != {reader}:
        raise Declined("logits that others read, too")
    if not all(isinstance(size, int) for size in val(logits).shape):
        raise Declined("a number of rows that is not known")
    if not same_shape(made, val(logits).shape):
        raise Declined("logits that are put in other rows")
    routing = Routing(*how)
    if not _can_stand_before(product.node, routing.bias):
        raise Declined("a bias of the choice that is computed after the product")
    x, w = val(product.x), val(product.w)
    if not takes_one_launch(x, w, product.norm is not None, product.keep, routing):
        raise Declined(f"{x.shape[0]} rows in {x.dtype} of {w.shape[1]} experts")
    return routing


def _can_stand_before(place: fx.Node, bias: Any) -> bool:
    return is_input(bias) or bias < place


def _rewrite(graph: fx.Graph, route: fx.Node, product: Product) -> None:
    """The op where the product was."""
    node, *given = product
    named = {"choice_bias" if k == "bias" else k: v for k, v in route.kwargs.items()}
    move_before(node, arguments_of(route)["bias"])
    with graph.inserting_before(node):
        how = (*args(route)[1:],)
        new = call(graph, moe.router.default, *given, *how, like=route, **named)
        weights, ids, *kept = unpack(graph, new, 2 + product.keep)
    for user in list(route.users):
        user.replace_all_uses_with((weights, ids)[args(user)[1]])
    if product.keep:
        for user in node.users:
            if args(user)[1] == 1:
                user.replace_all_uses_with(kept[0])
