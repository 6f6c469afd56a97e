"""The kernel that turns keys writes them and the values to a static cache."""

import re
from functools import partial, update_wrapper
from math import prod

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import graph_on_gpu
from torch._dynamo.utils import counters
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from moe_compile.ops import moe
from moe_compile.passes._graph import prims
from moe_compile.passes.count_together import count_together
from moe_compile.passes.rotate_together import rotate_together
from moe_compile.passes.store_together import store_together
from moe_compile.testing import assert_documented, render, run_passes

aten = torch.ops.aten
copy_ = aten.copy_.default  # without the device guard of Tensor.copy_
B, A, G, S, D = 2, 4, 2, 6, 8


def inputs(dtype=torch.bfloat16):
    q, k, v = (torch.randn(B, 1, n, D).to(dtype) for n in (A, G, G))
    angles = torch.randn(1, 1, D)
    caches = (torch.randn(B, G, S, D).to(dtype) for _ in range(2))
    return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), *caches, torch.tensor([3])


def put(cache, position, x):
    return aten.index_put(cache, [None, None, position], x)


def step(q, k, v, cos, sin, k_cache, v_cache, position):
    return after_rotation(*moe.rotate(q, k, cos, sin), v, k_cache, v_cache, position)


def after_rotation(q, k, v, k_cache, v_cache, position):
    keys = put(k_cache, position, k)
    values = put(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
    out = moe.attend(q, keys, values)
    copy_(k_cache, keys)
    copy_(v_cache, values)
    return out


def run(fn):
    gm = graph_on_gpu(fn, *inputs())
    (outcome,) = run_passes(gm, store_together)
    (again,) = run_passes(gm, store_together)
    assert again.rewrites == []
    return gm, len(outcome.rewrites), [e.detail for e in outcome.declined]


def test_docstring():
    assert_documented(store_together, graph_on_gpu(step, *inputs()))


def test_weights_are_passed_on():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = moe.rotate(q, k, cos, sin, None, aten.reshape(cos, [D]), eps=0.5)
        keys = put(k_cache, position, k)
        values = put(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
        copy_(k_cache, keys)
        copy_(v_cache, values)
        return q

    gm, count, _ = run(fn)
    assert count == 1
    (line,) = (x for x in render(gm.graph).splitlines() if "rotate_and_store" in x)
    assert_expected_inline(
        line,
        """auto_functionalized = auto_functionalized(moe_compile.rotate_and_store.default, q=arg0_1, k=arg1_1, v=arg2_1, cos=arg3_1, sin=arg4_1, k_cache=arg5_1, v_cache=arg6_1, position=arg7_1, q_weight=None, k_weight=view, eps=0.5)""",  # noqa: E501
    )


def test_one_position_is_the_counter():
    def fn(q, k, v, cos, sin, k_cache, v_cache, counter, start=0):
        like = {"dtype": torch.int64, "device": counter.device, "requires_grad": False}
        at = aten.add(prims.iota(1, start=start, step=1, **like), counter)
        return step(q, k, v, cos, sin, k_cache, v_cache, at)

    def from_one(*args):
        return fn(*args, start=1)

    for case, expected in (fn, "position=reshape"), (from_one, "position=add"):
        gm = graph_on_gpu(case, *inputs()[:-1], torch.tensor(3))
        (outcome,) = run_passes(gm, store_together)
        assert len(outcome.rewrites) == 1
        text = render(gm.graph)
        assert f"{expected})" in text
        assert ("aten.reshape(arg7_1, [1])" in text) == (case is fn)


def test_inductor_writes_in_place():
    """Its own pass clones no cache, and counts on only after the kernels read the counters."""

    def layer(q, k, v, cos, sin, k_cache, v_cache, counter):
        like = {"dtype": torch.int64, "device": counter.device, "requires_grad": False}
        position = aten.add(prims.iota(1, start=0, step=1, **like), counter)
        q, k = moe.rotate(q, k, cos, sin)
        keys = put(k_cache, position, k)
        values = put(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
        out = moe.attend(q, keys, values, last=aten.reshape(counter, [1]))
        return aten.permute(out, [0, 2, 1, 3]), (k_cache, keys), (v_cache, values)

    def two_layers(q, k, v, cos, sin, *state):
        counted = [(c, c + 1) for c in state[4:]]
        out, *first = layer(q, k, v, cos, sin, *state[:2], state[4])
        out, *second = layer(out, k, v, cos, sin, *state[2:4], state[5])
        for old, new in (*first, *second, *counted):
            copy_(old, new)
        return out

    args, counters = inputs()[:-1], (torch.tensor(3), torch.tensor(3))
    gm = graph_on_gpu(two_layers, *args, *inputs()[5:7], *counters)
    counts = [len(o.rewrites) for o in run_passes(gm, count_together, store_together)]
    assert counts == [1, 2]
    reinplace_inplaceable_ops_core(gm.graph)
    stores = gm.graph.find_nodes(op="call_function", target=auto_functionalized)
    assert [node.meta["only_clone_these_tensors"] for node in stores] == [[], []]
    targets = [str(node.target) for node in gm.graph.nodes]
    assert targets.count("aten.copy_.default") == 2  # of the counters
    assert "aten._foreach_add.Scalar" in targets
    assert "aten.add.Tensor" not in targets


KEYS = "keys that are not just written to a static cache"
VALUES = "no values written to a static cache at the position of the keys"
EARLY = "queries or keys that are read before the values are there"
NEAR_MISSES = {
    "the cache is read": (lambda s: s["k_cache"], KEYS),
    "the other cache is read": (lambda s: s["v_cache"] + 1, VALUES),
    "keys are read": (lambda s: s["k"] + 1, KEYS),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_read_elsewhere(name):
    read, reason = NEAR_MISSES[name]

    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = moe.rotate(q, k, cos, sin)
        more = read({"k": k, "k_cache": k_cache, "v_cache": v_cache}) * 2
        keys = put(k_cache, position, k)
        values = put(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
        out = moe.attend(q, keys, values)
        copy_(k_cache, keys)
        copy_(v_cache, values)
        return out, more

    assert run(fn)[1:] == (0, [reason])


def variant(put_k=put, put_v=put, store=True):
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = moe.rotate(q, k, cos, sin)
        keys = put_k(k_cache, position, k)
        values = put_v(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
        out = moe.attend(q, keys, values)
        if store:
            copy_(k_cache, keys)
        copy_(v_cache, values)
        return out

    return fn


def test_other_writes():
    def added(cache, position, x):
        return aten.index_put(cache, [None, None, position], x, True)

    def elsewhere(cache, position, x):
        return put(cache, position + 1, x)

    def rolled(cache, position, x):
        """As a full cache of a sliding window."""
        return put(aten.roll(cache, [-1], [2]), position, x)

    assert run(variant(put_k=added))[1:] == (0, [KEYS])
    assert run(variant(rolled, rolled))[1:] == (0, [KEYS])
    assert run(variant(store=False))[1:] == (0, [KEYS])
    assert run(variant(put_v=added))[1:] == (0, [VALUES])
    assert run(variant(put_v=elsewhere))[1:] == (0, [VALUES])


def test_a_cache_that_is_returned():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = moe.rotate(q, k, cos, sin)
        keys = put(k_cache, position, k)
        values = put(v_cache, position, aten.permute(v, [0, 2, 1, 3]))
        copy_(k_cache, keys)
        copy_(v_cache, values)
        return q, aten.reshape(keys, [-1])

    assert run(fn)[1:] == (0, ["a cache that is returned as it was in this step"])


def test_caches_in_one_memory():
    """Inductor writes in place to only one of them, and copies the other."""
    with FakeTensorMode(), torch.no_grad():
        like = {"device": "cuda", "dtype": torch.bfloat16}
        both = torch.empty(2, B, G, S, D, **like)
        heads = (torch.empty(B, 1, n, D, **like) for n in (A, G, G))
        angles = (torch.empty(1, 1, D, **like) for _ in range(2))
        position = torch.empty(1, dtype=torch.int64, device="cuda")
        caches = (aten.select(both, 0, i) for i in (0, 1))
        args = *heads, *angles, *caches, position
        gm = make_fx(lambda *args: [step(*args)])(*args)
    (outcome,) = run_passes(gm, store_together)
    reason = "keys and values in one memory, of which Inductor would copy one"
    assert [e.detail for e in outcome.declined] == [reason]


def read_early(read, write_v_first=False):
    """Something reads the keys before the values are written."""

    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        v = aten.permute(v, [0, 2, 1, 3])
        values = put(v_cache, position, v) if write_v_first else None
        q, k = moe.rotate(q, k, cos, sin)
        keys = put(k_cache, position, k)
        early, v = read(keys, v)
        values = values if write_v_first else put(v_cache, position, v)
        out = moe.attend(q, keys, values)
        copy_(k_cache, keys)
        copy_(v_cache, values)
        return out, early

    return fn


def twice(keys, v):
    return aten.neg(aten.sum(keys, dtype=torch.float32)), v


def three_tokens():
    q, k, v, cos, sin, *caches, _ = inputs(torch.float32)
    heads = (torch.cat([x, x + 1, x + 2], 1) for x in (q, k, v))
    angles = (torch.cat([x, -x, x], 1) for x in (cos, sin))
    return *heads, *angles, *caches, torch.tensor([4, 0, -1])


@pytest.mark.parametrize("args", [inputs, three_tokens])
@pytest.mark.parametrize("write_v_first", [False, True])
def test_what_reads_early_moves_behind(write_v_first, args):
    """The rewritten graph gives what it gave, and leaves the same in the caches."""
    fn = read_early(twice, write_v_first)
    mine, theirs = ([x.clone() for x in given] for given in [args()] * 2)
    with torch.no_grad():
        gm = make_fx(lambda *args: list(fn(*args)), tracing_mode="fake")(*mine)
    (outcome,) = run_passes(gm, partial(store_together, devices=("cpu",)))
    assert len(outcome.rewrites) == 1
    targets = [str(node.target) for node in gm.graph.nodes]
    assert targets.index("auto_functionalized") < targets.index("aten.sum.default")
    assert "aten.index_put.default" not in targets
    for out, expected in zip((*gm(*mine), *mine), (*fn(*theirs), *theirs), strict=True):
        torch.testing.assert_close(out, expected)


def test_what_reads_early_and_stays():
    def into_values(keys, v):
        total = aten.sum(keys)
        return total, aten.permute(aten.permute(v, [0, 2, 1, 3]) + total, [0, 2, 1, 3])

    def random(keys, v):
        return aten.rand_like(keys), v

    for read in into_values, random:
        assert run(read_early(read))[1:] == (0, [EARLY])

    def into_position(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = moe.rotate(q, k, cos, sin)
        position = position + prims.convert_element_type(aten.sum(q), torch.int64)
        return after_rotation(q, k, v, k_cache, v_cache, position)

    assert run(into_position)[1:] == (0, [EARLY])


def test_an_input_that_is_written_early():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        at = position + 0
        copy_(position, at + 1)
        return step(q, k, v, cos, sin, k_cache, v_cache, at)

    assert run(fn)[1:] == (0, ["an input is written before the keys and values are there"])


def test_dynamic_batch():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, torch.no_grad():
        b = mode.from_tensor(torch.empty(5, 3)).shape[0]
        like = {"device": "cuda", "dtype": torch.bfloat16}
        heads = (torch.empty(b, 1, n, D, **like) for n in (A, G, G))
        angles = (torch.empty(1, 1, D, **like) for _ in range(2))
        caches = (torch.empty(b, G, S, D, **like) for _ in range(2))
        position = torch.empty(1, dtype=torch.int64, device="cuda")
        gm = make_fx(lambda *args: [step(*args)], tracing_mode="symbolic")
        gm = gm(*heads, *angles, *caches, position)
    (outcome,) = run_passes(gm, store_together)
    assert len(outcome.rewrites) == 1


class Attention(torch.nn.Module):
    """Of a decode step of some tokens, with a static cache of 2 S positions that counts."""

    def __init__(self, tokens, has_norm, dtype):
        super().__init__()
        self.tokens, self.has_norm = tokens, has_norm
        self.projections = torch.nn.Linear(16, (A + 2 * G) * D, dtype=dtype)
        self.norm = torch.nn.RMSNorm(D, 1e-6, dtype=dtype)
        self.register_buffer("keys", torch.zeros(B, G, 2 * S, D, dtype=dtype))
        self.register_buffer("values", torch.zeros(B, G, 2 * S, D, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def normed(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm.weight * wide.to(x.dtype) if self.has_norm else x

    def forward(self, x):
        heads = self.projections(x).view(B, self.tokens, A + 2 * G, D)
        q, k, v = heads.split([A, G, G], 2)
        position = torch.arange(self.tokens) + self.count
        angles = (position[:, None] * torch.arange(1, D + 1) / D).unsqueeze(0)
        cos, sin = (f(angles).to(x.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
        q, k = (self.turned(self.normed(y).transpose(1, 2), cos, sin) for y in (q, k))
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v.transpose(1, 2))
        self.count.add_(self.tokens)
        mask = (torch.arange(2 * S) <= position[:, None]).view(1, 1, self.tokens, 2 * S)
        return moe.attend(q, self.keys, self.values, mask)

    @staticmethod
    def turned(x, cos, sin):
        low, high = x[..., : D // 2], x[..., D // 2 :]
        return x * cos + torch.cat([-high, low], -1) * sin


def buffers(code):
    """Numbers of elements of all that generated code allocates."""
    sizes = re.findall(r"empty_strided_(?:cpu|cuda)\(\(([\d, ]*)\)", code)
    return [prod(int(n) for n in size.split(",") if n.strip()) for size in sizes]


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "has_norm", "dtype"), [(1, True, torch.bfloat16), (2, False, torch.float32)]
)
def test_steps_of_a_static_cache(tokens, has_norm, dtype):
    """Compiled by Inductor, on a CPU: the caches are written in place before they are read."""
    eager, compiled = (Attention(tokens, has_norm, dtype) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    addresses = [x.data_ptr() for x in (compiled.keys, compiled.values)]
    counts = []

    def on_a_cpu(pass_):
        def run_it(graph):
            outcome = pass_(graph, ("cpu",))
            counts.append((len(outcome.rewrites), [e.detail for e in outcome.declined]))
            return outcome

        return update_wrapper(run_it, pass_)

    options = {"extra_passes": [on_a_cpu(p) for p in (rotate_together, store_together)]}
    step = torch.compile(compiled, backend="moe_compile", options=options)
    for i in range(S // tokens):
        x = torch.randn(B, tokens, 16, dtype=dtype)
        if i == 0:
            out, (code,) = run_and_get_code(step, x)
            assert code.count("moe_compile.rotate_and_store.default(") == 1
            assert max(buffers(code)) < compiled.keys.numel(), "a copy of a cache"
        else:
            out = step(x)
        torch.testing.assert_close(out, eager(x), rtol=2e-2, atol=2e-2)
        for name in "keys", "values", "count":
            mine, theirs = getattr(compiled, name), getattr(eager, name)
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    assert counts == [(1, []), (1, [])]
    assert addresses == [x.data_ptr() for x in (compiled.keys, compiled.values)]


STEPS, CACHE = 20, 512


def language_model(kind, device):
    """Of two layers; Qwen3's norm queries and keys, Mixtral's don't."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    sizes |= {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": CACHE}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def decode(model, tokens, **options):
    """Logits of all steps, the cache, the code, and how many kernels the last step ran."""
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    model(tokens[:, :5], past_key_values=cache)
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True, options=options or None)
    step = compiled if options else model
    logits, code = [], ""
    for i in range(5, 5 + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        given = {"input_ids": tokens[:, i : i + 1], "past_key_values": cache}
        if i == 5 and options:
            out, codes = run_and_get_code(step, **given)
            code = "".join(codes)
        else:
            out = step(**given)
        logits.append(out.logits.clone())
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step(input_ids=tokens[:, -1:], past_key_values=cache)
        torch.cuda.synchronize()
    on_gpu = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e.name for e in on_gpu if not e.name.startswith(("Memcpy", "Memset"))]
    return torch.cat(logits, 1), cache, code, kernels


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "batch", "mode"), [("qwen3_moe", 1, "default"), ("mixtral", 2, "reduce-overhead")]
)
def test_language_models_on_a_gpu(kind, batch, mode, device):
    """Two kernels a layer less, no copy of a cache, and the same bits."""
    model = language_model(kind, device)
    tokens = torch.randint(256, (batch, 6 + STEPS), device=device)
    counters.clear()
    with torch._inductor.config.patch({"triton.cudagraph_or_error": mode != "default"}):
        how = {"mode": mode, "require": {"rotate_together": 2, "read_cache": 2}}
        before, apart, _, more = decode(model, tokens, **how, disable=["store_together"])
        how["require"]["store_together"] = 2
        logits, cache, code, kernels = decode(model, tokens, **how)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert code.count("moe_compile.rotate_and_store.default(") == 2
    assert max(buffers(code)) < cache.layers[0].keys.numel(), "a copy of a cache"
    print(f"{kind}: {len(more)} kernels before, {len(kernels)} with the stores in rotate")
    assert len(kernels) <= len(more) - 4, (more, kernels)
    assert sum("_rotate_and_store_kernel" in name for name in kernels) == 2
    assert torch.equal(logits, before)
    for mine, theirs in zip(cache.layers, apart.layers, strict=True):
        assert mine.cumulative_length == theirs.cumulative_length == 6 + STEPS
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    _, eager, _, _ = decode(model, tokens)
    for name in "keys", "values":  # of the first layer: behind it routing may tip over
        mine, theirs = (getattr(c.layers[0], name) for c in (cache, eager))
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
        assert mine[:, :, : 6 + STEPS].any(-1).all()
        assert not mine[:, :, 6 + STEPS :].any()
