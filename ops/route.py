"""Router logits to the experts of each token and their weights.

Letters: T tokens, E experts, K experts per token, P groups of experts.
"""

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_float, check_same_device
from moe_compile.ops._library import define

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
    ids_TK = choice_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if not score_first:
        weights_TK = _score(weights_TK, score)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + eps)
    return (weights_TK * scale).to(dtype or torch.float32), ids_TK


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
    op = "route"
    check_dims(op, "logits", logits_TE, "[T, E]")
    check_float(op, "logits", logits_TE)
    T, E = logits_TE.shape
    check(score in SCORES, op, f"score in {SCORES}", score)
    check(group_score in GROUP_SCORES, op, f"group_score in {GROUP_SCORES}", group_score)
    check(1 <= num_groups and E % num_groups == 0, op, f"num_groups dividing E = {E}", num_groups)
    check(1 <= top_groups <= num_groups, op, f"top_groups in 1..{num_groups}", top_groups)
    candidates = top_groups * (E // num_groups)
    check(1 <= top_k <= candidates, op, f"top_k in 1..{candidates}", top_k)
    check(score_first or (bias_E is None and num_groups == 1), op, "bias and groups only with score_first", "score_first=False")
    if bias_E is not None:
        check(bias_E.shape == (E,), op, f"bias [{E}]", list(bias_E.shape))
        check_float(op, "bias", bias_E)
        check_same_device(op, logits=logits_TE, bias=bias_E)
    weights_TK = logits_TE.new_empty(T, top_k, dtype=dtype or torch.float32)
    return weights_TK, logits_TE.new_empty(T, top_k, dtype=torch.int64)


def _cpu(
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
    arguments = (logits_TE, top_k, score, score_first, bias_E, num_groups, top_groups)
    arguments += (group_score, renormalize, eps, scale, dtype)
    _fake(*arguments)
    return route_reference(*arguments)


route = define(
    'route(Tensor logits, int top_k, str score="softmax", bool score_first=True,'
    " Tensor? bias=None, int num_groups=1, int top_groups=1, str group_score=\"max\","
    " bool renormalize=False, float eps=0.0, float scale=1.0, ScalarType? dtype=None)"
    " -> (Tensor weights, Tensor ids)",
    cpu=_cpu,
    cuda=_cpu,
    fake=_fake,
)
