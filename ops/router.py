"""Choose the experts of few tokens by their rows: `route` of the logits x @ w + bias.

    logits = rms_norm(x) @ w + bias, or x @ w + bias without a norm
    weights, ids = route(logits, ...)

A router of a decode step is so short that launching it costs more than what it does, and its logits
so few that the program of the product that ends last routes them all.

Letters: T tokens, H features, E experts, K experts per token.
Shapes: x [T, H], w [H, E], bias [E], norm [H] -> weights [T, top_k], ids [T, top_k], and with
    `keep` the normed rows [T, H]. choice_bias [E] is `route`'s bias. T may be 0.
Dtypes: x, w, bias and norm as `rms_norm_mms`, without a norm as `skinny_mm`; the logits are rounded
    to x's dtype. choice_bias, weights and ids as `route`.
Errors: ValueError as those ops, and for `keep` without a norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._library import define
from moe_compile.ops._route_kernel import Routing
from moe_compile.ops._skinny_mm_kernel import (
    Blocks,
    Chosen,
    Norm,
    can_keep,
    can_route,
    fits,
    launch,
)
from moe_compile.ops._tickets import tickets
from moe_compile.ops.rms_norm_mms import check_norm, rms_norm_mms, rms_norm_mms_reference
from moe_compile.ops.route import check_choice, route, route_reference
from moe_compile.ops.skinny_mm import check_skinny_mm, skinny_mm, skinny_mm_reference


def router_reference(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    norm_eps: float,
    round_first: bool,
    keep: bool,
    *how: Any,
) -> list[Tensor]:
    """What `router` means: the references of its ops, one after the other."""
    if norm_H is None:
        return [*route_reference(skinny_mm_reference(x_TH, w_HE, bias_E), *how)]
    given = (x_TH, norm_H, norm_eps, [w_HE], [bias_E], round_first, keep)
    logits_TE, *kept = rms_norm_mms_reference(*given)
    return [*route_reference(logits_TE, *how), *kept]


def router_triton(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    norm_eps: float,
    round_first: bool,
    keep: bool,
    *how: Any,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Launch the product's kernel, which routes, too, where it can; else one op, then the other."""
    routing = Routing(*how)
    weights_TK, ids_TK, *_ = _empty(x_TH, w_HE, bias_E, norm_H, keep, routing)
    normed = norm_H is not None
    ticket = tickets(x_TH, 1) if takes_one_launch(x_TH, w_HE, normed, keep, routing) else None
    if ticket is None:
        return _in_turn(x_TH, w_HE, bias_E, norm_H, norm_eps, round_first, keep, *how)
    norm = None if norm_H is None else Norm(norm_H, norm_eps, round_first, keep)
    chosen = Chosen(routing, weights_TK, ids_TK, ticket)
    _, *kept = launch(x_TH, [w_HE], [bias_E], blocks, norm=norm, chosen=chosen)
    return [weights_TK, ids_TK, *kept]


def takes_one_launch(x_TH: Tensor, w_HE: Tensor, norm: bool, keep: bool, routing: Routing) -> bool:
    """Is there a kernel for all of it?"""
    fit = fits(x_TH, [w_HE], norm) and (not keep or can_keep(x_TH, [w_HE]))
    return fit and can_route(x_TH, w_HE, routing)


def _in_turn(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    norm_eps: float,
    round_first: bool,
    keep: bool,
    *how: Any,
) -> list[Tensor]:
    if norm_H is None:
        return [*route(skinny_mm(x_TH, w_HE, bias_E), *how)]
    given = (x_TH, norm_H, norm_eps, [w_HE], [bias_E], round_first, keep)
    logits_TE, *kept = rms_norm_mms(*given)
    return [*route(logits_TE, *how), *kept]


def _cpu(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    norm_eps: float,
    round_first: bool,
    keep: bool,
    *how: Any,
) -> list[Tensor]:
    _check(x_TH, w_HE, bias_E, norm_H, keep, Routing(*how))
    return _in_turn(x_TH, w_HE, bias_E, norm_H, norm_eps, round_first, keep, *how)


def _check(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    keep: bool,
    routing: Routing,
) -> None:
    op = "router"
    check_skinny_mm(op, x_TH, w_HE, bias_E)
    check(not keep or norm_H is not None, op, "a norm whose rows to keep", "none")
    if norm_H is not None:
        check_norm(op, x_TH, norm_H)
    check_choice(op, x_TH, w_HE.shape[1], routing)


def _empty(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    keep: bool,
    routing: Routing,
) -> Sequence[Tensor]:
    _check(x_TH, w_HE, bias_E, norm_H, keep, routing)
    (T, H), K = x_TH.shape, routing.top_k
    weights_TK = x_TH.new_empty(T, K, dtype=routing.dtype or torch.float32)
    ids_TK = x_TH.new_empty(T, K, dtype=torch.int64)
    return [weights_TK, ids_TK, *([x_TH.new_empty(T, H)] if keep else [])]


def _fake(
    x_TH: Tensor,
    w_HE: Tensor,
    bias_E: Tensor | None,
    norm_H: Tensor | None,
    norm_eps: float,
    round_first: bool,
    keep: bool,
    *how: Any,
    choice_bias: Tensor | None = None,
    **named: Any,
) -> Sequence[Tensor]:
    if choice_bias is not None:
        named["bias"] = choice_bias
    return _empty(x_TH, w_HE, bias_E, norm_H, keep, Routing(*how, **named))


router = define(
    "router(Tensor x, Tensor w, Tensor? bias, Tensor? norm, float norm_eps, bool round_first,"
    ' bool keep, int top_k, str score="softmax", bool score_first=True, Tensor? choice_bias=None,'
    ' int num_groups=1, int top_groups=1, str group_score="max", bool renormalize=False,'
    " float eps=0.0, float scale=1.0, ScalarType? dtype=None) -> Tensor[]",
    cpu=_cpu,
    cuda=router_triton,
    fake=_fake,
)
