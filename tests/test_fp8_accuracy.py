"""Perplexity of a trained model in bfloat16, in float8 uncompiled, and in float8 fused.

The model is scripts/train_byte_lm.py's, the text one that it has not seen. Random weights would not
do: their logits say nothing that quantisation could spoil.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe_compile
from moe_compile import explain

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from train_byte_lm import WEIGHTS, build, held_out, perplexity


@pytest.fixture(scope="module")
def models():
    """bfloat16, and the same quantised."""
    plain = build().bfloat16().eval().requires_grad_(False)
    missing, unexpected = plain.load_state_dict(load_file(WEIGHTS), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # which is the embedding
    model = moe_compile.quantize(copy.deepcopy(plain))
    model.set_experts_implementation("moe_compile")
    return plain, model


def test_the_model_has_learnt(models):
    """Bytes by themselves have a perplexity of about 25, uniform ones of 256."""
    assert perplexity(models[0], held_out()[:32]) < 12


def test_float8_is_within_a_percent(models):
    windows = held_out()[:48]
    plain, model = models
    exact, eager = perplexity(plain, windows), perplexity(model, windows)
    assert abs(eager / exact - 1) < 0.01
    fused = torch.compile(
        model, backend="moe_compile", options={"require": {"fuse_activation_quant": 2}}
    )
    got = perplexity(fused, windows)
    assert abs(got / exact - 1) < 0.01
    assert abs(got / eager - 1) < 0.003


def test_fused_errs_as_the_unfused_does(models):
    """Against the same quantised weights with everything else in float64's place: float32."""
    windows = held_out()[:2]
    _, model = models
    wide = copy.deepcopy(model).float()  # weights stay float8, their scales float32
    with torch.no_grad():
        exact = wide(windows, use_cache=False).logits
        eager = model(windows, use_cache=False).logits
        fused = torch.compile(model, backend="moe_compile")(windows, use_cache=False).logits
    errors = [(x.float() - exact).pow(2).mean().sqrt().item() for x in (eager, fused)]
    assert errors[1] <= 2 * errors[0]


def test_the_report_names_every_layer(models):
    report = explain(models[1], held_out()[:1], use_cache=False)
    (outcome,) = [
        p.outcome for g in report.graphs for p in g.passes if p.name == "fuse_activation_quant"
    ]
    assert [e.layer for e in outcome.rewrites] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
