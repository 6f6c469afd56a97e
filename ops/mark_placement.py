"""Say how a value lies on the ranks of a group. The value stays as it is.

kind "replicated": every rank holds the same; "partial": the sum over the ranks of exactly this
group is the value meant; "shard": the ranks hold its parts along `dim`, in their order.
The passes read the mark and drop it; where they do not run it is a copy.

Shapes and dtypes: any.
Errors: ValueError for another kind, or a `dim` out of range.
"""

from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._library import define

KINDS = ("replicated", "partial", "shard")


def mark_placement_reference(x: Tensor, kind: str, dim: int, group_name: str) -> Tensor:
    """What `mark_placement` computes."""
    return x.clone()


def check_mark(x: Tensor, kind: str, dim: int) -> None:
    """The errors of `mark_placement`."""
    check(kind in KINDS, "mark_placement", f"kind among {', '.join(KINDS)}", kind)
    if kind == "shard" and not -x.ndim <= dim < x.ndim:
        check(False, "mark_placement", f"dim within the {x.ndim} of x", dim)


def _mark(x: Tensor, kind: str, dim: int, group_name: str) -> Tensor:
    check_mark(x, kind, dim)
    return x.clone()


mark_placement = define(
    "mark_placement(Tensor x, str kind, int dim, str group_name) -> Tensor",
    cpu=_mark,
    cuda=_mark,
    fake=_mark,
)
