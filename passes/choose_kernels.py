"""Choose the kernels of a layer by how many tokens it has."""

import operator
from typing import Any

import torch
from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._experts_kernel import are_few
from moe_compile.ops.quant_fp8 import AMAX_FLOOR
from moe_compile.passes._graph import arg, args, call, is_call, val
from moe_compile.passes._outcome import Declined, Outcome, exactness
from moe_compile.passes._quantised import quantised

# On a CPU an op costs 10 us of Python, and 30 to 60 once the weights of a layer have swept the
# caches (2 cores of Zen 4, torch 2.13); the experts of one token take 1,300. With this many tokens
# no expert has more rows than grouped_mm's kernel is best at (ops/_cpu.py).
MOST_TOKENS = 48


@exactness("reassociating")
def choose_kernels(graph: fx.Graph) -> Outcome:
    """Put the stages of experts together again where few tokens come, or an unknown number.

    Before:
        arg0_1: i64[3, 2]
        arg1_1: f32[3, 16]
        arg2_1: f32[4, 16, 24]
        arg3_1: f32[4, 12, 16]
        arg4_1: f32[3, 2]
        sort_tokens = moe_compile.sort_tokens(arg0_1, 4)
        getitem: i32[6] = sort_tokens[0]
        getitem_1: i32[4] = sort_tokens[1]
        getitem_2: i32[3, 2] = sort_tokens[2]
        grouped_mm: f32[6, 24] = moe_compile.grouped_mm(arg1_1, arg2_1, getitem_1, getitem, 2)
        silu_mul: f32[6, 12] = moe_compile.silu_mul(grouped_mm)
        grouped_mm_1: f32[6, 16] = moe_compile.grouped_mm(silu_mul, arg3_1, getitem_1)
        combine: f32[3, 16] = moe_compile.combine(grouped_mm_1, getitem_2, arg4_1)
        return [combine]

    After:
        arg0_1: i64[3, 2]
        arg1_1: f32[3, 16]
        arg2_1: f32[4, 16, 24]
        arg3_1: f32[4, 12, 16]
        arg4_1: f32[3, 2]
        experts: f32[3, 16] = moe_compile.experts(arg1_1, arg0_1, arg4_1, arg2_1, arg3_1)
        return [experts]

    On a GPU that is where hardly two tokens share an expert, and where the number of tokens is not
    known before the op is called: it then chooses. In float8 it also quantises x, where `quant_fp8`
    would do that as silu_mul_quant does.
    Left alone: more tokens than that, or MOST_TOKENS on a CPU, and there a number that is not
    known; stages whose results are read by others too; other activations than silu_mul.
    Numerics: the stages' own, but for the activation, which is rounded once, and for the second
    product, which is not rounded before it is summed where few tokens come to a GPU.
    """
    outcome = Outcome()
    for combine in graph.find_nodes(op="call_function", target=moe.combine.default):
        tokens = val(combine).shape[0]
        is_known, on_cpu = isinstance(tokens, int), val(combine).device.type == "cpu"
        if on_cpu and (_is_fp8(combine) or not (is_known and tokens <= MOST_TOKENS)):
            continue
        find = _stages_fp8 if _is_fp8(combine) else _stages
        stages = find(combine)
        if isinstance(stages, str):
            outcome.decline(combine, stages)
            continue
        op, arguments, attributes = stages
        if not on_cpu and is_known and not _are_few(op, arguments):
            continue
        with graph.inserting_before(combine):
            new = call(graph, op, *arguments, like=combine, **attributes)
        combine.replace_all_uses_with(new)
        name = op.name().removeprefix("moe_compile::")
        outcome.rewrote(combine, f"{name}: {tokens} tokens in one op")
    return outcome


Stages = tuple[Any, list[Any], dict[str, Any]] | str  # op, arguments and attributes, or why not


def _part(node: Any) -> tuple[Any, Any]:
    """(a call that returns several tensors, which of them), or (None, None)."""
    return (node.args[0], node.args[1]) if is_call(node, operator.getitem) else (None, None)


def _is_fp8(combine: Any) -> bool:
    return is_call(combine.args[0], moe.grouped_mm_fp8.default)


def _are_few(op: Any, arguments: list[Any]) -> bool:
    ids, w_up, w_down = (1, 3, 4) if op is moe.experts.default else (2, 4, 6)
    return are_few(val(arguments[ids]).numel(), val(arguments[w_up]), val(arguments[w_down]))


