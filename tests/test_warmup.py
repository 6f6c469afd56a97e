"""warmup: afterwards `generate` compiles nothing."""

import builtins
import importlib
import logging

import pytest
import torch
import transformers
from test_huggingface import qwen3

import moe_compile
from moe_compile.ops import _candidates, _measured
from moe_compile.ops._tuned import KERNELS

WARMUP = importlib.import_module("moe_compile.warmup")  # the name is that of the function, too


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


@pytest.fixture
def steps(model, monkeypatch):
    """What warmup does, in order; decode steps run uncompiled."""
    steps = []
    uncompiled = lambda config: lambda **inputs: steps.append("step") or model(**inputs)  # noqa: E731
    monkeypatch.setattr(model, "get_compiled_call", uncompiled)
    bar = lambda items, desc, unit, progress: steps.append(desc) or items  # noqa: E731
    monkeypatch.setattr(WARMUP, "_bar", bar)
    return steps


def test_tuning_comes_before_anything_is_recorded(model, device, steps, monkeypatch):
    """One decode step is run and not recorded by CUDA graphs, which record the second."""

    class Job:
        def measured(self, on):
            assert on == model.device
            return steps.append("measured")

    monkeypatch.setattr(WARMUP._tune, "jobs", lambda asked, on: [Job(), Job()])
    monkeypatch.setattr(WARMUP._tune, "keep", lambda found, on: steps.append(found))
    seconds = moe_compile.warmup(model, [1, 2], prompt_length=5, tune=True)
    runs = ["compile", "step", "step"], ["tune", "measured", "measured", [None, None]]
    assert steps == [*runs[0], *runs[1], "warmup", *["step"] * 8]
    assert list(seconds) == [1, 2]


def test_untuned_it_measures_and_records_nothing(model, steps, monkeypatch):
    for module, name in (WARMUP._tune, "jobs"), (WARMUP._tune, "keep"), (WARMUP, "recording"):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(_measured, "save", None)
    moe_compile.warmup(model, [1], prompt_length=5)
    assert steps == ["warmup", *["step"] * 4]


@pytest.mark.gpu
def test_tuned_on_a_gpu(model, device, monkeypatch, tmp_path):
    """Few candidates of each; all that decoding launches is measured, and tokens stay the same."""
    tokens = prompts(1, 5, device)
    want = model.generate(tokens, max_new_tokens=6, do_sample=False)
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for kernel in KERNELS.values():
        kernel.forget()
        candidates = getattr(_candidates, kernel.name)
        few = lambda *key, candidates=candidates: candidates(*key)[:2]  # noqa: E731
        monkeypatch.setattr(_candidates, kernel.name, few)
    moe_compile.warmup(model, [1], prompt_length=5, max_length=32, tune=True)
    assert any(kernel._tables for kernel in KERNELS.values())
    assert list((tmp_path / "moe_compile").rglob("*.json"))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(want, model.generate(tokens, max_new_tokens=6, do_sample=False))
    for kernel in KERNELS.values():
        kernel.forget()
