"""Multiply few rows by several weights in one launch: [x @ w + bias for each w].

The dense layers of a decode step that read the same x, as q, k and v: a weight of few columns is
read by few programs, which alone would leave most of a GPU idle.

Letters: M rows, K features in, N features out, each weight its own.
Shapes: x [M, K], w 1 to 4 of [K, N], bias as many, of [N] or None -> as many of [M, N]. M may be 0.
    w may have any strides; all [K, N], or all the transpose of [N, K], take one launch.
Dtypes: as `skinny_mm`.
Errors: ValueError as `skinny_mm`, for no weight or more than 4, and for another number of biases.
"""

from collections.abc import Sequence

from torch import Tensor

from moe_compile.ops._check import check
from moe_compile.ops._library import define
from moe_compile.ops._skinny_mm_kernel import MOST_WEIGHTS, Blocks, fits, launch
from moe_compile.ops.skinny_mm import check_skinny_mm, skinny_mm, skinny_mm_reference


def skinny_mms_reference(
    x_MK: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """What `skinny_mms` means, in plain PyTorch and in the dtype it is given."""
    return [skinny_mm_reference(x_MK, w, bias) for w, bias in zip(ws, biases, strict=True)]


def skinny_mms_triton(
    x_MK: Tensor,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Launch the kernel once where it takes such an input, else `skinny_mm` for each."""
    check_skinny_mms("skinny_mms", x_MK, ws, biases)
    if not fits(x_MK, ws):
        return _cpu(x_MK, ws, biases)
    return launch(x_MK, ws, biases, blocks)


def _cpu(x_MK: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    check_skinny_mms("skinny_mms", x_MK, ws, biases)
    return [skinny_mm(x_MK, w, bias) for w, bias in zip(ws, biases, strict=True)]


def check_skinny_mms(
    op: str, x_MK: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    check(1 <= len(ws) <= MOST_WEIGHTS, op, f"1 to {MOST_WEIGHTS} weights", len(ws))
    check(len(biases) == len(ws), op, f"{len(ws)} biases or None, one a weight", len(biases))
    for w, bias in zip(ws, biases, strict=True):
        check_skinny_mm(op, x_MK, w, bias)


def _fake(x_MK: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    check_skinny_mms("skinny_mms", x_MK, ws, biases)
    return [x_MK.new_empty(x_MK.shape[0], w.shape[1]) for w in ws]


skinny_mms = define(
    "skinny_mms(Tensor x, Tensor[] w, Tensor?[] bias) -> Tensor[]",
    cpu=_cpu,
    cuda=skinny_mms_triton,
    fake=_fake,
)
