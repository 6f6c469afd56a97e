"""transformers' own tensor- and expert-parallel plans, on processes that talk by gloo, or by NCCL.

`MOE_COMPILE_RANKS=4` runs them on four processes; two are the default.
"""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from ranks import count_collectives, own_device, spawn

import moe_compile
from moe_compile.parallel import CollectivesWarning
from moe_compile.passes import PASSES
from moe_compile.testing import capture_all, run_passes

pytest.importorskip("accelerate", reason="transformers' tp_plan needs it")

RANKS = int(os.environ.get("MOE_COMPILE_RANKS", "2"))
SHARED = {"vocab_size": 256, "hidden_size": 64, "max_position_embeddings": 128}
CONFIGS = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, n_shared_experts=1, moe_intermediate_size=32,
        intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, **SHARED,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, **SHARED,
    ),
}  # fmt: skip
# All-reduces of the forward before and after, as transformers 5.23 plans: of the embedding, and for
# each layer of attention (if it is sharded), then of the MLP, or of routed and shared experts.
ALL_REDUCES = {
    ("deepseek_v3", "tp"): (1 + 1 + 2 * 2, 1 + 1 + 2 * 1),
    ("deepseek_v3", "ep"): (1 + 1 + 2 * 2, 1 + 1 + 2 * 1),
    ("qwen3_moe", "tp"): (1 + 2 * 2, 1 + 2 * 2),
    ("qwen3_moe", "ep"): (1 + 2 * 2, 1 + 2 * 2),
}
# The expert plan of transformers before that shards nothing but experts.
IS_NEW = Version(transformers.__version__) >= Version("5.23")
IN_ONE_GRAPH = Version(torch.__version__) >= Version("2.13")  # 2.11 breaks the graph at DTensors
PROMPT = [[3, 141, 59, 26, 5]]
NEW = 6


def plan(kind, n):
    from transformers.distributed import DistributedConfig

    if kind == "tp":
        return DistributedConfig(tp_size=n)
    if "ep_size" in DistributedConfig.__dataclass_fields__:
        return DistributedConfig(tp_size=n, ep_size=n)
    return DistributedConfig(tp_size=n, enable_expert_parallel=True)


def generate(model):
    prompt = torch.tensor(PROMPT, device=model.device)
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()


def on_each_rank(rank, n, name, kind, folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=plan(kind, n)
    ).eval()
    model.requires_grad_(False)
    moe_compile.prepare(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollectivesWarning)
        check_graph(model, n, name, kind)
        assert generate(model) == tokens


@torch.no_grad()
def check_graph(model, n, name, kind):
    before, after, judged, sequence = 0, 0, [], []
    graphs = capture_all(
        model, torch.tensor(PROMPT, device=own_device()), use_cache=False, logits_to_keep=1
    )
    assert len(graphs) == 1 or not IN_ONE_GRAPH
    for gm in graphs:
        before += count_collectives(gm)["all_reduce"]
        outcomes = dict(zip((p.__name__ for p in PASSES), run_passes(gm), strict=True))
        after += count_collectives(gm)["all_reduce"]
        assert not outcomes["lint_collectives"].mistakes
        judged += [e.detail.partition(";")[0] for e in outcomes["lint_collectives"].declined]
        sequence += [str(node.target) for node in gm.graph.nodes if "c10d" in str(node.target)]
    everyone = [None] * n
    dist.all_gather_object(everyone, sequence)
    assert all(theirs == sequence for theirs in everyone)
    if IS_NEW and IN_ONE_GRAPH:
        assert (before, after) == ALL_REDUCES[name, kind]
        # All but the embedding's, which each rank masks by its own range of tokens.
        assert judged == [f"1 of {before} reductions not judged"]


@pytest.mark.parametrize("kind", ["tp", "ep"])
@pytest.mark.parametrize("name", CONFIGS)
def test_plan_of_transformers(name, kind, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    spawn(on_each_rank, RANKS, name, kind, str(tmp_path), generate(model.eval()))
