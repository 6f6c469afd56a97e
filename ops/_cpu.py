"""The CPU impls of the stages: C++ (cpu_*.cpp), compiled at first use.

Inductor's own machinery gives the compiler, its flags, OpenMP and the cache on disk. Without a C++
compiler grouped_mm is one torch.mm per expert that has rows.
"""

import ctypes
import functools
import logging
import struct
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
_EXPERTS = struct.Struct("8P21q3d")
_ROUTE = struct.Struct("4P15q2d")

_STEMS = (
    "vectors",
    "grouped_mm",
    "rows",
    "experts",
    "route",
    "dispatch",
)  # later ones use earlier ones


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
    strides = stride_e, stride_h, stride_g = w_EHG.stride()
    library = _library()
    if library is None or not _streams(w_EHG, strides):
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


def experts_cpu(
    out_TO: Tensor,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w_up_EHG: Tensor,
    w_down_EFO: Tensor,
    bias_up_EG: Tensor | None = None,
    bias_down_EO: Tensor | None = None,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> bool:
    """`experts` of checked inputs into `out`; False, and nothing done, where stages must."""
    library = _library()
    up, down = w_up_EHG.stride(), w_down_EFO.stride()
    if library is None or not (_streams(w_up_EHG, up) and _streams(w_down_EFO, down)):
        return False
    if out_TO.numel() == 0:
        return True
    x = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    ids, weights = ids_TK.contiguous(), weights_TK.contiguous()
    bias_up = None if bias_up_EG is None else bias_up_EG.contiguous()
    bias_down = None if bias_down_EO is None else bias_down_EO.contiguous()
    arguments = _EXPERTS.pack(
        *(out_TO.data_ptr(), x.data_ptr(), ids.data_ptr(), weights.data_ptr()),
        *(w_up_EHG.data_ptr(), w_down_EFO.data_ptr()),
        *(0 if bias is None else bias.data_ptr() for bias in (bias_up, bias_down)),
        *(_DTYPES[x.dtype], _DTYPES[weights.dtype], _DTYPES[out_TO.dtype]),
        *(ids.dtype == torch.int64, *ids.shape, *w_up_EHG.shape, *w_down_EFO.shape[1:]),
        *(x.stride(0), *up, *down, interleaved, limit is not None, torch.get_num_threads()),
        *(alpha, limit or 0.0, up_shift),
    )
    library.moe_experts(arguments)
    return True


def _streams(w_EHG: Tensor, strides: tuple[int, ...]) -> bool:
    """Does the kernel read this layout in order?"""
    return strides[1] == 1 or (strides[2] == 1 and w_EHG.shape[2] >= _BLOCK_G)


def route_cpu(
    weights_TK: Tensor,
    ids_TK: Tensor,
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
) -> bool:
    """`route` of checked inputs into `weights` and `ids`; False where there is no C++ compiler."""
    library = _library()
    if library is None:
        return False
    T, E = logits_TE.shape
    logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    bias = None if bias_E is None else bias_E.contiguous()
    arguments = _ROUTE.pack(
        *(weights_TK.data_ptr(), ids_TK.data_ptr(), logits.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), _DTYPES[weights_TK.dtype]),
        *(_DTYPES[logits.dtype], 0 if bias is None else _DTYPES[bias.dtype]),
        *(T, E, top_k, logits.stride(0), score == "softmax", score == "sigmoid", score_first),
        *(num_groups, top_groups, 1 if group_score == "max" else 2, renormalize),
        *(torch.get_num_threads(), eps, scale),
    )
    library.moe_route(arguments)
    return True


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, or None (and one warning) where they cannot be compiled."""
    try:
        from torch._inductor.codecache import CppCodeCache

        files = [Path(__file__).with_name(f"cpu_{stem}.cpp") for stem in _STEMS]
        source = "".join(path.read_text() for path in files)
        library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
        for stem in ("route", "sort_tokens", "grouped_mm", "combine", "experts"):
            function = getattr(library, f"moe_{stem}")
            function.argtypes = [ctypes.c_char_p]
            function.restype = ctypes.c_int
        library.moe_register()
    except Exception as error:  # no compiler, one that fails, an API that moved: all mean "without"
        reason = str(error).strip().partition("\n")[0]
        logging.getLogger("moe_compile").warning(
            "the CPU kernels could not be compiled, experts go through torch.mm: %s", reason
        )
        return None
    return library
