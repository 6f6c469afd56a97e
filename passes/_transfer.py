"""What an op makes of the placements of its inputs, for one group of ranks.

Where a rule knows nothing it says unknown: a wrong "replicated" would become a wrong rewrite or a
false alarm, an unknown only a silence.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from moe_compile.ops import moe
from moe_compile.passes._graph import CASTS, COPIES, RESHAPES, arg, aten, is_call
from moe_compile.passes._here import Here, first, first_unknown, joined, kinds, name_of
from moe_compile.passes._placement import Placement, unknown
from moe_compile.passes._transfer_pointwise import pointwise
from moe_compile.passes._transfer_products import (
    addmm_rule,
    attention_rule,
    combine_rule,
    embedding_rule,
    grouped_mm_rule,
    mm_rule,
    strict_rule,
)
from moe_compile.passes._transfer_views import (
    cat_rule,
    copy_rule,
    expand_rule,
    getitem_rule,
    nonlinear_reduction_rule,
    permute_rule,
    reshape_rule,
    same_rule,
    select_rule,
    slice_rule,
    split_rule,
    sum_rule,
)
from moe_compile.passes._whole_numbers import made_from_nothing, with_whole_numbers


def transfer(here: Here) -> Placement:
    """The placement of `here.node`'s value."""
    node = here.node
    found = [here.of(n) for n in here.inputs]
    if any(p.whole for p in found):
        return with_whole_numbers(here, found)
    rule = None if _adds_residual(node) else _RULES.get(node.target)
    if rule is not None:
        return rule(here)
    if not found:
        return made_from_nothing(node)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return unknown("it is random")
    if torch.Tag.pointwise in tags:
        return pointwise(here)
    if all(p.is_replicated for p in found) and _is_known(node.target):
        whole = any(isinstance(a, int) for a in tree_leaves((node.args, node.kwargs)))
        return joined(here, found).unsure() if whole else joined(here, found)
    if (p := first(found, "partial")) and str(node.target).startswith(_NONLINEAR):
        return here.missing_reduce(p)
    return first_unknown(found) or unknown(f"no rule for {name_of(node)} of {kinds(found)}")


def _adds_residual(node: fx.Node) -> bool:
    """Does a product or sum end with an addition that its rule knows nothing of?"""
    places = ((moe.skinny_mm.default, 3), (moe.combine.default, 4))
    return any(is_call(node, op) and arg(node, i, "residual") is not None for op, i in places)


def _is_known(target: Any) -> bool:
    """Does the op compute the same from the same on every rank?"""
    return isinstance(target, torch._ops.OpOverload) and target.namespace in (
        "aten",
        "prims",
        "moe_compile",
    )


_NONLINEAR = ("aten.topk", "aten.sort", "aten._softmax", "aten.argmax", "aten.max", "aten.min")


_RULES: dict[Any, Callable[[Here], Placement]] = {
    **dict.fromkeys((*COPIES, *CASTS, aten.detach.default), same_rule),
    **dict.fromkeys(RESHAPES, reshape_rule),
    **dict.fromkeys((aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), reshape_rule),
    **dict.fromkeys((aten.squeeze.default,), reshape_rule),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), permute_rule),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), split_rule),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), sum_rule),
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.any.dim), nonlinear_reduction_rule),
    **dict.fromkeys((aten.mm.default, aten.bmm.default, moe.skinny_mm.default), mm_rule),
    **dict.fromkeys((moe.silu_mul.default, moe.gelu_mul.default, moe.relu2.default), strict_rule),
    **dict.fromkeys((moe.route.default, moe.sort_tokens.default), strict_rule),
    aten.copy.default: copy_rule,
    aten.expand.default: expand_rule,
    aten.slice.Tensor: slice_rule,
    aten.select.int: select_rule,
    aten.cat.default: cat_rule,
    operator.getitem: getitem_rule,
    aten.addmm.default: addmm_rule,
    aten.embedding.default: embedding_rule,
    moe.grouped_mm.default: grouped_mm_rule,
    moe.combine.default: combine_rule,
    **{
        op: attention_rule
        for name in (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        )
        if (op := getattr(getattr(aten, name, None), "default", None)) is not None
    },
}
