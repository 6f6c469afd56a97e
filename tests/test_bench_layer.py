"""benchmarks/bench_layer.py: it times what the passes choose, and nothing else."""

import csv
import sys

import bench_layer
import bench_ops
import pytest
import torch
from _moe_layer import ROUTINGS, choices, layer, relative_error
from float8 import gemm_inputs
from helpers import graph_on_gpu
from torch.overrides import TorchFunctionMode

from moe_compile.ops import moe
from moe_compile.passes.choose_kernels import choose_kernels
from moe_compile.passes.fuse_epilogue import LEAST_ROWS_FP8, fuse_epilogue
from moe_compile.testing import run_passes

H, F, E, K = 256, 128, 8, 2
FEW = E // (4 * K)


def stages(x, ids, weights, up, down):
    rows, offsets, position = moe.sort_tokens(ids, E)
    h = moe.silu_mul(moe.grouped_mm(x, up, offsets, rows, K))
    return moe.combine(moe.grouped_mm(h, down, offsets), position, weights)


def stages_fp8(x, ids, weights, up, up_scale, down, down_scale):
    q = moe.quant_fp8(x)
    rows, offsets, position = moe.sort_tokens(ids, E)
    h = moe.grouped_mm_fp8(*q, up, up_scale, offsets, rows, K)
    h_q = moe.silu_mul_quant(h, offsets=offsets, round_silu=True, round_product=True)
    return moe.combine(moe.grouped_mm_fp8(*h_q, down, down_scale, offsets), position, weights)


def inputs(T, fp8):
    ids = choices("uniform", T, E, K, 1)[0]
    if fp8:
        *_, up, up_scale, _ = gemm_inputs([0] * E, 0, H, 2 * F, "cpu")
        *_, down, down_scale, _ = gemm_inputs([0] * E, 0, F, H, "cpu")
        w = (up, up_scale, down, down_scale)
    else:
        w = tuple(torch.randn(E, *s).mul(0.1).bfloat16().mT for s in ((2 * F, H), (H, F)))
    return torch.randn(T, H).bfloat16(), ids, torch.rand(T, K), *w


def ops(gm):
    return [n.target.name() for n in gm.graph.nodes if "moe_compile" in str(n.target)]


def calls(gm):
    """Each op with its arguments by name, those left out that say what the schema says."""
    numbers = {n: i for i, n in enumerate(gm.graph.nodes)}
    found = []
    for n in gm.graph.nodes:
        if "moe_compile" in str(n.target):
            schema = {a.name: a.default_value for a in n.target._schema.arguments}
            given = dict(zip(schema, n.args, strict=False)) | n.kwargs
            given = {k: numbers.get(v, v) for k, v in given.items() if v != schema[k]}
            if given.get("dtype") == torch.bfloat16:  # the schema has its number
                del given["dtype"]
            found.append((n.target.name(), given))
    return found


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("T", [FEW, FEW + 1, LEAST_ROWS_FP8 // K - 1, LEAST_ROWS_FP8 // K])
def test_layer_calls_what_the_passes_choose(T, fp8):
    args = inputs(T, fp8)
    gm = graph_on_gpu(stages_fp8 if fp8 else stages, *args)
    run_passes(gm, choose_kernels, fuse_epilogue)
    assert calls(graph_on_gpu(layer, *args)) == calls(gm)
    few = f"moe_compile::experts{'_fp8' if fp8 else ''}"
    assert (ops(gm)[-1] == few) == (T == FEW)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("T", [FEW, 5])
def test_error(T, fp8):
    args = inputs(T, fp8)
    right = layer(*args)
    assert relative_error(right, *args) < (0.08 if fp8 else 0.015)
    assert relative_error(right.roll(1, -1), *args) > 0.5


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("T", [1, 64])
def test_choices(kind, T):
    found = choices(kind, T, 32, 4, 8)
    assert len(found) == 8
    for ids in found:
        assert ids.shape == (T, 4)
        assert all(len(set(row)) == 4 and set(row) <= set(range(32)) for row in ids.tolist())
    if kind == "one first":
        assert [len(ids[:, 0].unique()) for ids in found] == [1] * 8
        assert len({ids[0, 0].item() for ids in found}) == 8
    if kind == "uniform" and T == 1:
        assert len(torch.cat(found).unique()) == 32
    if kind == "zipf" and T == 64:  # where uniform choices would give each expert 8
        assert all(ids.flatten().bincount().max() > 30 for ids in found)


class OnCpu(TorchFunctionMode):
    """What asks for a GPU gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple("cpu" if isinstance(a, str) and a == "cuda" else a for a in args)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def test_the_script(tmp_path, monkeypatch):
    peers = tmp_path / "peers.csv"
    peers.write_text(
        "layer,H,I,E,k,dtype,routing,tokens,peer,us,note\n"
        "mixtral,1,1,1,1,bf16,uniform,1,slow,30,\n"
        'mixtral,1,1,1,1,bf16,uniform,1,"fast, good",20,\n'
        "mixtral,1,1,1,1,bf16,uniform,1,fastest,10,row-wise scales (other numerics)\n"
    )
    monkeypatch.setattr(bench_layer, "LAYERS", {"mixtral": bench_ops.Layer(H, F, E, K)})
    monkeypatch.setattr(bench_ops, "times", lambda calls, replays: [10.0 + i for i in range(5)])
    roofs = lambda: (4e6, 7e8)  # noqa: E731
    roofs.cache_clear = lambda: None
    monkeypatch.setattr(bench_layer, "roofs", roofs)
    words = ["--tokens", "1", "3", "--peers", str(peers), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench_layer.py", *words])
    with OnCpu():
        bench_layer.main()
    (path,) = (tmp_path / "out").glob("*_layer.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 2 * 3 * 2
    first = rows[0]
    assert (first["us"], first["low us"], first["high us"]) == ("12.0", "11.0", "13.0")
    assert (first["peer"], first["peer us"], first["ratio"]) == ("fast, good", "20.0", "1.667")
    assert rows[1]["peer"] == ""
    assert [r["in one op"] for r in rows[:2]] == ["True", "False"]
    assert str(tmp_path) not in path.read_text()
    assert list(dict.fromkeys(r["routing"] for r in rows)) == list(ROUTINGS)
