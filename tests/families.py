"""Every model family of transformers whose experts go through its experts interface, made small.

A family is a folder of `transformers.models` with a class that `use_experts_implementation`
decorates. One that came after this file was written is tried with COMMON alone, so that none is
overlooked.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compile

FORMS = ("grouped_mm", "batched_mm")
DECORATOR = "@use_experts_implementation"
ENDINGS = ("ForCausalLM", "TextModel")  # what is built of a family, the first that it has

# What a config does not know of this it does not get.
COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "layers_block_type": ["full_attention", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse"],
    "attn_layer_offset": 0,
    "attn_layer_period": 1,
    "expert_layer_offset": 0,
    "expert_layer_period": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"num_key_value_heads": 4}  # latent attention has as many of the one as of the other
SPARSE_MLA = {**MLA, "layer_types": None}  # whose names differ between versions
GEMMA = {
    "top_k_experts": 2,
    "global_head_dim": 16,
}


def mrope(*sections: int) -> dict[str, Any]:
    """Rotary embeddings in sections for time, height and width, which must fill half a head."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


@dataclass(frozen=True)
class Family:
    """How one family is made small, and what is known of it."""

    overrides: dict[str, Any] = field(default_factory=dict)  # of COMMON
    model: str = ""  # the class, where no ending of ENDINGS finds it
    left: dict[str, int] = field(default_factory=dict)  # layers left alone, by pass
    reason: str = ""  # why they are, or what else is special


KNOWN: dict[str, Family] = {
    "axk1": Family(MLA),
    "axk2": Family(
        SPARSE_MLA,
        left={"find_routing": 1},
        reason="router masks experts with 0.0 under a bias, where a kept score may be less",
    ),
    "bailing_hybrid": Family(MLA),
    "deepseek_v2": Family(MLA),
    "deepseek_v3": Family(MLA),
    "deepseek_v32": Family(SPARSE_MLA),
    "deepseek_v4": Family(
        {
            "num_hidden_layers": 2,
            "layer_types": ["compressed_sparse_attention", "sliding_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
            "num_key_value_heads": 1,
            "o_groups": 2,
            "o_lora_rank": 16,
            "qk_rope_head_dim": 8,
        },
        left={"find_routing": 1},
        reason="the first layer's experts are chosen by a hash of the word",
    ),
    "diffusion_gemma": Family(GEMMA),
    "dots3_note": Family(MLA),
    "ernie4_5_moe": Family({"moe_layer_start_index": 0}),
    "ernie4_5_vl_moe": Family(
        {"moe_intermediate_size": [32, 32], "rope_parameters": mrope(3, 3, 2)}
    ),
    "gemma4": Family(
        {
            **GEMMA,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 128,
        }
    ),
    "glm4_moe_lite": Family(MLA),
    "glm4v_moe": Family({"rope_parameters": mrope(1, 1, 2)}),
    "glm5_next": Family(
        {**MLA, "qk_rope_head_dim": 0, "head_dim": 0, "layer_types": ["linear_attention"]},
        reason="linear attention only: its indexed attention breaks the graph under any backend",
    ),
    "glm_moe_dsa": Family(SPARSE_MLA),
    "inkling": Family(
        left={"find_routing": 1},
        reason="router weighs by the softmax of log-sigmoids of routed and shared experts",
    ),
    "inkling2": Family(
        left={"find_activation": 1},
        reason="activation with soft caps, which Inductor fuses",
    ),
    "kimi_linear": Family(MLA),
    "mistral4": Family(MLA),
    "mistral_large4": Family(MLA),
    "openai_privacy_filter": Family(model="OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Family(
        left={"find_routing": 1},
        reason="router takes one expert at a time, masking between (sparse mixer)",
    ),
    "qwen4_exp": Family(
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    ),
    "zaya": Family(
        {"num_experts_per_tok": 1, "router_hidden_size": 32, "layer_types": ["hybrid"]},
        left={"find_routing": 1},
        reason="router has a class for no expert, whose ids it replaces",
    ),
}


def families() -> list[str]:
    """The names of all families, whether KNOWN or not."""
    root = Path(transformers.__file__).parent / "models"
    return sorted(
        {p.parent.name for p in root.glob("*/modeling_*.py") if DECORATOR in p.read_text()}
    )


def model_class(name: str) -> type[nn.Module]:
    """The class that stands for a family. Errors: LookupError if it has none we know to build."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name in KNOWN and KNOWN[name].model:
        return getattr(module, KNOWN[name].model)  # type: ignore[no-any-return]
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    for ending in ENDINGS:
        for attribute, value in own.items():
            if attribute.endswith(ending) and inspect.isclass(value):
                return value
    raise LookupError(f"no class that ends in {' or '.join(ENDINGS)}")


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The small model of a family, with random weights."""
    cls: Any = model_class(name)
    overrides = KNOWN.get(name, Family()).overrides
    fields = {f for c in cls.config_class.__mro__ for f in getattr(c, "__annotations__", {})}
    common = {key: value for key, value in COMMON.items() if key in fields}
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**common, **overrides})).eval().requires_grad_(False)
    spread(model)
    return as_loaded(model, dtype)


