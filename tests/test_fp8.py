"""Float8 models of transformers on our ops: quantised here, fused, generated, saved and loaded."""

import copy
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import StaticCache

import moe_compile
from moe_compile.fp8 import batched_matmul, grouped_matmul, matmul
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize
from moe_compile.quantization import quantize_weight
from moe_compile.testing import capture, run_passes

FP8 = torch.float8_e4m3fn
SHARED = {"vocab_size": 512, "hidden_size": 128, "max_position_embeddings": 128}
CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, **SHARED,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, n_shared_experts=1, moe_intermediate_size=128,
        intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128,
        kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, **SHARED,
    ),
}  # fmt: skip
EXPERT_LAYERS = {"qwen3_moe": 2, "deepseek_v3": 2}
PROMPT = [[3, 141, 59, 26, 5, 35]]


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def build(name, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    model.eval().requires_grad_(False)
    for n, parameter in model.named_parameters():
        if n.endswith("gate.weight"):  # routers that decide, so that no rounding does
            parameter.mul_(20)
    return model


def generate(model, device, new=8):
    prompt = torch.tensor(PROMPT, device=device)
    return model.generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=0).tolist()


@torch.no_grad()
def logits(model, device):
    return model(torch.tensor(PROMPT, device=device), use_cache=False).logits


def relative(got, want):
    return ((got.float() - want.float()).pow(2).mean() / want.float().pow(2).mean()).sqrt().item()


def test_what_is_quantised(name, caplog):
    caplog.set_level("INFO", logger="moe_compile")
    model = build(name)
    before = sum(p.nbytes for p in model.parameters())
    wanted = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert moe_compile.quantize(model) is model
    parameters = dict(model.named_parameters())
    quantised = {n for n, p in parameters.items() if p.dtype == FP8}
    assert wanted <= quantised
    assert any("o_proj" in n for n in quantised)
    for kept in ("embed_tokens", "lm_head", "norm", "gate.weight"):
        assert not any(kept in n for n in quantised)
        assert any(kept in n for n in parameters)
    for n in quantised:
        assert parameters[f"{n}_scale_inv"].dtype == torch.float32
    weights = sum(p.nbytes for n, p in parameters.items() if n in quantised)
    saved = before - sum(p.nbytes for p in parameters.values())
    assert 0.99 * weights < saved < weights  # half of bfloat16, less the scales
    told = re.search(r"quantize: (\d+) layers, (.+) -> (.+) MiB", "\n".join(caplog.messages))
    layers, was, now = told.groups()
    assert int(layers) == len({n.rpartition(".")[0] for n in quantised})
    assert float(was) - float(now) == pytest.approx(saved / 2**20, abs=0.1)


def test_a_router_that_is_a_linear_layer_stays_alone():
    """Its name begins that of the shared expert's projections, and of no other layer's."""
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=11, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=128,
        shared_expert_intermediate_size=128, num_attention_heads=2, num_key_value_heads=2,
        mlp_only_layers=[10], intermediate_size=128, **SHARED,
    )  # fmt: skip
    model = moe_compile.quantize(transformers.AutoModelForCausalLM.from_config(config))
    parameters = dict(model.named_parameters())
    for n, parameter in parameters.items():
        is_projection = n.endswith("_proj.weight") or n.endswith("_proj")
        assert (parameter.dtype == FP8) == is_projection, n


def test_keep(name):
    model = moe_compile.quantize(build(name), keep=["o_proj"])
    parameters = dict(model.named_parameters())
    assert all(p.dtype == torch.bfloat16 for n, p in parameters.items() if "o_proj" in n)


def test_close_to_bfloat16(name, device):
    plain = build(name).to(device)
    model = moe_compile.quantize(copy.deepcopy(plain))
    model.set_experts_implementation("moe_compile")
    assert relative(logits(model, device), logits(plain, device)) < 0.15
    # The same weights, dequantised: what is left is the rounding of activations.
    for module in model.modules():
        for n in ("weight", "gate_up_proj", "down_proj"):
            if getattr(getattr(module, n, None), "dtype", None) == FP8:
                scale = getattr(module, f"{n}_scale_inv")
                w = dequantize(getattr(module, n), scale, 128, 128, torch.float32)
                setattr(module, n, torch.nn.Parameter(w.bfloat16(), requires_grad=False))
    dequantised = logits(model, device)
    assert relative(dequantised, logits(plain, device)) < 0.12


def test_forms_of_experts_agree(name, device):
    """transformers' own grouped and batched forms, on our entry points, and ours."""
    model = moe_compile.quantize(build(name, torch.float32).to(device))
    found = {}
    for form in ("grouped_mm", "batched_mm", "moe_compile"):
        model.set_experts_implementation(form)
        found[form] = logits(model, device)
    assert relative(found["batched_mm"], found["grouped_mm"]) < 2e-2
    assert relative(found["moe_compile"], found["grouped_mm"]) < 2e-2


def test_every_expert_layer_is_fused(name):
    model = moe_compile.prepare(moe_compile.quantize(build(name)))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor(PROMPT), past_key_values=cache)
        token = torch.tensor([[7]])
        gm = capture(lambda c: model(token, past_key_values=c, logits_to_keep=1).logits, cache)
    run_passes(gm)
    text = str(gm.graph)
    assert text.count("moe_compile.silu_mul_quant") >= EXPERT_LAYERS[name]
    fused = [n for n in gm.graph.nodes if "silu_mul_quant" in str(n.target)]
    reads = [u for n in fused for part in n.users for u in part.users]
    assert sum("grouped_mm_fp8" in str(r.target) for r in reads) == 2 * EXPERT_LAYERS[name]


