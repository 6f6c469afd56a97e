"""A decode step of gpt-oss: what it launches, and that it computes what the model does."""

import importlib
from functools import partial, update_wrapper

import pytest
import torch
from helpers import graph_on_gpu
from torch._higher_order_ops.auto_functionalize import auto_functionalized

import moe_compile
from moe_compile.passes.rotate_together import rotate_together
from moe_compile.passes.store_together import store_together
from moe_compile.testing import capture, run_passes

transformers = pytest.importorskip("transformers")
backend = importlib.import_module("moe_compile.backend")  # the package has the function's name
aten = torch.ops.aten
WINDOW, CACHE = 8, 16


def model_of(dtype, form, **sizes):
    """Two layers, of which the first has a window, with biases everywhere."""
    sizes = {"hidden_size": 32, "num_local_experts": 4, "head_dim": 8, **sizes}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    config = transformers.GptOssConfig(
        vocab_size=256, intermediate_size=16, num_experts_per_tok=2, num_hidden_layers=2,
        sliding_window=WINDOW, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.requires_grad_(False).set_experts_implementation(form)
    return model


def on_gpu(gm):
    """A graph captured on a CPU, on a GPU."""
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda"))
    gm.recompile()
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return graph_on_gpu(lambda *args: tuple(x for x in gm(*args) if x is not None), *inputs)


# Weights are large enough for `choose_linear`, experts many enough for `choose_kernels`.
LARGE = {"hidden_size": 256, "num_local_experts": 256, "head_dim": 64, "num_key_value_heads": 4}


@torch.no_grad()
def test_launches():
    """Eight a layer, of a full window too: seven ops, of which `experts` is two kernels."""
    moe_compile.register_experts()
    model = model_of(torch.bfloat16, "moe_compile", **LARGE)
    cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE)
    model(torch.randint(64, (1, WINDOW)), past_key_values=cache)
    gm = on_gpu(capture(model, torch.tensor([[3]]), past_key_values=cache))
    run_passes(gm)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    calls = [n.args[0] if n.target is auto_functionalized else n.target for n in nodes]
    ours = [str(c).split(".")[1] for c in calls if "moe_compile" in str(c)]
    rest = ["attend", "skinny_mm", "rms_norm_mms", "route", "experts"]
    window = ["rms_norm_mms", "rotate_and_push", *rest]
    full = ["rms_norm_mms", "rotate_and_store", *rest]
    assert ours == [*window, *full, "rms_norm_mms"]
    gone = (aten.rsqrt, aten.index_put, aten.index, aten.mm, aten.addmm, aten.sort)
    assert not [c for c in calls if getattr(c, "overloadpacket", None) in gone]
    assert calls.count(aten.bmm.default) <= 1  # of positions and frequencies, once a step
    adds = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert all(n.meta["val"].numel() <= WINDOW for n in adds)  # positions, not rows


@pytest.fixture
def rewrites(monkeypatch):
    """How often each pass for GPUs rewrote a graph here, on a CPU; nothing is compiled, it runs."""
    found = []

    def on_a_cpu(pass_):
        def run(graph):
            outcome = pass_(graph, devices=("cpu",))
            found.append((pass_.__name__, len(outcome.rewrites)))
            return outcome

        return update_wrapper(run, pass_)

    def run(gm, example_inputs, **how):
        call = partial(lambda gm, inputs: gm(*inputs), gm)
        call._boxed_call = True
        return call

    monkeypatch.setattr(backend, "compile_fx_inner", run)
    torch._dynamo.reset()
    return found, [on_a_cpu(p) for p in (rotate_together, store_together)]


@torch.no_grad()
def test_steps_beside_eager(rewrites):
    """The window takes its last position, and slides: the same logits and caches."""
    found, extra_passes = rewrites
    model = model_of(torch.float32, "grouped_mm")
    options = {"extra_passes": extra_passes}
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True, options=options)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=CACHE) for _ in range(2)]
    tokens = torch.randint(64, (1, WINDOW - 1))
    for cache in caches:
        model(tokens, past_key_values=cache)
    for _ in range(4):
        token = torch.randint(64, (1, 1))
        ours, eager = (
            step(token, past_key_values=cache).logits
            for step, cache in zip((compiled, model), caches, strict=True)
        )
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine.values, theirs.values, rtol=1e-5, atol=1e-6)
    assert found == [("rotate_together", 2), ("store_together", 2)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_steps_on_a_gpu(mode, device):
    """The window takes its last position and slides; caches of the layer that has one."""
    moe_compile.register_experts()
    model = model_of(torch.bfloat16, "moe_compile", **LARGE).to(device)
    require = {"rotate_together": 2, "read_cache": 2, "store_together": 2, "fuse_norm": 5}
    torch._dynamo.reset()
    options = {"require": require, "mode": mode}
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True, options=options)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
    tokens = torch.randint(64, (1, WINDOW + 19), device=device)
    for cache in caches:
        model(tokens[:, : WINDOW - 1], past_key_values=cache)
    for i in range(WINDOW - 1, WINDOW + 19):
        for step, cache in zip((compiled, model), caches, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            step(tokens[:, i : i + 1], past_key_values=cache)
        mine, theirs = (cache.layers[0] for cache in caches)
        # Of sums of size 3, which are not all rounded alike: what stands elsewhere is 3 off.
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=2e-2, atol=0.1)
        torch.testing.assert_close(mine.values, theirs.values, rtol=2e-2, atol=0.1)
