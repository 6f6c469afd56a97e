"""Normalise few rows and multiply them by several weights: [rms_norm(x) @ w + bias for each w].

    rms_norm(x) = x * rsqrt(mean(x ** 2) + eps) * norm, over the last dim

The products of a decode step read whole rows anyway, so that the norm needs no kernel of its own.
With `keep` the normed rows come last, for others that read them.

Letters: M rows, K features in, N features out, each weight its own.
Shapes: x [M, K], norm [K], w 1 to 4 of [K, N], bias as many, of [N] or None -> as many of [M, N],
    and with `keep` [M, K]. M may be 0. w may have any strides, as for `skinny_mms`.
Dtypes: float32, float16 or bfloat16, all the same; normed in float32. The rows kept are rounded at
    the end, and with `round_first` also before they meet `norm`, as transformers' models do; those
    multiplied may not be rounded, or once, before a scale in float32 ends the product.
Errors: ValueError as `skinny_mms`, and for a norm of another shape, dtype or device.
Source: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_same_device
from moe_compile.ops._library import define
from moe_compile.ops._skinny_mm_kernel import Blocks, Norm, can_keep, fits, launch
from moe_compile.ops.skinny_mms import check_skinny_mms, skinny_mms, skinny_mms_reference


def rms_norm_mms_reference(
    x_MK: Tensor,
    norm_K: Tensor,
    eps: float,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    round_first: bool = True,
    keep: bool = False,
) -> list[Tensor]:
    """What `rms_norm_mms` means, in plain PyTorch and with its dtype's roundings."""
    normed_MK = rms_norm(x_MK, norm_K, eps, round_first)
    ys = skinny_mms_reference(normed_MK, ws, biases)
    return [*ys, normed_MK] if keep else ys


def rms_norm(x_MK: Tensor, norm_K: Tensor, eps: float, round_first: bool) -> Tensor:
    """The normed rows, as a model writes them: float32 inside (float64 kept)."""
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    normed_MK = x_MK.to(wide) * torch.rsqrt(x_MK.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        normed_MK = normed_MK.to(x_MK.dtype).to(wide)
    return (normed_MK * norm_K.to(wide)).to(x_MK.dtype)


def rms_norm_mms_triton(
    x_MK: Tensor,
    norm_K: Tensor,
    eps: float,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    round_first: bool = True,
    keep: bool = False,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """Launch the kernel once where it takes such an input, else norm first."""
    _check(x_MK, norm_K, ws, biases)
    if not fits(x_MK, ws, norm=True) or (keep and not can_keep(x_MK, ws)):
        return _cpu(x_MK, norm_K, eps, ws, biases, round_first, keep)
    return launch(x_MK, ws, biases, blocks, norm=Norm(norm_K, eps, round_first, keep))


def _cpu(
    x_MK: Tensor,
    norm_K: Tensor,
    eps: float,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    round_first: bool = True,
    keep: bool = False,
) -> list[Tensor]:
    _check(x_MK, norm_K, ws, biases)
    normed_MK = rms_norm(x_MK.contiguous(), norm_K, eps, round_first)
    ys: list[Tensor] = skinny_mms(normed_MK, ws, biases)
    return [*ys, normed_MK] if keep else ys


def _check(
    x_MK: Tensor, norm_K: Tensor, ws: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    check_skinny_mms("rms_norm_mms", x_MK, ws, biases)
    check_norm("rms_norm_mms", x_MK, norm_K)


def check_norm(op: str, x_MK: Tensor, norm_K: Tensor) -> None:
    K = x_MK.shape[1]
    check(norm_K.ndim == 1 and norm_K.shape[0] == K, op, f"norm [{K}]", norm_K.shape)
    check(norm_K.dtype == x_MK.dtype, op, f"norm in x's dtype {x_MK.dtype}", norm_K.dtype)
    check_same_device(op, x=x_MK, norm=norm_K)


def _fake(
    x_MK: Tensor,
    norm_K: Tensor,
    eps: float,
    ws: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    round_first: bool = True,
    keep: bool = False,
) -> list[Tensor]:
    _check(x_MK, norm_K, ws, biases)
    M, K = x_MK.shape
    return [x_MK.new_empty(M, N) for N in (*(w.shape[1] for w in ws), *([K] if keep else []))]


rms_norm_mms = define(
    "rms_norm_mms(Tensor x, Tensor norm, float eps, Tensor[] w, Tensor?[] bias,"
    " bool round_first=True, bool keep=False) -> Tensor[]",
    cpu=_cpu,
    cuda=rms_norm_mms_triton,
    fake=_fake,
)
