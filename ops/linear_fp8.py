"""A dense layer on float8 rows and a float8 weight, both with scales by block.

    y = dequantized x @ dequantized w.T + bias

Letters: N rows, H features in, G features out, K and L groups along them.
Shapes: x [N, H], x_scale [N, K], w [G, H], w_scale [L, ceil(H / 128)], bias [G] -> [N, G]; as a
    linear layer and its checkpoint store them. Scales as in `grouped_mm_fp8`.
Dtypes: x, w float8_e4m3fn; scales float32; y and bias in `dtype`: float32, float16 or bfloat16.
Errors: ValueError as `grouped_mm_fp8`.
Source: as `grouped_mm_fp8`.
"""

from typing import Any

import torch
from torch import Tensor

from moe_compile.ops._check import check, check_dims, check_same_device
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize, group_of_scales, launch
from moe_compile.ops._library import define
from moe_compile.ops.grouped_mm_fp8 import check_fp8


def linear_fp8_reference(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_GH: Tensor,
    w_scale_LK: Tensor,
    bias_G: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """What `linear_fp8` means: dequantise, multiply, round. float64 if asked for as dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = dequantize(x_NH, x_scale_NK, 1, group_of_scales(x_NH.shape[1], x_scale_NK), wide)
    y_NG = x @ dequantize(w_GH, w_scale_LK, 128, 128, wide).t()
    return (y_NG if bias_G is None else y_NG + bias_G.to(wide)).to(dtype)


def _fake(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_GH: Tensor,
    w_scale_LK: Tensor,
    bias_G: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    op = "linear_fp8"
    check_dims(op, "w", w_GH, "[G, H]")
    check_dims(op, "w_scale", w_scale_LK, "[L, K]")
    G, H = w_GH.shape
    blocks = ((G + 127) // 128, (H + 127) // 128)
    check(w_scale_LK.shape == blocks, op, f"w_scale {list(blocks)}", w_scale_LK.shape)
    check_fp8(op, x_NH, x_scale_NK, w_GH.t(), w_scale_LK.t(), dtype)
    check_same_device(
        op, x=x_NH, x_scale=x_scale_NK, w=w_GH, w_scale=w_scale_LK, bias=bias_G
    )  # fmt: skip
    if bias_G is not None:
        check(bias_G.shape == (G,), op, f"bias [{G}]", bias_G.shape)
        check(bias_G.dtype == dtype, op, f"bias in {dtype}", bias_G.dtype)
    return x_NH.new_empty(x_NH.shape[0], G, dtype=dtype)


def linear_fp8_triton(
    x_NH: Tensor,
    x_scale_NK: Tensor,
    w_GH: Tensor,
    w_scale_LK: Tensor,
    bias_G: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Launch the grouped kernel with one expert."""
    y_NG = _fake(x_NH, x_scale_NK, w_GH, w_scale_LK, bias_G, dtype)
    bias_EG = None if bias_G is None else bias_G[None]
    w_EHG, w_scale_EKL = w_GH.t()[None], w_scale_LK.t()[None]
    launch(x_NH, x_scale_NK, w_EHG, w_scale_EKL, y_NG, None, bias_EG=bias_EG)
    return y_NG


def _cpu(*args: Any, **kwargs: Any) -> Tensor:
    _fake(*args, **kwargs)
    return linear_fp8_reference(*args, **kwargs)


linear_fp8 = define(
    "linear_fp8(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias=None,"
    " ScalarType dtype=bfloat16) -> Tensor",
    cpu=_cpu,
    cuda=linear_fp8_triton,
    fake=_fake,
)
