"""Choose the experts of each token by its router logits, and weigh them.

    scores = score(logits) where score_first, else logits         score: softmax, sigmoid, none
    choice = scores + bias, and -inf outside the top_groups best of num_groups groups of experts
             (a group counts as its best choice, "max", or its best two together, "top2_sum")
    ids = the top_k largest of choice, in descending order
    weights = scores[ids], or score(logits[ids]) where not score_first
    weights = weights / (sum(weights) + eps) where renormalize; then weights * scale

Of equal choices the lowest experts are taken on a GPU, as by torch.topk there; NaN is the largest.
Whatever the logits hold, ids are top_k different experts.

Letters: T tokens, E experts, K experts per token, P groups of experts.
Shapes: logits [T, E], bias [E] -> weights [T, top_k], ids [T, top_k]. T may be 0.
Dtypes: logits and bias float32, float16 or bfloat16, each its own; computed in float32; weights in
    `dtype`, float32 if not given; ids int64.
Errors: ValueError for other ranks, dtypes or shapes, several devices, an unknown score or
    group_score, groups that do not divide E, more top_k than experts to choose from, top2_sum of
    groups of one, and bias or groups without score_first.
Source: softmax, then top-k: Switch, Fedus et al. 2021, arXiv:2101.03961; top-k, then softmax:
    Mixtral, Jiang et al. 2024, arXiv:2401.04088; sigmoid, bias and groups: DeepSeek-V3, 2024,
    arXiv:2412.19437, section 2.1.2.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_float_dtype,
    check_same_device,
)
from moe_compile.ops._cpu import route_cpu
from moe_compile.ops._library import define
from moe_compile.ops._overlap import overlap
from moe_compile.ops._route_kernel import route_kernel
from moe_compile.ops._route_many_kernel import choose_rows
from moe_compile.ops._route_many_kernel import launch as launch_many

SCORES = ("softmax", "sigmoid", "none")
GROUP_SCORES = ("max", "top2_sum")


def route_reference(
    logits_TE: Tensor,
    top_k: int,
    score: str = "softmax",
    score_first: bool = True,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What `route` means, in plain PyTorch; float32 unless given float64."""
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    scores_TE = _score(logits_TE, score) if score_first else logits_TE
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
    if num_groups > 1:
        choice_TE = _keep_groups(choice_TE, num_groups, top_groups, group_score)
    weights_TK, ids_TK = choice_TE.topk(top_k, dim=-1)
    if choice_TE is not scores_TE:
        weights_TK = scores_TE.gather(1, ids_TK)
    if not score_first:
        weights_TK = _score(weights_TK, score)
    if renormalize:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + eps if eps else total_T1)
    if scale != 1.0:
        weights_TK = weights_TK * scale
    return weights_TK.to(dtype or weights_TK.dtype), ids_TK


def _score(x: Tensor, score: str) -> Tensor:
    return {"softmax": lambda: x.softmax(-1), "sigmoid": x.sigmoid, "none": lambda: x}[score]()