def test_generates_as_unfused(name, device):
    """Static cache, one graph a step; tokens as uncompiled."""
    model = moe_compile.quantize(build(name, torch.float32).to(device))
    model.set_experts_implementation("moe_compile")
    eager = generate(model, device)
    moe_compile.prepare(model, fullgraph=True, options={"require": {"fuse_activation_quant": 2}})
    assert generate(model, device) == eager


@pytest.mark.gpu
def test_cuda_graphs_with_and_without_fusion(name, device):
    """One CUDA graph a step, no skip; tokens as those of the graph that is not fused."""
    found = []
    layers = {"fuse_activation_quant": EXPERT_LAYERS[name]}
    for options in ({"require": layers}, {"disable": ["fuse_activation_quant"]}):
        torch._dynamo.reset()
        model = moe_compile.quantize(build(name, torch.float32).to(device))
        moe_compile.prepare(model, fullgraph=True, options=options)
        with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
            found.append(generate(model, device, new=32))
    assert found[0] == found[1]


@pytest.mark.gpu
def test_from_pretrained(name, tmp_path, device):
    """As any float8 checkpoint of transformers, onto the GPU."""
    model = moe_compile.quantize(build(name))
    model.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device)
    for m in (model, other):
        m.set_experts_implementation("moe_compile")
    assert torch.equal(logits(model.to(device), device), logits(other, device))


def test_saved_and_loaded(name, tmp_path, device):
    """As docs/fp8.md says: into a model that is built and quantised."""
    model = moe_compile.quantize(build(name))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "fp8"
    other = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    other = moe_compile.quantize(other.eval().requires_grad_(False))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for m in (model, other):
        m.set_experts_implementation("moe_compile")
    assert torch.equal(logits(model.to(device), device), logits(other.to(device), device))


def test_weights_by_blocks():
    w = torch.randn(3, 200, 320) * torch.rand(3, 1, 1) * 10
    w[1] = 0
    q, scale = quantize_weight(w)
    assert q.shape == w.shape
    assert scale.shape == (3, 2, 3)
    back = dequantize(q, scale, 128, 128, torch.float32)
    assert ((back - w).abs() <= w.abs() / 15 + scale.max() / 256).all()
    assert not back[1].any()


def test_entry_points(device):
    """As transformers calls them; rows of no expert and any leading dims."""
    w = torch.randn(4, 128, 256, device=device)
    q, scale = quantize_weight(w)
    back = dequantize(q, scale, 128, 128, torch.float32)
    x = torch.randn(2, 3, 256, device=device)
    y = matmul(x, q[0], scale[0], [128, 128], torch.float32)
    assert relative(y, x @ back[0].t()) < 0.04
    rows = x.view(6, 256)
    ids = torch.tensor([2, 0, 4, 2, -1, 3], device=device)
    got = batched_matmul(rows, q, scale, block_size=(128, 128), expert_ids=ids)
    pairs = list(zip(rows, ids, strict=True))
    want = torch.stack([r @ back[e].t() if 0 <= e < 4 else 0 * r[:128] for r, e in pairs])
    assert relative(got, want) < 0.04
    assert not got[[2, 4]].any()
    offsets = torch.tensor([1, 1, 3, 5], device=device)
    got = grouped_matmul(
        rows, q, scale, offsets=offsets, tokens_per_expert=None, block_size=[128, 128]
    )
    owners = [0, 2, 2, 3, 3]
    want = torch.stack([r @ back[e].t() for r, e in zip(rows[:5], owners, strict=True)])
    assert relative(got[:5], want) < 0.04
    assert not got[5:].any()


def test_powers_of_two_as_scales(device):
    """Checkpoints whose scales are E8M0 bytes."""
    q, _ = quantize_weight(torch.randn(128, 128, device=device))
    scale = torch.tensor([[0.25]], device=device)
    x = torch.randn(3, 128, device=device)
    want = matmul(x, q, scale, [128, 128])
    assert torch.equal(matmul(x, q, scale.to(torch.float8_e8m0fnu), [128, 128]), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": [64, 128]}, r"expected weight blocks of 128 x 128, got \[64, 128\]"),
        ({"block_size": None}, r"expected weight blocks of 128 x 128, got None"),
        ({"activation_scale": torch.ones(())}, r"expected dynamic activation scales, got"),
        ({"w": torch.zeros(128, 64, dtype=torch.int8)}, r"expected weights in .*, got torch.int8"),
    ],
)
def test_refused(change, message):
    q, scale = quantize_weight(torch.randn(128, 128))
    given = {"w": q, "block_size": [128, 128], "activation_scale": None, **change}
    with pytest.raises(ValueError, match=f"moe_compile: {message}"):
        matmul(torch.randn(2, 128), given["w"], scale, given["block_size"], None,
               given["activation_scale"])  # fmt: skip


def test_quantize_refuses(name):
    with pytest.raises(ValueError, match="expected quantize's kind 'fp8', got 'int4'"):
        moe_compile.quantize(build(name), "int4")
    with pytest.raises(ValueError, match="expected layers of 128 features or more to quantise"):
        moe_compile.quantize(torch.nn.Linear(4, 4))
