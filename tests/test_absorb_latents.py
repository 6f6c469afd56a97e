"""Few queries attend to latents, not to keys and values made of all of them."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moe_compile.ops import moe
from moe_compile.passes.absorb_latents import absorb_latents
from moe_compile.passes.read_cache import read_cache
from moe_compile.testing import assert_documented, capture, render, run_passes

aten = torch.ops.aten
B, A, S, L, N, V, U = 2, 4, 12, 16, 4, 8, 2


def inputs(Q=1, dtype=torch.float32):
    shapes = (B, A, Q, N), (B, A, Q, U), (B, 1, S, L), (B, 1, S, U), (A * (N + V), L)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def expand(latents, weight):
    """Keys without their rotary part, and values, as transformers makes them."""
    made = F.linear(latents, weight).view(latents.shape[0], -1, A, N + V).transpose(1, 2)
    return torch.split(made, [N, V], -1)


def join(k, k_rot):
    return torch.cat([k, k_rot.expand(-1, A, -1, -1)], -1)


def attend(nope, rot, keys, values, **how):
    return moe.attend(torch.cat([nope, rot], -1), keys, values, **how)


def documented(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    return attend(nope, rot, join(k, k_rot), v)


def written(nope, rot, latents, k_rot, weight):
    """As transformers 5.23 does, which writes both parts of the keys to an empty tensor."""
    k, v = expand(latents, weight)
    keys = k.new_empty(*k.shape[:-1], N + U)
    keys[..., :N].copy_(k)
    keys[..., N:].copy_(k_rot.expand(-1, A, -1, -1))
    return attend(nope, rot, keys, v)


def broadcast(nope, rot, latents, k_rot, weight):
    """The same, but the copy itself expands."""
    k, v = expand(latents, weight)
    keys = k.new_zeros(*k.shape[:-1], N + U)
    keys[..., :N] = k
    keys[..., N:] = k_rot
    return attend(nope, rot, keys, v)


def values_first(nope, rot, latents, k_rot, weight):
    made = F.linear(latents, weight).view(B, S, A, N + V).transpose(1, 2)
    v, k = made[..., :V], made[..., V:]
    return attend(nope, rot, join(k, k_rot), v)


def one_query(nope, rot, latents, k_rot, weight):
    """The query is not put together of its parts."""
    k, v = expand(latents, weight)
    query = torch.cat([nope, rot], -1) * 2
    return moe.attend(query, join(k, k_rot), v)


def turned_weight(nope, rot, latents, k_rot, weight):
    """A weight that lies the other way round."""
    made = latents.reshape(B * S, L) @ weight.t().clone()
    k, v = torch.split(made.view(B, S, A, N + V).transpose(1, 2), [N, V], -1)
    return attend(nope, rot, join(k, k_rot), v)


def with_all(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    mask = torch.arange(S, device=k.device).reshape(1, 1, 1, S) < 7
    sinks = nope[:1, :, 0, 0]
    return attend(nope, rot, join(k, k_rot), v, mask=mask, scale=0.3, sinks=sinks)


def up_to(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    last = torch.full((B,), 5, device=k.device)
    return attend(nope, rot, join(k, k_rot), v, last=last)


SAME = [documented, written, broadcast, values_first, one_query, turned_weight, with_all, up_to]


def test_docstring():
    assert_documented(absorb_latents, capture(documented, *inputs()))


@pytest.mark.parametrize(("fn", "Q"), [*((fn, 1) for fn in SAME), (with_all, 3)])
def test_same_values(fn, Q):
    args = inputs(Q)
    gm = capture(fn, *args)
    places = {tuple(n.meta["val"].shape): n for n in gm.graph.find_nodes(op="placeholder")}
    ordered = [next(a for a in args if tuple(a.shape) == shape) for shape in places]
    (before,) = gm(*ordered)
    (outcome,) = run_passes(gm, absorb_latents)
    assert (len(outcome.rewrites), outcome.declined) == (1, [])
    assert not gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    (after,) = gm(*ordered)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    (again,) = run_passes(gm, absorb_latents)
    assert (again.rewrites, again.declined) == ([], [])


def test_bfloat16_errs_no_more():
    args = inputs(dtype=torch.bfloat16)
    gm = capture(documented, *args)
    run_passes(gm, absorb_latents)
    ordered = [args[i] for i in (2, 4, 3, 0, 1)]
    exact = run_in_double(*args)
    got, eager = (
        (x.double() - exact).square().mean().sqrt() for x in (gm(*ordered)[0], documented(*args))
    )
    assert got <= 1.5 * eager


def run_in_double(nope, rot, latents, k_rot, weight):
    k, v = expand(latents.double(), weight.double())
    query = torch.cat([nope, rot], -1).double()
    return F.scaled_dot_product_attention(query, join(k, k_rot.double()), v)


def declined(fn, *args):
    gm = capture(fn, *args)
    (outcome,) = run_passes(gm, absorb_latents)
    assert not outcome.rewrites
    return [e.detail for e in outcome.declined]


def other_values(nope, rot, latents, k_rot, weight):
    (k, _), (_, v) = expand(latents, weight), expand(latents, weight + 1)
    return attend(nope, rot, join(k, k_rot), v)


def more_readers(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    keys = join(k, k_rot)
    return attend(nope, rot, keys, v), keys.sum()


def returned(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    return attend(nope, rot, join(k, k_rot), v), v


def scaled(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    return attend(nope, rot, join(k * 2, k_rot), v)


def biased(nope, rot, latents, k_rot, weight):
    made = F.linear(latents, weight, weight[:, 0]).view(B, S, A, N + V).transpose(1, 2)
    k, v = torch.split(made, [N, V], -1)
    return attend(nope, rot, join(k, k_rot), v)


def heads_inside(nope, rot, latents, k_rot, weight):
    """Each feature has its heads side by side."""
    made = F.linear(latents, weight).view(B, S, N + V, A).permute(0, 3, 1, 2)
    k, v = torch.split(made, [N, V], -1)
    return attend(nope, rot, join(k, k_rot), v)


def shared_heads(nope, rot, latents, k_rot, weight):
    """Twice as many query heads as key heads."""
    k, v = expand(latents, weight)
    query = torch.cat([nope, rot], -1).repeat_interleave(2, 1)
    return moe.attend(query, join(k, k_rot), v)


NO_PRODUCT = "keys that are no plain product of latents and a weight"
NEAR_MISSES = {
    other_values: "values of another product than the keys",
    scaled: "values of another product than the keys",
    biased: NO_PRODUCT,
    heads_inside: NO_PRODUCT,
    more_readers: "keys or values that others read",
    returned: "keys or values that others read",
    shared_heads: "keys that query heads or sequences share",
}


@pytest.mark.parametrize("fn", NEAR_MISSES)
def test_near_misses(fn):
    assert declined(fn, *inputs()) == [NEAR_MISSES[fn]]


def rot_of_each_head(nope, rot, latents, k_rot, weight):
    k, v = expand(latents, weight)
    return attend(nope, rot, torch.cat([k, k_rot * nope[:, :, :, :1]], -1), v)


def gap(nope, rot, latents, k_rot, weight):
    """A feature of the keys is neither part."""
    k, v = expand(latents, weight)
    keys = k.new_ones(B, A, S, N + U)
    keys[..., :N] = k
    keys[..., N + 1 :] = k_rot[..., 1:]
    return attend(nope, rot, keys, v)


def whole_keys(nope, rot, latents, k_rot, weight):
    """Without a rotary part."""
    k, v = expand(latents, weight)
    return moe.attend(nope, k, v)


@pytest.mark.parametrize("fn", [rot_of_each_head, gap, whole_keys])
def test_other_keys_are_not_looked_at(fn):
    assert declined(fn, *inputs()) == []


def test_sizes():
    nope, rot, latents, k_rot, weight = inputs(4)
    short = latents[:, :, :4].contiguous(), k_rot[:, :, :4]
    assert declined(documented, nope, rot, *short, weight) == [
        "4 queries of 4 positions: keys and values are cheaper"
    ]
    wide = torch.randn(B, 1, 40, 520), torch.randn(B, 1, 40, U), torch.randn(A * (N + V), 520)
    assert declined(documented, nope, rot, *wide) == ["latents of 520 and 2 features"]


def rewritten_calls(gm):
    (outcome,) = run_passes(gm, absorb_latents)
    assert (len(outcome.rewrites), outcome.declined) == (1, [])
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def test_dynamic_batch():
    args = inputs()
    for x in args[:4]:
        torch._dynamo.mark_dynamic(x, 0)
    gm = capture(documented, *args)
    rewritten_calls(gm)
    (attention,) = gm.graph.find_nodes(op="call_function", target=moe.attend.default)
    assert isinstance(attention.meta["val"].shape[0], torch.SymInt)


def test_positions_that_are_not_known():
    args = inputs()
    for x in args[2:4]:
        torch._dynamo.mark_dynamic(x, 2)
    (reason,) = declined(documented, *args)
    assert reason.endswith(" positions, which are not known")


def test_decode_on_a_gpu():
    """The latents of a static cache, up to a position, as `read_cache` leaves it."""

    def decode(nope, rot, cache, rot_cache, weight, position, latent, k_rot):
        at = torch.arange(1, device=nope.device) + position
        cache = aten.index_put(cache, [None, None, at], latent)
        rot_cache = aten.index_put(rot_cache, [None, None, at], k_rot)
        rows = aten.mm(cache.reshape(S, L), aten.permute(weight, [1, 0]))
        made = aten.permute(rows.reshape(1, S, A, N + V), [0, 2, 1, 3])
        k, v = aten.split_with_sizes(made, [N, V], -1)
        seen = torch.arange(S, device=nope.device).reshape(1, 1, 1, S) <= at.reshape(1, 1, 1, 1)
        zero, closed = (torch.full([], x, device=nope.device).bfloat16() for x in (0.0, -65536.0))
        mask = torch.where(seen, zero, closed)
        query = torch.cat([nope, rot], -1)
        out, *_ = aten._scaled_dot_product_cudnn_attention(
            query, join(k, rot_cache), v, mask, False, scale=0.25
        )
        return out, cache, rot_cache

    args = [x if x.ndim == 2 else x[:1] for x in inputs(dtype=torch.bfloat16)]
    latent, k_rot = args[2][:, :, :1], args[3][:, :, :1]
    gm = graph_on_gpu(decode, *args, torch.tensor(3), latent, k_rot)
    run_passes(gm, read_cache)
    rewritten_calls(gm)
    lines = render(gm.graph).splitlines()
    assert_expected_inline(
        "\n".join(line for line in lines if "attend(" in line or "bmm(" in line),
        """\
