"""Every Triton kernel compiles for a GPU, on a machine without one.

The interpreter, which runs the kernels' tests on a CPU, accepts what the compiler refuses. Here
each kernel goes through Triton's compiler and ptxas for sm_90, with the types and constants of a
real launch, in another process, which has no interpreter.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import product

import pytest

ACT = {"x_ptr": "*bf16", "y_ptr": "*bf16", "F": "i32", "stride_xr": "i32"}
SILU = {**ACT, "alpha": "fp32", "limit": "fp32", "up_shift": "fp32"}
ROW = {"BLOCK_F": 1024, "INTERPRETED": False}
ROUTE = {
    **{"logits_ptr": "*fp32", "bias_ptr": "*fp32", "weights_ptr": "*fp32", "ids_ptr": "*i64"},
    **{"stride_t": "i32", "per_group": "i32", "num_groups": "i32", "top_groups": "i32"},
    **{"eps": "fp32", "scale": "fp32"},
}
ROUTE_MANY = {"T": "i32", **ROUTE}
SOFTMAX = {"SCORE": "softmax", "SCORE_FIRST": True, "HAS_BIAS": False, "GROUPED": False}
SIGMOID = {"SCORE": "sigmoid", "SCORE_FIRST": True, "HAS_BIAS": True, "GROUPED": True}
TOP8 = {"K": 8, "PER_GROUP": 2, "RENORMALIZE": True, "BLOCK_K": 8}
SORT = {
    **{"ids_ptr": "*i64", "rows_ptr": "*i32", "offsets_ptr": "*i32", "position_ptr": "*i32"},
    **{"counts_ptr": "*i32", "starts_ptr": "*i32", "R": "i32", "E": "i32", "num_blocks": "i32"},
}
COMBINE = {
    **{"y_ptr": "*bf16", "position_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": "*bf16"},
    **{"residual_ptr": "*bf16", "H": "i32", "stride_yr": "i32"},
}
GEMM = {
    **{"x_ptr": "*bf16", "w_ptr": "*bf16", "offsets_ptr": "*i32", "rows_ptr": "*i32"},
    **{"bias_ptr": "*bf16", "y_ptr": "*bf16", "R": "i32", "E": "i32", "H": "i32", "G": "i32"},
    **{"top_k": "i32", "num_tiles": "i32", "stride_xn": "i32", "stride_we": "i32"},
    **{"stride_wh": "i32", "stride_wg": "i32", "alpha": "fp32", "limit": "fp32"},
    "up_shift": "fp32",
}
IN_F32 = {name: kind.replace("bf16", "fp32") for name, kind in GEMM.items()}
QUANT = {
    **{"x_ptr": "*bf16", "up_ptr": "*bf16", "weights_ptr": "*fp32", "offsets_ptr": "*i32"},
    **{
        "q_ptr": "*fp8e4nv",
        "stride_ur": "i32",
        "scale_ptr": "*fp32",
        "R": "i32",
        "E": "i32",
        "stride_xr": "i32",
    },
    **{"stride_sr": "i32", "stride_sg": "i32", "alpha": "fp32", "limit": "fp32"},
    **{"up_shift": "fp32", "amax_floor": "fp32", "scale_floor": "fp32"},
}
GEMM_FP8 = {
    **{"x_ptr": "*fp8e4nv", "xs_ptr": "*fp32", "w_ptr": "*fp8e4nv", "ws_ptr": "*fp32"},
    **{"offsets_ptr": "*i32", "rows_ptr": "*i32", "bias_ptr": "*bf16", "y_ptr": "*bf16"},
    **{name: "i32" for name in ("R", "E", "H", "G", "top_k", "num_tiles", "stride_xn")},
    **{f"stride_{name}": "i32" for name in ("xsn", "xsg", "we", "wg", "wse", "wsk", "wsg")},
    **{name: "fp32" for name in ("alpha", "limit", "up_shift")},
}
DOWN_COMBINE = {
    **{"h_ptr": "*bf16", "ids_ptr": "*i64", "weights_ptr": "*fp32", "w_ptr": "*bf16"},
    **{"bias_ptr": "*bf16", "residual_ptr": "*bf16", "out_ptr": "*bf16"},
    **{"E": "i32", "F": "i32", "C": "i32"},
    **{"stride_we": "i32", "stride_wo": "i32", "ws_ptr": "*fp32", "amax_floor": "fp32"},
    "stride_wf": "i32",
    **{"stride_wse": "i32", "stride_wsk": "i32", "stride_wsg": "i32"},
}
ALL_REDUCE = {
    **{"x_ptr": "*i32", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "sum_ptr": "*bf16"},
    **{"normed_ptr": "*bf16", "inboxes_ptr": "*i64", "exchanges_ptr": "*i32", "W": "i32"},
    **{"row_words": "i32", "rows": "i32", "eps": "fp32"},
}
SKINNY = {  # of q, k and v
    **{"x_ptr": "*bf16", "M": "i32", "K": "i32", "stride_xm": "i32", "eps": "fp32"},
    **dict.fromkeys(("norm_ptr", "residual_ptr", "normed_ptr"), "*bf16"),
    **{name: ("*bf16",) * 3 for name in ("w_ptrs", "bias_ptrs", "y_ptrs")},
    **{name: ("i32",) * 3 for name in ("Ns", "bias_Ns", "strides_w")},
}
SKINNY_FP8 = {
    **{**SKINNY, "xs_ptr": "*fp32", "amax_floor": "fp32"},
    **{"w_ptrs": ("*fp8e4nv",) * 3, "ws_ptrs": ("*fp32",) * 3},
}
GATE_UP_FP8 = {
    **{"x_ptr": "*bf16", "ids_ptr": "*i64", "w_ptr": "*fp8e4nv", "ws_ptr": "*fp32"},
    **{name: "i32" for name in ("E", "H", "F", "top_k", "stride_xt")},
    **{f"stride_{name}": "i32" for name in ("we", "wg", "wse", "wsk", "wsg")},
    **{name: "fp32" for name in ("alpha", "limit", "up_shift", "amax_floor")},
    "h_ptr": "*bf16",
}
UP_COLUMNS = {
    **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "h_ptr"), "*bf16"),
    **{name: "i32" for name in ("E", "H", "F", "top_k", "stride_xt", "stride_we", "stride_wh")},
    **{name: "fp32" for name in ("alpha", "limit", "up_shift")},
    "ids_ptr": "*i64",
}
DOWN_COLUMNS = {
    **{"h_ptr": "*bf16", "ids_ptr": "*i64", "weights_ptr": "*fp32", "w_ptr": "*bf16"},
    **{"bias_ptr": "*bf16", "residual_ptr": "*bf16", "out_ptr": "*bf16"},
    **{name: "i32" for name in ("E", "F", "C", "stride_we", "stride_wf")},
}

ATTEND = {
    **{name: "*bf16" for name in ("q_ptr", "k_ptr", "v_ptr", "sinks_ptr", "out_ptr")},
    **{"q_rot_ptr": "*bf16", "k_rot_ptr": "*bf16"},
    **{"mask_ptr": "*i1", "last_ptr": "*i64", "sums_ptr": "*fp32", "scale": "fp32"},
    **{
        name: "i32"
        for name in ("S", "splits", "blocks", "num_rows", "G", "stride_l", "stride_sink")
    },
    **{f"stride_{x}{dim}": "i32" for x, dim in product((*"qkvm", "qr", "kr"), "bagsq")},
}
PUT_TOGETHER = {
    name: ATTEND[name]
    for name in ("sums_ptr", "sinks_ptr", "out_ptr", "splits", "num_rows", "stride_sink")
}
ROTATE = {
    **dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr"), "*bf16"),
    **{f"{x}_{what}_ptr": "*bf16" for x, what in product("qk", ("weight", "out"))},
    **{name: "i32" for name in ("Q", "A", "G")},
    **{f"stride_{x}{dim}": "i32" for x, dim in product("qkcs", "bqh")},
    "eps": "fp32",
}
STORE = {
    **{**ROTATE, "v_ptr": "*bf16", "position_ptr": "*i64", "S": "i32", "stride_p": "i32"},
    **{"k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16"},
    **{f"stride_{x}{dim}": "i32" for x, dim in product(("v", "kc", "vc"), "bqhgs")},
}

PUSH = {
    name: kind
    for name, kind in STORE.items()
    if name not in ("Q", "position_ptr", "stride_p", *(f"stride_{x}q" for x in "qkvcs"))
}


def routed(experts, top_k, tokens, **constants):
    """The constants of `route_many_kernel`."""
    block = {"BLOCK_T": tokens, "BLOCK_E": max(4, 1 << (experts - 1).bit_length())}
    block["BLOCK_K"] = 1 << (top_k - 1).bit_length()
    flags = {"SCORE": "softmax", "SCORE_FIRST": True, "HAS_BIAS": False, "RENORMALIZE": True}
    return {"E": experts, "STRIDE_T": experts, "K": top_k, **block, **flags, **constants}


def heads(repeats, d, f, rows, positions, stages, **constants):
    """The constants of `_attend_kernel`, for one query of each head."""
    shape = {"REPEATS": repeats, "Q": 1, "D": d, "F": f, "BLOCK_M": 1}
    block = {"BLOCK_R": rows, "BLOCK_S": positions, "BLOCK_D": 128, "BLOCK_F": 128}
    flags = {"HAS_MASK": True, "HAS_LAST": False, "SCAN": True, "ONE_STEP": False, "SPLIT": True}
    off = {"HAS_SINKS": False, "UPCAST": False, "VALUES_ARE_KEYS": False, "U": 0, "BLOCK_U": 16}
    return {**shape, **block, **flags, **off, "STAGES": stages, **constants}


def latents(rows, positions, stages, **constants):
    """The same for DeepSeek-V3: 128 heads over latents and their rotary part."""
    wide = {"BLOCK_D": 512, "BLOCK_F": 512, "U": 64, "BLOCK_U": 64, "VALUES_ARE_KEYS": True}
    last = {"HAS_MASK": False, "HAS_LAST": True, "SCAN": False}
    return heads(128, 512, 512, rows, positions, stages, **{**wide, **last, **constants})


LAST = {"HAS_MASK": False, "HAS_LAST": True, "SCAN": False}  # instead of a mask


def put_together(splits, **constants):
    shape = {"A": 32, "Q": 1, "F": 128, "BLOCK_P": splits, "BLOCK_F": 32}
    return {**shape, "HAS_SINKS": False, "INTERPRETED": False, **constants}


def turned(d, r, **constants):
    """The constants of `_rotate_kernel`."""
    block = {"D": d, "R": r, "HEADS": 1, "BLOCK_L": 64, "BLOCK_U": 1, "INTERPRETED": False}
    return {"HAS_Q_WEIGHT": True, "HAS_K_WEIGHT": True, **block, **constants}


def pushed(d, r, positions, **constants):
    """The constants of `_rotate_and_push_kernel`."""
    block = {"D": d, "F": d, "R": r, "HEADS": 8, "BLOCK_L": 32, "BLOCK_U": 1}
    block |= {"BLOCK_D": 64, "BLOCK_F": 128, "K_POSITIONS": positions, "V_POSITIONS": positions}
    flags = {"HAS_Q_WEIGHT": False, "HAS_K_WEIGHT": False, "INTERPRETED": False}
    return {**block, **flags, **constants}


def quant(**constants):
    """The constants of `quant_kernel`, all features off but those given."""
    off = (
        *("GATED", "INTERLEAVED", "HAS_LIMIT", "HAS_WEIGHTS", "HAS_OFFSETS", "ROUND_TERMS"),
        *("ROUND_SIGMOID", "ROUND_SILU", "ROUND_PRODUCT", "POWER_OF_TWO", "SCALE_BY_RECIPROCAL"),
        *("QUANT_BY_RECIPROCAL", "DIVIDE", "INTERPRETED"),
    )
    block = {"F": 2048, "GROUP": 128, "BLOCK_R": 1, "GROUPS": 8, "STRIDE_Q": 2048}
    block |= {"AMAX_EPS": 0.0, "SCALE_EPS": 0.0}
    return {**dict.fromkeys(off, False), **block, **constants}


def blocks_fp8(m, n, group, stages, **constants):
    """The constants of `grouped_mm_fp8_kernel`."""
    shape = {"BLOCK_M": m, "BLOCK_N": n, "GROUP": group, "STAGES": stages, "GROUP_K": 128}
    flags = {"DENSE": False, "HAS_ROWS": True, "HAS_BIAS": True, "EVEN_H": True, "UPCAST": False}
    flags |= {"DIRECT": False, "GATE": 0, "HAS_LIMIT": False, "ROUND_SILU": False}
    return {**shape, **flags, "SWAP": False, "BLOCK_E": 128, **constants}


def down_combine(k, f, o, stages, **constants):
    """The constants of `down_combine_kernel`."""
    shape = {"K": k, "BLOCK_K": k, "BLOCK_F": f, "BLOCK_O": o, "STAGES": stages}
    flags = {"HAS_BIAS": True, "EVEN": True, "FP8": False, "DOT": False, "POWER_OF_TWO": False}
    flags |= {"DIVIDE": False, "HAS_RESIDUAL": True, "INTERPRETED": False, "FOLD": 8}
    return {**shape, **flags, **constants}


def up_columns(f, k, stages, **constants):
    """The constants of `up_columns_kernel`."""
    shape = {"BLOCK_F": f, "BLOCK_K": k, "STAGES": stages, "EVEN_H": True}
    flags = {"INTERLEAVED": True, "HAS_LIMIT": True, "HAS_BIAS": True, "INTERPRETED": False}
    return {**shape, **flags, **constants}


def down_columns(k, f, o, stages, **constants):
    """The constants of `down_columns_kernel`."""
    shape = {"K": k, "BLOCK_K": k, "BLOCK_F": f, "BLOCK_O": o, "STAGES": stages}
    flags = {"HAS_BIAS": True, "HAS_RESIDUAL": True, "EVEN_F": True, "INTERPRETED": False}
    return {**shape, **flags, **constants}


def exchange(ranks, **constants):
    """The constants of `_all_reduce_add_rms_norm_kernel`."""
    shape = {"RANK": 1 % ranks, "RANKS": ranks, "BLOCK_W": 1024, "MOST_LOOKS": 1 << 30}
    return {**shape, "ROUND_FIRST": True, "IS_BF16": True, **constants}


def blocks(m, n, k, group, stages, **constants):
    """The constants of `grouped_mm_kernel` with the blocks that `choose_blocks` gives."""
    shape = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group, "STAGES": stages}
    flags = {"HAS_ROWS": True, "HAS_BIAS": True, "EVEN_H": True, "UPCAST": False}
    flags |= {"COMPENSATE": False, "SWAP": False, "GATE": 0, "HAS_LIMIT": False, "DIRECT": False}
    return {**shape, **flags, "BLOCK_E": 128, "stride_wh": 1, **constants}


def wide(kind):
    """The type, or the types of a tuple, with float32 for bfloat16."""
    return tuple(map(wide, kind)) if isinstance(kind, tuple) else kind.replace("bf16", "fp32")


def skinny(rows, n, k, dot, stages, **constants):
    """The constants of `skinny_mm_kernel` with the blocks that `choose_blocks` gives."""
    shape = {"ROWS": rows, "BLOCK_N": n, "BLOCK_K": k, "DOT": dot, "STAGES": stages, "FOLD": 8}
    flags = {"K_CONTIGUOUS": True, "HAS_BIAS": True, "EVEN_K": True, "UPCAST": False}
    flags |= {"HAS_RESIDUAL": False, "NORM": False, "ROUND_FIRST": False}
    return {**shape, **flags, "ROWS_UP": rows, "COUNT": 3, "PART": 0, **constants}


NORMED = {"NORM": True, "ROUND_FIRST": True, "PART": 32}


def skinny_fp8(rows, n, k, dot, ahead, stages, **constants):
    """The constants of `skinny_mm_fp8_kernel`."""
    shape = {"ROWS": rows, "BLOCK_N": n, "BLOCK_K": k, "STAGES": stages, "FOLD": 16, "COUNT": 3}
    flags = {"DOT": dot, "AHEAD": ahead, "HAS_BIAS": True, "EVEN_K": True, "INTERPRETED": False}
    flags |= {"HAS_RESIDUAL": False, "NORM": False}
    return {**shape, **flags, "POWER_OF_TWO": False, "DIVIDE": False, **constants}


def gate_up_fp8(f, k, stages, **constants):
    """The constants of `gate_up_fp8_kernel`."""
    shape = {"BLOCK_F": f, "BLOCK_K": k, "STAGES": stages, "FOLD": 16, "EVEN_H": True}
    flags = {"HAS_LIMIT": False, "ROUND_SILU": True, "POWER_OF_TWO": False, "DIVIDE": False}
    return {**shape, **flags, "INTERPRETED": False, "DOT": False, **constants}


KERNELS = {  # module, kernel, types, constants, warps
    "silu_mul": ("silu_mul", SILU, {"INTERLEAVED": False, "HAS_LIMIT": False, **ROW}, 4),
    "silu_mul of gpt-oss": ("silu_mul", SILU, {"INTERLEAVED": True, "HAS_LIMIT": True, **ROW}, 4),
    "gelu_mul": ("gelu_mul", ACT, {"TANH": True, "BLOCK_F": 1024}, 4),
    "relu2": ("relu2", ACT, {"BLOCK_F": 1024}, 4),
    "route of Qwen3": ("route", ROUTE, {**SOFTMAX, **TOP8, "BLOCK_P": 1, "BLOCK_S": 128}, 1),
    "route of DeepSeek": ("route", ROUTE, {**SIGMOID, **TOP8, "BLOCK_P": 8, "BLOCK_S": 32}, 1),
    "route_many of Mixtral": ("route_many", ROUTE_MANY, routed(8, 2, 16), 1),
    "route_many of Qwen3": ("route_many", ROUTE_MANY, routed(128, 8, 4, HAS_BIAS=True), 1),
    "route_many by two warps": (
        "route_many",
        {**ROUTE_MANY, "logits_ptr": "*bf16"},
        routed(5, 3, 64, SCORE_FIRST=False),
        2,
    ),
    "sort_tokens_small": ("sort_tokens", SORT, {"BLOCK": 8, "CHUNK": 512}, 4),
    "count": ("sort_tokens", SORT, {"BLOCK_R": 64, "BLOCK_E": 256}, 4),
    "scan": ("sort_tokens", SORT, {"CHUNK": 1024}, 4),
    "scatter": ("sort_tokens", SORT, {"BLOCK_R": 64}, 4),
    "combine": (
        "combine",
        COMBINE,
        {"K": 8, "BLOCK_H": 1024, "HAS_RESIDUAL": True, "INTERPRETED": False},
        4,
    ),
    "grouped_mm of one row": ("grouped_mm", GEMM, blocks(1, 16, 256, 1, 3), 2),
    "grouped_mm of one row, float32": (
        "grouped_mm",
        IN_F32,
        blocks(1, 16, 256, 1, 3, COMPENSATE=True, EVEN_H=False),
        2,
    ),
    "grouped_mm of few rows": ("grouped_mm", GEMM, blocks(16, 64, 128, 1, 4, SWAP=True), 4),
    "grouped_mm of few rows, columns contiguous": (
        "grouped_mm",
        GEMM,
        {**blocks(16, 64, 128, 1, 4), "stride_wh": 2880, "stride_wg": 1},
        4,
    ),
    "grouped_mm of many rows": ("grouped_mm", GEMM, blocks(128, 128, 64, 4, 3), 8),
    "grouped_mm of many rows, float32": (
        "grouped_mm",
        IN_F32,
        blocks(64, 64, 32, 8, 3, COMPENSATE=True),
        8,
    ),
    "grouped_mm_silu_mul of one row": ("grouped_mm", GEMM, blocks(1, 16, 256, 1, 3, GATE=1), 2),
    "grouped_mm_silu_mul of few rows": (
        "grouped_mm",
        GEMM,
        blocks(16, 64, 128, 1, 4, GATE=1, SWAP=True),
        4,
    ),
    "grouped_mm_silu_mul of each row by itself": (
        "grouped_mm",
        {**GEMM, "offsets_ptr": "*i64"},
        blocks(1, 16, 256, 1, 3, GATE=1, DIRECT=True, HAS_ROWS=False),
        2,
    ),
    "grouped_mm_silu_mul of gpt-oss": (
        "grouped_mm",
        GEMM,
        {**blocks(128, 256, 64, 8, 3, GATE=2, HAS_LIMIT=True), "stride_wh": 2880, "stride_wg": 1},
        8,
    ),
    "down_combine of Qwen3": ("down_combine", DOWN_COMBINE, down_combine(8, 256, 4, 3), 4),
    "down_combine of float8": (
        "down_combine",
        {**DOWN_COMBINE, "w_ptr": "*fp8e4nv"},
        down_combine(8, 128, 8, 3, FP8=True, FOLD=16, HAS_BIAS=False),
        4,
    ),
    "down_combine of float8 by dots": (
        "down_combine",
        {**DOWN_COMBINE, "w_ptr": "*fp8e4nv"},
        down_combine(8, 128, 16, 4, FP8=True, DOT=True, HAS_BIAS=False, EVEN=False),
        4,
    ),
    "down_combine of Mixtral": ("down_combine", DOWN_COMBINE, down_combine(2, 512, 8, 3), 4),
    "up_columns of gpt-oss": ("up_columns", UP_COLUMNS, up_columns(32, 64, 4), 4),
    "up_columns of halves": (
        "up_columns",
        UP_COLUMNS,
        up_columns(64, 32, 4, INTERLEAVED=False, EVEN_H=False),
        4,
    ),
    "down_columns of gpt-oss": ("down_columns", DOWN_COLUMNS, down_columns(4, 64, 32, 4), 8),
    "quant": ("quant", QUANT, quant(), 4),
    "quant by division": ("quant", QUANT, quant(DIVIDE=True, POWER_OF_TWO=True), 4),
    "quant with epsilons": ("quant", QUANT, quant(AMAX_EPS=1e-12, SCALE_EPS=1e-12), 4),
    "quant of silu_mul": ("quant", QUANT, quant(GATED=True, HAS_OFFSETS=True, ROUND_SILU=True), 4),
    "quant of gpt-oss": (
        "quant",
        QUANT,
        quant(GATED=True, INTERLEAVED=True, HAS_LIMIT=True, HAS_WEIGHTS=True, ROUND_PRODUCT=True),
        4,
    ),
    "grouped_mm_fp8 of one row": ("grouped_mm_fp8", GEMM_FP8, blocks_fp8(1, 16, 1, 3), 2),
    "grouped_mm_fp8 of few rows": (
        "grouped_mm_fp8",
        GEMM_FP8,
        blocks_fp8(16, 64, 1, 5, SWAP=True),
        4,
    ),
    "grouped_mm_fp8 of many rows": ("grouped_mm_fp8", GEMM_FP8, blocks_fp8(128, 128, 8, 4), 8),
    "grouped_mm_fp8 with a gate": (
        "grouped_mm_fp8",
        GEMM_FP8,
        blocks_fp8(1, 16, 1, 3, GATE=1, HAS_LIMIT=True),
        4,
    ),
    "grouped_mm_fp8 of some rows with a gate": (
        "grouped_mm_fp8",
        GEMM_FP8,
        blocks_fp8(32, 64, 4, 4, GATE=1, SWAP=True),
        4,
    ),
    "linear_fp8": ("grouped_mm_fp8", GEMM_FP8, blocks_fp8(64, 128, 4, 4, DENSE=True), 4),
    "skinny_mm of one row": ("skinny_mm", SKINNY, skinny(1, 8, 512, False, 4), 2),
    "skinny_mm of four rows": ("skinny_mm", SKINNY, skinny(4, 8, 512, False, 4), 2),
    "skinny_mm of few columns": ("skinny_mm", SKINNY, skinny(1, 1, 2048, False, 4), 8),
    "skinny_mm of one row, float32": (
        "skinny_mm",
        {name: wide(kind) for name, kind in SKINNY.items()},
        skinny(1, 8, 256, False, 4, FOLD=4, EVEN_K=False),
        2,
    ),
    "skinny_mm of one row, columns contiguous": (
        "skinny_mm",
        SKINNY,
        skinny(1, 32, 64, False, 4, FOLD=1, K_CONTIGUOUS=False),
        4,
    ),
    "skinny_mm of one row, normed": (
        "skinny_mm",
        SKINNY,
        skinny(1, 4, 1024, False, 4, **NORMED),
        4,
    ),
    "skinny_mm of three rows, normed": (
        "skinny_mm",
        SKINNY,
        skinny(3, 4, 1024, False, 4, ROWS_UP=4, **NORMED),
        4,
    ),
    "skinny_mm of one row, normed, columns contiguous": (
        "skinny_mm",
        SKINNY,
        skinny(1, 32, 64, False, 4, FOLD=1, K_CONTIGUOUS=False, EVEN_K=False, **NORMED),
        4,
    ),
    "skinny_mm of many rows, normed": (
        "skinny_mm",
        SKINNY,
        skinny(16, 8, 256, True, 4, **NORMED),
        4,
    ),
    "skinny_mm of one row, residual": (
        "skinny_mm",
        SKINNY,
        skinny(1, 4, 2048, False, 4, HAS_RESIDUAL=True, COUNT=1),
        8,
    ),
    "skinny_mm of many rows, residual": (
        "skinny_mm",
        SKINNY,
        skinny(16, 16, 256, True, 4, HAS_RESIDUAL=True, COUNT=1),
        2,
    ),
    "skinny_mm of many rows": ("skinny_mm", SKINNY, skinny(16, 16, 256, True, 4), 2),
    "skinny_mm of many rows, columns contiguous": (
        "skinny_mm",
        SKINNY,
        skinny(16, 64, 64, True, 4, FOLD=1, K_CONTIGUOUS=False),
        4,
    ),
    "skinny_mm_fp8 of one row": ("skinny_mm_fp8", SKINNY_FP8, skinny_fp8(1, 8, 2048, 0, 0, 3), 4),
    "skinny_mm_fp8 of four rows, a short group": (
        "skinny_mm_fp8",
        SKINNY_FP8,
        skinny_fp8(4, 4, 512, False, False, 3, EVEN_K=False, POWER_OF_TWO=True, DIVIDE=True),
        1,
    ),
    "skinny_mm_fp8 of many rows": (
        "skinny_mm_fp8",
        SKINNY_FP8,
        skinny_fp8(16, 32, 128, 1, 0, 6),
        4,
    ),
    "skinny_mm_fp8 of many rows, quantised ahead": (
        "skinny_mm_fp8",
        {**SKINNY_FP8, "x_ptr": "*fp8e4nv"},
        skinny_fp8(16, 8, 128, True, True, 6),
        4,
    ),
    "skinny_mm_fp8 of one row, residual": (
        "skinny_mm_fp8",
        SKINNY_FP8,
        skinny_fp8(1, 8, 2048, False, False, 3, HAS_RESIDUAL=True, COUNT=1),
        4,
    ),
    "skinny_mm_fp8 of one row, normed": (
        "skinny_mm_fp8",
        SKINNY_FP8,
        skinny_fp8(1, 8, 2048, False, False, 3, NORM=True),
        4,
    ),
    "skinny_mm_fp8 of three rows, normed, a short group": (
        "skinny_mm_fp8",
        SKINNY_FP8,
        skinny_fp8(3, 4, 1024, False, False, 3, NORM=True, EVEN_K=False),
        2,
    ),
    "skinny_mm_fp8 of many rows, residual": (
        "skinny_mm_fp8",
        {**SKINNY_FP8, "x_ptr": "*fp8e4nv"},
        skinny_fp8(16, 8, 128, True, True, 6, HAS_RESIDUAL=True, COUNT=1),
        4,
    ),
    "gate_up_fp8 of Qwen3": ("gate_up_fp8", GATE_UP_FP8, gate_up_fp8(8, 1024, 3), 2),
    "gate_up_fp8 by dots": ("gate_up_fp8", GATE_UP_FP8, gate_up_fp8(16, 1024, 3, DOT=True), 4),
    "gate_up_fp8 with a short group": (
        "gate_up_fp8",
        GATE_UP_FP8,
        gate_up_fp8(16, 512, 3, EVEN_H=False, DIVIDE=True, POWER_OF_TWO=True, HAS_LIMIT=True),
        1,
    ),
    "attend of Qwen3": ("attend", ATTEND, heads(8, 128, 128, 16, 32, 3, SCAN=False), 4),
    "attend up to a position": (
        "attend",
        ATTEND,
        heads(8, 128, 128, 16, 32, 3, ONE_STEP=True, **LAST),
        4,
    ),
    "attend up to a position of a long cache": (
        "attend",
        {**ATTEND, "last_ptr": "*i32"},
        heads(8, 128, 128, 16, 64, 3, **LAST),
        4,
    ),
    "attend to a long cache": ("attend", ATTEND, heads(8, 80, 96, 16, 64, 3, SPLIT=False), 4),
    "attend of gpt-oss": (
        "attend",
        ATTEND,
        heads(8, 64, 64, 16, 64, 3, SPLIT=False, HAS_SINKS=True, BLOCK_D=64, BLOCK_F=64),
        4,
    ),
    "attend of DeepSeek": ("attend", ATTEND, heads(1, 192, 128, 16, 64, 2, BLOCK_D=256), 4),
    "attend to latents": ("attend", ATTEND, latents(16, 32, 2, ONE_STEP=True), 8),
    "attend to many latents": ("attend", ATTEND, latents(64, 32, 2), 8),
    "attend to latents in float32": (
        "attend",
        {name: kind.replace("bf16", "fp32") for name, kind in ATTEND.items()},
        latents(16, 16, 2),
        8,
    ),
    "attend with many rows, a mask for each": (
        "attend",
        {**ATTEND, "mask_ptr": "*bf16"},
        heads(8, 128, 128, 64, 64, 3, Q=8, BLOCK_M=64, SCAN=False),
        4,
    ),
    "attend in float32": (
        "attend",
        {name: kind.replace("bf16", "fp32") for name, kind in ATTEND.items()},
        heads(8, 256, 256, 16, 32, 2, BLOCK_D=256, BLOCK_F=256),
        8,
    ),
    "put_together": (
        "put_together",
        PUT_TOGETHER,
        put_together(128, HAS_SINKS=True),
        4,
    ),
    "rotate of Qwen3": ("rotate", ROTATE, turned(128, 128), 1),
    "rotate of many": ("rotate", ROTATE, turned(80, 80, HEADS=4, HAS_K_WEIGHT=False), 4),
    "rotate of a half": ("rotate", ROTATE, turned(128, 64, BLOCK_L=32, BLOCK_U=64), 1),
    "rotate in float32": (
        "rotate",
        {name: kind.replace("bf16", "fp32") for name, kind in ROTATE.items()},
        turned(128, 128),
        1,
    ),
    "put_together of Qwen3": (
        "put_together",
        PUT_TOGETHER,
        put_together(32),
        1,
    ),
    "rotate_and_store of Qwen3": (
        "rotate_and_store",
        STORE,
        turned(128, 128, F=128, BLOCK_F=128),
        1,
    ),
    "rotate_and_store of many": (
        "rotate_and_store",
        STORE,
        turned(80, 40, HEADS=4, F=80, BLOCK_L=32, BLOCK_U=64, BLOCK_F=128),
        4,
    ),
    "rotate_and_push of gpt-oss": ("rotate_and_push", PUSH, pushed(64, 64, 128), 8),
    "rotate_and_push with weights": (
        "rotate_and_push",
        PUSH,
        pushed(80, 40, 64, HAS_Q_WEIGHT=True, HAS_K_WEIGHT=True, BLOCK_D=128, BLOCK_U=64),
        8,
    ),
    "all_reduce_add_rms_norm": ("all_reduce_add_rms_norm", ALL_REDUCE, exchange(2), 8),
    "all_reduce_add_rms_norm of eight": ("all_reduce_add_rms_norm", ALL_REDUCE, exchange(8), 8),
    "all_reduce_add_rms_norm of one": (
        "all_reduce_add_rms_norm",
        ALL_REDUCE,
        exchange(1, IS_BF16=False, ROUND_FIRST=False),
        8,
    ),
}
MODULES = {
    **{"route": "_route_kernel", "grouped_mm": "_grouped_mm_kernel", "quant": "_quant_kernel"},
    "route_many": "_route_many_kernel",
    "grouped_mm_fp8": "_grouped_mm_fp8_kernel",
    **{"attend": "_attend_kernel", "put_together": "_attend_sums"},
    "all_reduce_add_rms_norm": "_all_reduce_kernel",
    "down_combine": "_experts_kernel",
    **{"skinny_mm": "_skinny_mm_kernel", "skinny_mm_fp8": "_skinny_mm_fp8_kernel"},
    "gate_up_fp8": "_gate_up_fp8_kernel",
    **dict.fromkeys(("up_columns", "down_columns"), "_experts_columns_kernel"),
}
NAMED = (
    "route",
    "route_many",
    "grouped_mm",
    "quant",
    "grouped_mm_fp8",
    "down_combine",
    "skinny_mm",
)
NAMED += ("put_together", "skinny_mm_fp8", "gate_up_fp8", "up_columns", "down_columns")
NAMES = {op: f"{op}_kernel" for op in NAMED}
ALIGNED = [["tt.divisibility", 16]]


@pytest.fixture(scope="module")
def compiled():
    """By case: bytes of shared memory, or what went wrong."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", KERNELS)
def test_compiles_for_sm_90(case, compiled):
    assert isinstance(compiled[case], int), compiled[case]
    assert compiled[case] <= 227 * 1024, "more shared memory than an SM of sm_90 has"


def compile_for_sm_90(case):
    """Bytes of shared memory that one program takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    op, types, constants, warps = KERNELS[case]
    module = import_module(f"moe_compile.ops.{MODULES.get(op, op)}")
    name = case.split()[0]
    kernel = getattr(module, NAMES.get(op, f"_{name}_kernel"))
    if "PDL" in kernel.arg_names:
        constants = {**constants, "PDL": True}
    signature, values, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = "constexpr" if argument in constants else types[argument]
        if argument in constants:
            values[(i,)] = constants[argument]
        elif isinstance(types[argument], tuple):
            aligned |= {(i, j): ALIGNED for j in range(len(types[argument]))}
        elif types[argument][0] == "*":
            aligned[(i,)] = ALIGNED
    source = ASTSource(kernel, signature, values, aligned)
    stages = constants.get("STAGES", 3)
    options = {"num_warps": warps, "num_stages": stages}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def main():
    results = {}
    for case in KERNELS:
        try:
            results[case] = compile_for_sm_90(case)
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