def as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In `dtype`, but for what `from_pretrained` leaves in float32."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    saved = model.state_dict()
    kept = {
        name: tensor.clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if dtype != torch.float64
        and (name not in saved or any(f".{part}." in f".{name}." for part in strict))
    }
    model.to(dtype)
    for name, tensor in kept.items():
        owner, _, last = name.rpartition(".")
        getattr(model.get_submodule(owner), last).data = tensor
    return model


def spread(model: nn.Module) -> None:
    """Weights at which experts, tokens and biases differ, as fresh ones do not."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("tid2eid"):  # the experts of each word, where a hash chooses them
            tensor.copy_(torch.randint(8, tensor.shape))
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn_like(tensor)
        with torch.no_grad():
            if "bias" in name.rsplit(".", 1)[-1]:
                tensor.copy_(0.1 * noise)
            elif isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
                router = any(word in name for word in ("gate.", "router")) and "proj" not in name
                tensor.copy_(noise * (0.5 if router else 0.15))
            elif isinstance(tensor, nn.Parameter):
                tensor.add_(0.1 * noise)


def inputs(batch: int = 2, length: int = 7) -> dict[str, Any]:
    """What a model is called with."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, COMMON["vocab_size"], (batch, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def run(model: Any, **inputs: Any) -> Tensor:
    """The logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        output = model(**inputs)
    found = getattr(output, "logits", None)
    return output.last_hidden_state if found is None else found  # type: ignore[no-any-return]


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that go through the experts interface."""
    return [m for m in model.modules() if {"is_transposed", "has_bias"} <= vars(m).keys()]


@contextmanager
def counting_calls(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Collects which of `modules` are called: a forward may leave out some."""
    called: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in modules]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class _InFloat64(TorchDispatchMode):
    """Float64 wherever a model asks for float32 by name, as routers, norms and softmaxes do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def exact_logits(name: str, model: nn.Module, **inputs: Any) -> Tensor:
    """The logits in float64 of `model`'s very weights, by the model's own loop over experts."""
    exact = build(name, torch.float64)
    exact.load_state_dict(model.state_dict())
    exact.set_experts_implementation("eager")  # type: ignore[operator]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            return run(exact, **inputs)
    finally:
        torch.set_default_dtype(default)


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error and the RMS error."""
    error = got.double() - exact
    return error.abs().max().item(), error.square().mean().sqrt().item()


def within(
    ours: tuple[float, float],
    theirs: tuple[float, float],
    size: tuple[float, float],
    dtype: torch.dtype = torch.float32,
) -> bool:
    """At most twice their errors, each with one unit in the last place of the values to spare."""
    eps = torch.finfo(dtype).eps
    return all(o <= 2 * t + eps * s for o, t, s in zip(ours, theirs, size, strict=True))


class _Stop(BaseException):
    """Ends a compile once the passes ran; not an Exception, so that Inductor lets it through."""


def until_passes(
    look: Callable[[fx.GraphModule, fx.GraphModule], Callable[..., Any] | None],
    disable: Sequence[str] = (),
) -> Callable[..., Any]:
    """A backend that compiles up to the passes, but for those in `disable`, and generates no code.

    `look` gets Dynamo's module and the ATen graph that the passes left, and may return what is to
    be called instead of the module; both take the same inputs.
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found: list[fx.GraphModule] = []

        def stop(graph: fx.Graph) -> None:
            found.append(fx.GraphModule(graph.owning_module, graph))
            raise _Stop

        options = {"disable": tuple(disable), "extra_passes": (stop,)}
        with suppress(_Stop):
            moe_compile.backend(gm, example_inputs, options=options)
        return look(gm, found[0]) or gm.forward

    return backend
