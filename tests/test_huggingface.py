"""prepare, and our ops as an experts implementation of transformers."""

import pytest
import torch
import transformers

import moe_compile

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def qwen3(**more):
    config = transformers.Qwen3MoeConfig(
        **SMALL, head_dim=16, moe_intermediate_size=16, num_experts=8, norm_topk_prob=True
    )
    return build(config, **more)


def gpt_oss(**more):
    config = transformers.GptOssConfig(
        **{**SMALL, "num_hidden_layers": 1},
        head_dim=16,
        intermediate_size=16,
        num_local_experts=8,
        pad_token_id=0,
        rope_scaling=None,
    )
    return build(config, **more)


def build(config, **more):
    torch._dynamo.reset()
    model = transformers.AutoModelForCausalLM.from_config(config, **more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def tokens(device):
    return torch.randint(1, 100, (2, 5), device=device)


@torch.no_grad()
@pytest.mark.parametrize("build_model", [qwen3, gpt_oss])
def test_experts_implementation_equals_eager(build_model, tokens, device):
    moe_compile.register_experts()
    model = build_model().to(device)
    model.set_experts_implementation("eager")
    expected = model(tokens, use_cache=False).logits
    model.set_experts_implementation("moe_compile")
    got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_experts_implementation_by_name_at_build():
    moe_compile.register_experts()
    model = qwen3(experts_implementation="moe_compile")
    assert model.config._experts_implementation == "moe_compile"


def test_training_through_the_ops_is_refused(tokens, device):
    moe_compile.register_experts()
    model = qwen3().to(device)
    model.set_experts_implementation("moe_compile")
    with pytest.raises(
        RuntimeError, match=r"expected inputs without gradients .*requires_grad=True"
    ):
        model(tokens, use_cache=False)


def test_generate_after_prepare_gives_the_same_tokens(tokens, device):
    model = qwen3().to(device)
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False)
    ran = []
    count = lambda graph: ran.append(1)  # noqa: E731
    options = {"require": {"find_routing": 2, "find_activation": 2}, "extra_passes": [count]}
    assert moe_compile.prepare(model, options=options) is model
    got = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)
    assert ran == [1]  # the decode step was compiled, once, by us


def test_prepare_reads_like_this(device):
    model = qwen3().to(device)
    moe_compile.prepare(model)
    config = model.generation_config
    assert config.cache_implementation == "static"
    assert config.compile_config.backend == "moe_compile"
    assert config.compile_config.mode == (None if device == "cpu" else "reduce-overhead")
    assert model.config._experts_implementation == "moe_compile"


def test_prepare_refuses_what_does_not_generate():
    with pytest.raises(
        ValueError, match="prepare: expected a transformers model that generates, got Linear"
    ):
        moe_compile.prepare(torch.nn.Linear(2, 2))


def test_prepare_refuses_unknown_options():
    with pytest.raises(ValueError, match="got 'sped'"):
        moe_compile.prepare(qwen3(), options={"sped": 1})