bmm: bf16[4, 1, 16] = aten.bmm(reshape_2, slice)
attend: bf16[1, 4, 1, 16] = moe_compile.attend(permute_1, index_put, None, scale=0.25, last=reshape, q_rot=arg1_1, k_rot=index_put_1)
bmm_1: bf16[4, 1, 8] = aten.bmm(reshape_4, permute_2)""",  # noqa: E501
    )


DEEPSEEK = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "max_position_embeddings": 64,
}


def attend_to_few(module, q, k, v, mask, scaling=None, **how):
    """`attend`, which the passes make on a GPU alone, wherever the model runs."""
    if q.shape[2] > 1:
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **how)
    return moe.attend(q, k, v, mask, scaling).transpose(1, 2), None


@torch.no_grad()
def test_decode_of_deepseek_v3(device):
    """A static cache of latents: token by token what the model gives without us."""
    transformers.AttentionInterface.register("attend_to_few", attend_to_few)
    transformers.AttentionMaskInterface.register("attend_to_few", sdpa_mask)
    config = transformers.DeepseekV3Config(**DEEPSEEK, attn_implementation="attend_to_few")
    model = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    tokens = torch.randint(0, 64, (3, 12), device=device)
    require = {"absorb_latents": 1}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_compile", options={"require": require})
    logits = []
    for forward in model, compiled:
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        model(tokens[:, :8], past_key_values=cache)
        steps = [forward(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 16])
def test_on_a_gpu(batch, dtype, device):
    """The attention of DeepSeek-V3, whichever kernel torch chooses for it."""
    heads, positions = 128, 640
    shapes = (heads, 1, 192), (1, positions, 512), (1, positions, 64)
    query, latents, k_rot = (torch.randn(batch, *s, device=device).to(dtype) for s in shapes)
    weight = (torch.randn(heads * 256, 512, device=device) / 512**0.5).to(dtype)
    p = torch.tensor(400, device=device)

    def fn(query, latents, k_rot, weight, p):
        made = F.linear(latents, weight).view(batch, positions, -1, 256).transpose(1, 2)
        k, v = torch.split(made, [128, 128], -1)
        keys = torch.cat([k, k_rot.expand(-1, heads, -1, -1)], -1)
        mask = torch.arange(positions, device=device).view(1, 1, 1, -1) <= p.view(1, 1, 1, 1)
        return F.scaled_dot_product_attention(query, keys, v, mask)

    args = query, latents, k_rot, weight
    options = {"require": {"absorb_latents": 1}}
    out = torch.compile(fn, backend="moe_compile", options=options)(*args, p)
    exact = fn(*(x.double() for x in args), p)
    eager = (fn(*args, p).double() - exact).square().mean().sqrt()
    error = (out.double() - exact).square().mean().sqrt()
    assert error <= 2 * eager + torch.finfo(dtype).eps * exact.square().mean().sqrt()
