"""Multiply few rows by one weight: y = x @ w + bias, or residual + y.

A dense layer of a decode step: its time is that of reading w once, which torch.mm's kernels for
few rows do not reach. `skinny_mms` is several of one x.

Letters: M rows, K features in, N features out.
Shapes: x [M, K], w [K, N], bias [N], residual [M, N] -> [M, N]. M may be 0. w may have any strides;
    [K, N] and the transpose of [N, K] are the fast ones.
Dtypes: float32, float16 or bfloat16, all the same; summed in float32, rounded once, and once more
    with the residual; returned in x's dtype.
Errors: ValueError for other ranks, dtypes or shapes, or tensors on several devices.
"""

import ctypes

import torch
from torch import Tensor

from moe_compile.ops._check import (
    check,
    check_dims,
    check_float,
    check_residual,
    check_same_device,
)
from moe_compile.ops._cpu import _BLOCK_G, _DTYPES, _GROUPED_MM, _library
from moe_compile.ops._library import define
from moe_compile.ops._skinny_mm_kernel import Blocks, fits, launch

MOST_ROWS = 16  # more go to torch.mm

# The C++ kernel is grouped_mm's, with one expert, whose rows end at offsets[M] = M.
_OFFSETS = (ctypes.c_int32 * (MOST_ROWS + 1))(*range(MOST_ROWS + 1))
_OFFSETS_PTR = ctypes.addressof(_OFFSETS)


def skinny_mm_reference(
    x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    """What `skinny_mm` means, in plain PyTorch and in the dtype it is given."""
    y_MN = x_MK @ w_KN
    y_MN = y_MN if bias_N is None else y_MN + bias_N
    return y_MN if residual_MN is None else y_MN + residual_MN


def _mm(x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    if bias_N is None:
        return torch.mm(x_MK, w_KN)
    return torch.addmm(bias_N, x_MK, w_KN)


def _cpu(
    x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    check_skinny_mm("skinny_mm", x_MK, w_KN, bias_N, residual_MN)
    y_MN = _product(x_MK, w_KN, bias_N)
    return y_MN if residual_MN is None else y_MN + residual_MN


def _product(x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None) -> Tensor:
    (M, K), N = x_MK.shape, w_KN.shape[1]
    stride_k, stride_n = w_KN.stride()
    library = _library()
    streams = stride_k == 1 or (stride_n == 1 and N >= _BLOCK_G)
    if library is None or not streams or not 0 < M <= MOST_ROWS:
        return _mm(x_MK, w_KN, bias_N)
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    bias = None if bias_N is None else bias_N.contiguous()
    y_MN = x.new_empty(M, N)
    library.moe_grouped_mm(
        _GROUPED_MM.pack(
            y_MN.data_ptr(),
            x.data_ptr(),
            w_KN.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            _OFFSETS_PTR + 4 * M,
            0,
            *(_DTYPES[x.dtype], M, M, 1, K, N, 1),
            *(x.stride(0), 0, stride_k, stride_n, 0),
            *(M, torch.get_num_threads()),
        )
    )
    return y_MN


def skinny_mm_triton(
    x_MK: Tensor,
    w_KN: Tensor,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Launch the kernel where it takes such an input, else torch.mm."""
    check_skinny_mm("skinny_mm", x_MK, w_KN, bias_N, residual_MN)
    if not fits(x_MK, [w_KN]):
        y_MN = _mm(x_MK, w_KN, bias_N)
        return y_MN if residual_MN is None else y_MN + residual_MN
    return launch(x_MK, [w_KN], [bias_N], blocks, residual_MN)[0]


def check_skinny_mm(
    op: str,
    x_MK: Tensor,
    w_KN: Tensor,
    bias_N: Tensor | None,
    residual_MN: Tensor | None = None,
) -> None:
    check_dims(op, "x", x_MK, "[M, K]")
    check_dims(op, "w", w_KN, "[K, N]")
    check_float(op, "x", x_MK)
    if w_KN.dtype != x_MK.dtype:
        check(False, op, f"w in x's dtype {x_MK.dtype}", w_KN.dtype)
    check_same_device(op, x=x_MK, w=w_KN, bias=bias_N)
    K, N = w_KN.shape
    if (same := x_MK.shape[1] == K) is not True:
        check(same, op, f"x [M, {K}] for w {list(w_KN.shape)}", x_MK.shape)
    if bias_N is not None:
        check(bias_N.shape == (N,), op, f"bias [{N}]", bias_N.shape)
        check(bias_N.dtype == x_MK.dtype, op, f"bias in x's dtype {x_MK.dtype}", bias_N.dtype)
    check_residual(op, residual_MN, (x_MK.shape[0], N), x_MK.dtype, x_MK)


def _fake(
    x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    check_skinny_mm("skinny_mm", x_MK, w_KN, bias_N, residual_MN)
    return x_MK.new_empty(x_MK.shape[0], w_KN.shape[1])


skinny_mm = define(
    "skinny_mm(Tensor x, Tensor w, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    cuda=skinny_mm_triton,
    fake=_fake,
    cpp=True,
)
