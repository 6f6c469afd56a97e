"""Everything above a router's top-k: logits, their scores, a bias, groups."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_compile.passes._graph import (
    CASTS,
    args,
    aten,
    has_val,
    is_call,
    operands,
    same_shape,
    strip,
    val,
)
from moe_compile.passes._groups import Groups, parse_groups
from moe_compile.passes._outcome import Declined
from moe_compile.passes._topk import FLOATS, check_topk, dtype_name, parse_softmax, widened


@dataclass(frozen=True)
class Selection:
    """How experts are chosen, in the words of `route`."""

    logits: fx.Node
    top_k: int
    score: str
    bias: fx.Node | None
    groups: Groups | None
    outside: str  # why a score or groups stay outside, or ""

    @property
    def is_plain(self) -> bool:
        """Does the top-k read the logits themselves?"""
        return self.score == "none" and self.bias is None and self.groups is None


def parse_selection(topk: fx.Node, scores: fx.Node | None) -> Selection:
    """How `topk` chooses, where weights are `scores` of the chosen (None: the top-k's values)."""
    choice, top_k = check_topk(topk)
    if val(choice).ndim != 2:
        raise Declined(f"top-k of {val(choice).ndim} dims, not of [T, E]")
    bias, outside = None, ""
    if scores is None or scores is choice:
        try:
            scores, groups = parse_groups(choice, top_k)
        except Declined as declined:  # a top-k of given scores it is in any case
            scores, groups, outside = choice, None, str(declined)
    else:
        unmasked, groups = parse_groups(choice, top_k)
        bias = _parse_bias(unmasked, scores)
    score, logits = _parse_score(scores)
    if groups is not None and groups.fill == 0.0:
        _check_nonnegative(score, bias)
    if val(logits).dtype not in FLOATS:
        raise Declined(f"logits are {dtype_name(logits)}")
    if score == "none":
        outside = outside or _why_outside(scores)
    return Selection(logits, top_k, score, bias, groups, outside)


def _parse_score(scores: fx.Node) -> tuple[str, fx.Node]:
    """A score function that `route` knows and what it is of, or else "none" of the scores."""
    if val(scores).dtype == torch.float32:
        softmax = parse_softmax(scores)
        if softmax is not None:
            return "softmax", widened(softmax[0])
        if is_call(scores, aten.sigmoid.default):
            return "sigmoid", widened(args(scores)[0])
    return "none", widened(scores)


def _why_outside(scores: fx.Node) -> str:
    given = widened(scores)
    known = strip(given, *CASTS)
    if is_call(known, aten.sigmoid.default) or parse_softmax(known) is not None:
        return f"scores are rounded to {dtype_name(given)}"
    return ""


def _parse_bias(choice: fx.Node, scores: fx.Node) -> fx.Node | None:
    """The bias of `choice = scores + bias`, None of `choice = scores`."""
    given = widened(scores)
    if widened(choice) is given:
        return None
    if is_call(choice, aten.add.Tensor) and not choice.kwargs:
        for a, b in operands(choice):
            if widened(a) is given:
                _check_bias(choice, b)
                bias: fx.Node = widened(b)
                return bias
    raise Declined("the weights are not taken from the scores that choose")


def _check_bias(choice: fx.Node, bias: Any) -> None:
    if val(choice).dtype != torch.float32:
        raise Declined(f"scores + bias are rounded to {dtype_name(choice)}")
    if not (has_val(bias) and same_shape(bias, (val(choice).shape[1],))):
        raise Declined("the bias is not one number for each expert")
    if val(bias).dtype not in FLOATS:
        raise Declined(f"the bias is {dtype_name(bias)}")


def _check_nonnegative(score: str, bias: fx.Node | None) -> None:
    """0.0 masks as -inf does, where scores are never less and enough experts are kept.

    A top-k of the scores under -inf is then a top-k of the scores under 0.0: only a score of
    exactly 0.0 ties, and a top-k may choose any of equals.
    """
    if bias is not None or score == "none":
        raise Declined("experts are masked with 0.0, but a kept score may be less")