def _stages(combine: Any) -> Stages:
    """The arguments of `experts` that does what leads to `combine`, or the reason why none does."""
    down, position, weights = combine.args[:3]
    if not (is_call(down, moe.grouped_mm.default) and len(down.users) == 1):
        return "the rows combined are not those of a GEMM alone"
    h = down.args[0]
    if not (is_call(h, moe.silu_mul.default) and len(h.users) == 1):
        return "the activation is not silu_mul, read here alone"
    up = h.args[0]
    if not (is_call(up, moe.grouped_mm.default) and len(up.users) == 1):
        return "the rows of the activation are not those of a GEMM alone"
    sort, index = _part(position)
    if not is_call(sort, moe.sort_tokens.default):
        return "the positions are not from sort_tokens"
    from_sort = [_part(n) for n in (arg(up, 3, "rows"), up.args[2], down.args[2])]
    if from_sort != [(sort, 0), (sort, 1), (sort, 1)] or index != 2:
        return "the GEMMs are not over the rows of one sort"
    ids = sort.args[0]
    if arg(up, 4, "top_k", 1) != val(ids).shape[1] or arg(down, 3, "rows") is not None:
        return "the GEMMs gather other rows"
    arguments = [up.args[0], ids, weights, up.args[1], down.args[1]]
    named = {
        "bias_up": arg(up, 5, "bias"),
        "bias_down": arg(down, 5, "bias"),
        "interleaved": arg(h, 1, "interleaved", False),
        "alpha": arg(h, 2, "alpha", 1.0),
        "limit": arg(h, 3, "limit"),
        "up_shift": arg(h, 4, "up_shift", 0.0),
        "dtype": arg(combine, 3, "dtype"),
    }
    return moe.experts.default, arguments, _unusual(named)


def _unusual(named: dict[str, Any]) -> dict[str, Any]:
    """Without the ops' defaults."""
    plain = {"interleaved": False, "alpha": 1.0, "up_shift": 0.0, "amax_floor": 1e-10}
    plain |= {"round_silu": False, "power_of_two": False}
    return {k: v for k, v in named.items() if v is not None and v != plain.get(k)}


def _stages_fp8(combine: Any) -> Stages:
    """The arguments of `experts_fp8`, as `_stages` those of `experts`."""
    down, position, weights = combine.args[:3]
    q, scale = args(down)[:2]
    activated, _ = _part(q)
    if not is_call(activated, moe.silu_mul_quant.default) or len(down.users) != 1:
        return "the rows of the second product are not silu_mul_quant's"
    parts = [_part(n) for n in (q, scale)]
    if parts != [(activated, 0), (activated, 1)] or len(q.users) + len(scale.users) != 2:
        return "the quantised rows are read by others, too"
    schema = [a.name for a in moe.silu_mul_quant.default._schema.arguments]
    how = {**dict(zip(schema, args(activated), strict=False)), **activated.kwargs}
    up = how.pop("x")
    if not (is_call(up, moe.grouped_mm_fp8.default) and len(up.users) == 1):
        return "the rows of the activation are not those of a GEMM alone"
    sort, index = _part(position)
    if not is_call(sort, moe.sort_tokens.default):
        return "the positions are not from sort_tokens"
    offsets = (up.args[4], down.args[4], how.pop("offsets", up.args[4]) or up.args[4])
    from_sort = [_part(n) for n in (arg(up, 5, "rows"), *offsets)]
    if from_sort != [(sort, 0), *[(sort, 1)] * 3] or index != 2:
        return "the GEMMs are not over the rows of one sort"
    ids = sort.args[0]
    if arg(up, 6, "top_k", 1) != val(ids).shape[1] or arg(down, 5, "rows") is not None:
        return "the GEMMs gather other rows"
    if arg(up, 7, "bias") is not None or arg(down, 7, "bias") is not None:
        return "products with a bias"
    known: dict[str, Any] = {name: how.pop(name, None) for name in _KNOWN_FP8}
    if not how.pop("round_product", False) or not _are_default(how):
        return "an activation or quantisation that experts_fp8 does not know"
    dtypes = {arg(n, 8, "dtype", torch.bfloat16) for n in (up, down)}
    dtypes.add(arg(combine, 3, "dtype") or val(down).dtype)
    if len(dtypes) != 1 or val(down.args[2]).shape[1] % 128:
        return "stages in several dtypes, or features that blocks of 128 do not divide"
    rows = _unquantised(up, known)
    arguments = [*rows, ids, weights, *args(up)[2:4], *args(down)[2:4]]
    dtype = dtypes.pop()
    if dtype != torch.bfloat16:
        known["dtype"] = dtype
    return moe.experts_fp8.default, arguments, _unusual(known)


def _unquantised(up: Any, known: dict[str, Any]) -> tuple[Any, Any]:
    """x and no scales where the op would quantise it as it was, else what it was quantised to."""
    q, scale = args(up)[:2]
    how = {"power_of_two": False, "amax_floor": AMAX_FLOOR}
    how |= {name: known[name] for name in how if known[name] is not None}
    try:
        x, *mine = quantised(q, scale)
    except Declined:
        return q, scale
    return (x, None) if mine == list(how.values()) else (q, scale)


_KNOWN_FP8 = ("alpha", "limit", "up_shift", "round_silu", "power_of_two", "amax_floor")


def _are_default(how: dict[str, Any]) -> bool:
    """Say the attributes of silu_mul_quant what they say if not given?"""
    defaults = {a.name: a.default_value for a in moe.silu_mul_quant.default._schema.arguments}
    return all(value == defaults[name] for name, value in how.items())
