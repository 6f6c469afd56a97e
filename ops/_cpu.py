"""The CPU impls of sort_tokens, grouped_mm and combine: C++, compiled at first use.

Inductor's own machinery gives the compiler, its flags, OpenMP and the cache on disk. Without a C++
compiler grouped_mm is one torch.mm per expert that has rows.
"""

import ctypes
import functools
import logging
import struct
import threading
from pathlib import Path

import torch
from torch import Tensor

from moe_compile.ops._check import check

# Experts of more rows go to torch.mm, by (dtype, H is contiguous). Where the two cross, measured at
# H, G = 1024, 768 and 384, 1024 on 2 cores of Zen 4, torch 2.13: float32 96 to 256 and over 256,
# bfloat16 96 and 48 to 64. float16 never: there torch.mm takes 4 to 100 times as long.
_MOST_ROWS = {
    (torch.float32, True): 96,
    (torch.float32, False): 256,
    (torch.bfloat16, True): 96,
    (torch.bfloat16, False): 48,
}
_ALL_ROWS = 2**62
_BLOCK_G = 64  # of cpu_vectors.cpp
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# The fields of the C structs. Packing and passing them: 0.7 us; a ctypes call of 20 arguments: 2.4.
_GROUPED_MM = struct.Struct("6P14q")
_COMBINE = struct.Struct("4P9q")
_SORT_TOKENS = struct.Struct("4P3q")

_SOURCES = ("cpu_vectors.cpp", "cpu_grouped_mm.cpp", "cpu_rows.cpp")
_LOCK = threading.Lock()


def grouped_mm_cpu(
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None,
    top_k: int,
    bias_EG: Tensor | None,
) -> Tensor:
    """`grouped_mm` of checked inputs: experts without rows are not read, no weight is copied."""
    N, H = x_NH.shape
    E, _, G = w_EHG.shape
    R = N if rows_R is None else rows_R.shape[0]
    y_RG = x_NH.new_empty(R, G)
    if y_RG.numel() == 0:
        return y_RG
    stride_e, stride_h, stride_g = w_EHG.stride()
    library = _library()
    if library is None or not (stride_h == 1 or (stride_g == 1 and G >= _BLOCK_G)):
        end = _mm_experts(y_RG, x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG, 0)
        y_RG[end:] = 0
        return y_RG
    most_rows = _MOST_ROWS.get((x_NH.dtype, stride_h == 1), _ALL_ROWS)
    x = x_NH if x_NH.stride(1) == 1 else x_NH.contiguous()
    offsets = offsets_E.contiguous()
    rows = None if rows_R is None else rows_R.contiguous()
    bias = None if bias_EG is None else bias_EG.contiguous()
    arguments = _GROUPED_MM.pack(
        y_RG.data_ptr(),
        x.data_ptr(),
        w_EHG.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        offsets.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        *(_DTYPES[x.dtype], N, R, E, H, G, top_k),
        *(x.stride(0), stride_e, stride_h, stride_g, G),
        *(most_rows, torch.get_num_threads()),
    )
    expected = f"ascending offsets up to {R} and rows in [0, {N * top_k})"
    check(library.moe_grouped_mm(arguments) == 0, "grouped_mm", expected, "others")
    if most_rows < R:
        _mm_experts(y_RG, x_NH, w_EHG, offsets_E, rows_R, top_k, bias_EG, most_rows)
    return y_RG


def _mm_experts(
    y_RG: Tensor,
    x_NH: Tensor,
    w_EHG: Tensor,
    offsets_E: Tensor,
    rows_R: Tensor | None,
    top_k: int,
    bias_EG: Tensor | None,
    most_rows: int,
) -> int:
    """Fill in the experts of more than `most_rows` rows; return where the last expert ends."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end - start > most_rows:
            rows = slice(start, end) if rows_R is None else rows_R[start:end].long() // top_k
            if bias_EG is None:
                torch.mm(x_NH[rows], w_EHG[expert], out=y_RG[start:end])
            else:
                torch.addmm(bias_EG[expert], x_NH[rows], w_EHG[expert], out=y_RG[start:end])
        start = end
    return start


def combine_cpu(
    y_RH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """`combine` of checked inputs, or None where there is no C++ compiler."""
    library = _library()
    if library is None or dtype not in _DTYPES:
        return None
    T, K = position_TK.shape
    R, H = y_RH.shape
    out_TH = y_RH.new_empty(T, H, dtype=dtype)
    y = y_RH if y_RH.stride(1) == 1 else y_RH.contiguous()
    position, weights = position_TK.contiguous(), weights_TK.contiguous()
    arguments = _COMBINE.pack(
        *(out_TH.data_ptr(), y.data_ptr(), weights.data_ptr(), position.data_ptr()),
        *(_DTYPES[dtype], _DTYPES[y.dtype], _DTYPES[weights.dtype]),
        *(T, K, R, H, y.stride(0), torch.get_num_threads()),
    )
    check(library.moe_combine(arguments) == 0, "combine", f"positions below {R}", "others")
    return out_TH


def sort_tokens_cpu(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """`sort_tokens` of checked inputs, or None where there is no C++ compiler."""
    library = _library()
    if library is None:
        return None
    T, K = ids_TK.shape
    R = T * K
    ids = ids_TK.contiguous()
    rows_R = ids.new_empty(R, dtype=torch.int32)
    offsets_E = ids.new_empty(num_experts, dtype=torch.int32)
    position_TK = ids.new_empty(T, K, dtype=torch.int32)
    arguments = _SORT_TOKENS.pack(
        *(rows_R.data_ptr(), offsets_E.data_ptr(), position_TK.data_ptr(), ids.data_ptr()),
        *(ids.dtype == torch.int64, R, num_experts),
    )
    library.moe_sort_tokens(arguments)
    return rows_R, offsets_E, position_TK


def _library() -> ctypes.CDLL | None:
    """The kernels, or None (and one warning) where they cannot be compiled."""
    with _LOCK:
        return _compile()


@functools.cache
def _compile() -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache

        source = "".join(Path(__file__).with_name(name).read_text() for name in _SOURCES)
        library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
        for function in (library.moe_grouped_mm, library.moe_combine, library.moe_sort_tokens):
            function.argtypes = [ctypes.c_char_p]
            function.restype = ctypes.c_int
    except Exception as error:  # no compiler, one that fails, an API that moved: all mean "without"
        reason = str(error).strip().partition("\n")[0]
        logging.getLogger("moe_compile").warning(
            "the CPU kernels could not be compiled, experts go through torch.mm: %s", reason
        )
        return None
    return library
