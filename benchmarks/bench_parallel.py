"""Decode steps of a tensor-parallel model, one process a GPU: NCCL, symmetric memory, Inductor.

    torchrun --nproc-per-node 2 benchmarks/bench_parallel.py [--layers 48] [--batch 1 16 64]

The model of bench_decode.py; each rank holds its part of the heads and of every expert's features,
and hooks all-reduce what attention and the experts return, twice a layer. A step is one call under
CUDA graphs; times are the first rank's. The floor is what one rank has to read, collectives free.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _results import FOLDER, write
from bench_decode import build, bytes_per_step, describe, measure, read_rate
from torch._inductor import config as inductor_config

from moe_compile._symmetric_memory import times
from moe_compile.ops._symmetric_memory import inbox_of
from moe_compile.ops.all_reduce_add_rms_norm import exchange
from moe_compile.parallel import post_experts_all_reduce, use_symmetric_memory

NO_FUSION = {"disable": ("fuse_all_reduce",)}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "inductor, NCCL": ("inductor", {}),
    "inductor, its symmetric memory": ("inductor", {"_collective.auto_select": True}),
    "moe_compile, NCCL": ("moe_compile", NO_FUSION),
    "moe_compile, symmetric memory": ("moe_compile", {}),
}
DEFAULT = [name for name in VARIANTS if "its" not in name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=VARIANTS)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--cache", type=int, default=640)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    is_first = dist.get_rank() == 0
    most = use_symmetric_memory(2048)
    reduced = [all_reduce_times(rows) for rows in (1, 4, 16, 64, 256)]
    if is_first:
        print(f"fused up to {most} rows", *reduced, sep="\n", flush=True)
        write(reduced, "all_reduce", options.out)
    torch.manual_seed(0)
    model = build(options.layers, options.device, dist.get_world_size())
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.experts):
            part.register_forward_hook(lambda module, x, y: reduced_over_ranks(y))
    rate = read_rate(options.device)
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        reference = None
        for name in options.variants:
            row, tokens = one(model, name, batch, options)
            reference = tokens if reference is None else reference
            row["tokens as first"] = f"{(tokens == reference).float().mean().item():.3f}"
            row["floor ms"] = round(bytes_per_step(model, batch, options) / rate * 1e3, 3)
            check_ranks_agree(tokens)
            if is_first:
                kernels = describe(row.pop("kernels"), options.layers)
                rows.append({**row, "ranks": dist.get_world_size(), "fused up to rows": most})
                print(rows[-1], kernels, sep="\n")
                sys.stdout.flush()
                write(rows, "parallel", options.out)
    dist.barrier()
    dist.destroy_process_group()


def reduced_over_ranks(y: torch.Tensor) -> torch.Tensor:
    return post_experts_all_reduce(y, tp_group=dist.group.WORLD)


def one(
    model: torch.nn.Module, name: str, batch: int, options: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor]:
    backend, extra = VARIANTS[name]
    torch._dynamo.reset()
    model.set_experts_implementation("grouped_mm")
    settings = {**torch._inductor.list_mode_options("reduce-overhead"), **extra}
    if "_collective.auto_select" in extra:
        torch.distributed._symmetric_memory.enable_symm_mem_for_group(dist.group.WORLD.group_name)
    assert set(extra) <= {"disable", *inductor_config.get_config_copy()}
    compiled = torch.compile(model, backend=backend, options=settings, fullgraph=True)
    row, tokens = measure(model, compiled, batch, options)
    return {"variant": name, **row}, tokens


def check_ranks_agree(tokens: torch.Tensor) -> None:
    first = tokens.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, tokens), "the ranks decoded different tokens"


@torch.no_grad()
def all_reduce_times(rows: int, hidden: int = 2048) -> dict[str, Any]:
    """Microseconds of all-reduce, add and norm: one kernel, NCCL and a kernel, NCCL alone."""
    name = dist.group.WORLD.group_name
    inbox = inbox_of(name)
    x, weight = (torch.randn(s, hidden, device="cuda").bfloat16() for s in (rows, 1))

    def nccl() -> torch.Tensor:
        reduced = torch.ops._c10d_functional.all_reduce(x, "sum", name)
        return torch.ops._c10d_functional.wait_tensor(reduced)

    fns = {
        "NCCL and a kernel": lambda: exchange(nccl(), x, weight[0], 1e-6, None, True),
        "NCCL alone": nccl,
        "add and norm alone": lambda: exchange(x, x, weight[0], 1e-6, None, True),
    }
    if inbox is not None and inbox.takes(rows, 2 * hidden):
        fns["one kernel"] = lambda: exchange(x, x, weight[0], 1e-6, inbox, True)
    spent = times(*fns.values(), group=dist.group.WORLD)
    found = {f"{k} us": round(s * 1e6, 2) for k, s in zip(fns, spent, strict=True)}
    return {"rows": rows, "hidden": hidden, "one kernel us": "", **found}


if __name__ == "__main__":
    main()
