"""Choose the kernels of a layer by how many tokens it has."""

from typing import Any

from torch import fx

from moe_compile.ops import moe
from moe_compile.ops._experts_kernel import are_few
from moe_compile.passes._graph import arg, call, is_call, val
from moe_compile.passes._outcome import Outcome, exactness

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
    known before the op is called: it then chooses.
    Left alone: more tokens than that, or MOST_TOKENS on a CPU, and there a number that is not
    known; stages whose results are read by others too; other activations than silu_mul.
    Numerics: the stages' own, but for the activation, which is rounded once, and for the second
    product, which is not rounded before it is summed where few tokens come to a GPU.
    """
    outcome = Outcome()
    for combine in graph.find_nodes(op="call_function", target=moe.combine.default):
        tokens = val(combine).shape[0]
        is_known, on_cpu = isinstance(tokens, int), val(combine).device.type == "cpu"
        if on_cpu and not (is_known and tokens <= MOST_TOKENS):
            continue
        stages = _stages(combine)
        if isinstance(stages, str):
            outcome.decline(combine, stages)
            continue
        arguments, attributes = stages
        ids, w_up, w_down = (val(arguments[i]) for i in (1, 3, 4))
        if not on_cpu and is_known and not are_few(ids.numel(), w_up, w_down):
            continue
        with graph.inserting_before(combine):
            new = call(graph, moe.experts.default, *arguments, like=combine, **attributes)
        combine.replace_all_uses_with(new)
        outcome.rewrote(combine, f"experts: {tokens} tokens in one op")
    return outcome


def _stages(combine: Any) -> tuple[list[Any], dict[str, Any]] | str:
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
    sort = position.args[0]
    if not is_call(sort, moe.sort_tokens.default):
        return "the positions are not from sort_tokens"
    from_sort = [(n.args[0], n.args[1]) for n in (arg(up, 3, "rows"), up.args[2], down.args[2])]
    if from_sort != [(sort, 0), (sort, 1), (sort, 1)] or position.args[1] != 2:
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
    plain = {"interleaved": False, "alpha": 1.0, "up_shift": 0.0}
    return arguments, {k: v for k, v in named.items() if v is not None and v != plain.get(k)}
