"""warmup: afterwards `generate` compiles nothing."""

import builtins
import logging

import pytest
import torch
import transformers
from test_huggingface import qwen3

import moe_compile


def prompts(batch, length, device):
    return torch.randint(1, 100, (batch, length), device=device)


@pytest.fixture
def model(device):
    model = qwen3().to(device)
    return moe_compile.prepare(model)


def test_after_it_generate_compiles_nothing(model, device, caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="moe_compile"):
        seconds = moe_compile.warmup(model, (1, 2), prompt_length=5, max_length=32, progress=False)
    assert list(seconds) == [1, 2]
    assert min(seconds.values()) > 0
    logged = [r.getMessage() for r in caplog.records if "warmup" in r.getMessage()]
    assert [line.split(":")[1] for line in logged] == [" batch size 1", " batch size 2"]
    assert torch.equal(torch.get_rng_state(), state)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length, new in (1, 5, 27), (2, 5, 27), (2, 9, 3), (1, 20, 12):
            tokens = prompts(batch, length, device)
            got = model.generate(tokens, max_new_tokens=new, do_sample=False)
            assert got.shape == (batch, length + new)
        padded = torch.ones(2, 5, dtype=torch.int64, device=device)
        padded[0, :3] = 0
        got = model.generate(tokens := prompts(2, 5, device), max_new_tokens=6, do_sample=False)
        model.generate(tokens, attention_mask=padded, max_new_tokens=6)
        with pytest.raises(RuntimeError, match="recompile"):  # longer than max_length
            model.generate(tokens, max_new_tokens=28)
    model.generation_config.disable_compile = True
    assert torch.equal(got, model.generate(tokens, max_new_tokens=6, do_sample=False))


def test_an_end_of_sequence_does_not_end_it(model, device, monkeypatch):
    """Whatever the model says: here every token is an end."""
    steps = []
    uncompiled = lambda config: lambda **inputs: steps.append(1) or model(**inputs)  # noqa: E731
    monkeypatch.setattr(model, "get_compiled_call", uncompiled)
    model.generation_config.eos_token_id = list(range(1, 128))
    model.generation_config.pad_token_id = 0
    moe_compile.warmup(model, [1], prompt_length=5)
    assert len(steps) == 4


def test_caches_of_the_caller(model, device):
    model.generation_config.cache_implementation = None
    caches = {n: transformers.StaticCache(config=model.config, max_cache_len=24) for n in (1, 2)}
    moe_compile.warmup(model, [2], prompt_length=5, max_length=20, caches=caches)
    cache, tokens = caches[2], prompts(2, 5, device)
    keys = cache.layers[0].keys.data_ptr()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            got = model.generate(tokens, past_key_values=cache, max_new_tokens=6, do_sample=False)
            cache.reset()
    assert cache.layers[0].keys.data_ptr() == keys
    model.generation_config.disable_compile = True
    assert torch.equal(got, model.generate(tokens, max_new_tokens=6, do_sample=False))


def test_without_tqdm(monkeypatch):
    load = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ModuleNotFoundError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    from moe_compile.warmup import _bar

    assert list(_bar([1, 2], "warmup", "batch size", True)) == [1, 2]


ERRORS = {
    r"batch_sizes of 1 or more, got \[\]": {"batch_sizes": []},
    r"batch_sizes of 1 or more, got \[2, 0\]": {"batch_sizes": [2, 0]},
    r"a prompt_length of 1 or more, got 0": {"prompt_length": 0},
    r"max_length of 21 or more, got 20": {"max_length": 20},
    r"caches for all batch sizes, got none for \[1\]": {"caches": {2: None}},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message, model):
    with pytest.raises(ValueError, match=f"^warmup: expected {message}"):
        moe_compile.warmup(model, **{"batch_sizes": [1], **ERRORS[message]})


def test_models_that_are_not_prepared():
    for model in qwen3(), torch.nn.Linear(2, 2):
        name = type(model).__name__
        message = f"^warmup: expected a model that moe_compile.prepare made ready, got {name}"
        with pytest.raises(ValueError, match=message):
            moe_compile.warmup(model, [1])