def _keep_groups(choice_TE: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    """-inf for every expert outside the `top_groups` best groups."""
    T, E = choice_TE.shape
    groups_TPE = choice_TE.view(T, num_groups, E // num_groups)
    per_group = 1 if group_score == "max" else 2
    best_TP = groups_TPE.topk(per_group, dim=-1).values.sum(-1)
    chosen = best_TP.topk(top_groups, dim=-1).indices
    mask_TP = torch.zeros_like(best_TP, dtype=torch.bool).scatter_(1, chosen, True)
    return groups_TPE.masked_fill(~mask_TP.unsqueeze(-1), float("-inf")).view(T, E)


def route_triton(
    logits_TE: Tensor,
    top_k: int,
    score: str = "softmax",
    score_first: bool = True,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch a kernel: one program for one token, or for `rows` where there are no groups."""
    weights_TK, ids_TK = results = _fake(
        logits_TE,
        top_k,
        score,
        score_first,
        bias_E,
        num_groups,
        top_groups,
        group_score,
        dtype=dtype,
    )
    T, E = logits_TE.shape
    if T == 0:
        return results
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    rows = rows or choose_rows(T, E)
    if num_groups == 1 and rows > 1:
        launch_many(logits_TE, bias_E, results, rows, score, score_first, renormalize, eps, scale)
        return results
    per_group = E // num_groups
    BLOCK_P, BLOCK_S = triton.next_power_of_2(num_groups), triton.next_power_of_2(per_group)
    route_kernel[(T,)](
        logits_TE,
        logits_TE if bias_E is None else bias_E.contiguous(),
        weights_TK,
        ids_TK,
        logits_TE.stride(0),
        per_group,
        num_groups,
        top_groups,
        float(eps),
        float(scale),
        K=top_k,
        SCORE=score,
        SCORE_FIRST=score_first,
        HAS_BIAS=bias_E is not None,
        GROUPED=num_groups > 1,
        PER_GROUP=1 if group_score == "max" else 2,
        RENORMALIZE=renormalize,
        BLOCK_P=BLOCK_P,
        BLOCK_S=BLOCK_S,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=max(1, BLOCK_P * BLOCK_S // 1024),
        **overlap(logits_TE),
    )
    return results


def _check(
    logits_TE: Tensor,
    top_k: int,
    score: str,
    score_first: bool,
    bias_E: Tensor | None,
    num_groups: int,
    top_groups: int,
    group_score: str,
    dtype: torch.dtype | None,
) -> None:
    op = "route"
    check_dims(op, "logits", logits_TE, "[T, E]")
    check_float(op, "logits", logits_TE)
    E = logits_TE.shape[1]
    check_choice = _check_choice_once if type(E) is int else _check_choice
    check_choice(
        E, top_k, score, score_first, bias_E is None, num_groups, top_groups, group_score, dtype
    )
    if bias_E is not None:
        check(bias_E.shape == (E,), op, f"bias [{E}]", list(bias_E.shape))
        check_float(op, "bias", bias_E)
        check_same_device(op, logits=logits_TE, bias=bias_E)


def _check_choice(
    E: int,
    top_k: int,
    score: str,
    score_first: bool,
    unbiased: bool,
    num_groups: int,
    top_groups: int,
    group_score: str,
    dtype: torch.dtype | None,
) -> None:
    op = "route"
    check(score in SCORES, op, f"score in {SCORES}", score)
    check(group_score in GROUP_SCORES, op, f"group_score in {GROUP_SCORES}", group_score)
    check(num_groups >= 1 and E % num_groups == 0, op, f"num_groups dividing E = {E}", num_groups)
    check(1 <= top_groups <= num_groups, op, f"top_groups in 1..{num_groups}", top_groups)
    per_group = E // num_groups
    if num_groups > 1 and group_score == "top2_sum":
        check(per_group >= 2, op, "groups of two or more for top2_sum", per_group)
    candidates = top_groups * per_group
    check(1 <= top_k <= candidates, op, f"top_k in 1..{candidates}", top_k)
    plain = unbiased and num_groups == 1
    check(score_first or plain, op, "bias and groups only with score_first", "score_first=False")
    check_float_dtype(op, dtype)


# Its words take longer to write than the op to run; a symbolic E can't be a key.
_check_choice_once = functools.cache(_check_choice)


def _fake(
    logits_TE: Tensor,
    top_k: int,
    score: str = "softmax",
    score_first: bool = True,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _check(logits_TE, top_k, score, score_first, bias_E, num_groups, top_groups, group_score, dtype)
    T = logits_TE.shape[0]
    weights_TK = logits_TE.new_empty(T, top_k, dtype=dtype or torch.float32)
    return weights_TK, logits_TE.new_empty(T, top_k, dtype=torch.int64)


def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    outputs = _fake(*args)
    return outputs if route_cpu(*outputs, *args) else route_reference(*args)


route = define(
    'route(Tensor logits, int top_k, str score="softmax", bool score_first=True,'
    ' Tensor? bias=None, int num_groups=1, int top_groups=1, str group_score="max",'
    " bool renormalize=False, float eps=0.0, float scale=1.0, ScalarType? dtype=None)"
    " -> (Tensor weights, Tensor ids)",
    cpu=_cpu,
    cuda=route_triton,
    fake=_fake,
    cpp=True,
)
