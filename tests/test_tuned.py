"""Blocks that were measured: which of them a launch takes, and what is kept on disk."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import assert_close

from moe_compile.ops import _measured, _skinny_mm_kernel, _tuned
from moe_compile.ops._attend_blocks import Blocks as AttendBlocks
from moe_compile.ops._skinny_mm_kernel import Blocks
from moe_compile.ops._tuned import KERNELS, Asked, Tuned, family_of, recording
from moe_compile.ops._tuned_kernels import ATTEND, SKINNY_MM
from moe_compile.ops.skinny_mm import skinny_mm_reference, skinny_mm_triton

CPU = torch.device("cpu")
KIND = (torch.bfloat16, True)


class Pair(NamedTuple):
    n: int
    dot: bool


ANALYTIC = Pair(1, False)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A cache of this test's own, and kernels that know nothing yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for kernel in KERNELS.values():
        kernel.forget()
    yield tmp_path / "moe_compile"
    for kernel in KERNELS.values():
        kernel.forget()


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_tuned, "KERNELS", {})
    return Tuned("mine", "_skinny_mm_kernel.py", lambda sizes, blocks: sizes[0] % blocks.n == 0)


def chosen(kernel, *sizes, kind=KIND):
    return kernel.chosen(CPU, kind, sizes, lambda: ANALYTIC)


def test_the_analytic_model_where_nothing_was_measured(kernel, monkeypatch):
    loads, asked = [], []
    load = _measured.load
    monkeypatch.setattr(_measured, "load", lambda family: loads.append(family) or load(family))
    for size in 64, 128, 64, 64:
        got = kernel.chosen(CPU, KIND, (size,), lambda n: asked.append(n) or Pair(n, True), size)
        assert got == (size, True)
    assert asked == [64, 128]
    assert len(loads) == 1


def test_the_nearest_within_a_factor_of_two_of_each_size(kernel):
    for sizes, blocks in {(64, 64): (2, True), (128, 64): (4, False), (64, 512): (8, True)}.items():
        kernel.keep("cpu", KIND, sizes, blocks, 1.0)
    assert chosen(kernel, 64, 64) == Pair(2, True)
    assert chosen(kernel, 128, 64) == (4, False)
    assert chosen(kernel, 80, 64) == (2, True)
    assert chosen(kernel, 120, 40) == (4, False)
    assert chosen(kernel, 64, 128) == (2, True)
    assert chosen(kernel, 32, 32) == (2, True)
    assert chosen(kernel, 64, 256) == (8, True)
    assert type(chosen(kernel, 80, 64)) is Pair
    assert chosen(kernel, 80, 64).dot is True
    for far in (300, 64), (64, 1030), (31, 64), (64, 0), (64,), (64, 64, 64):
        assert chosen(kernel, *far) == ANALYTIC
    assert chosen(kernel, 64, 64, kind=(torch.float16, True)) == ANALYTIC


def test_the_nearest_that_serves_these_sizes(kernel):
    kernel.keep("cpu", KIND, (70, 1), (7, True), 1.0)
    kernel.keep("cpu", KIND, (100, 1), (5, True), 1.0)
    assert chosen(kernel, 70, 1) == (7, True)
    assert chosen(kernel, 75, 1) == (5, True)
    assert chosen(kernel, 77, 1) == (7, True)
    assert chosen(kernel, 71, 1) == ANALYTIC
    # Blocks are only asked about other sizes: measured for these they were measured to run.
    kernel.keep("cpu", KIND, (71, 1), (5, True), 1.0)
    assert chosen(kernel, 71, 1) == (5, True)


def test_attend_has_no_more_splits_than_blocks_of_positions():
    kind, analytic = (1, 1, 64, 64, 0, torch.bfloat16, "last"), AttendBlocks(16, 64, 1, 4, 2)
    measured = AttendBlocks(16, 32, 20, 4, 2)
    ATTEND.keep("cpu", kind, (4, 640), measured, 1.0)
    for S, blocks in (640, measured), (1000, measured), (609, measured), (608, analytic):
        assert ATTEND.chosen(CPU, kind, (4, S), lambda: analytic) == blocks


def test_another_process_finds_it(kernel, monkeypatch):
    kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    kernel.forget()
    assert chosen(kernel, 64) == (2, True)
    for name, value in ("_hash_of", lambda source: "edited"), ("triton", _Versioned):
        with monkeypatch.context() as patch:
            patch.setattr(_tuned, name, value)
            kernel.forget()
            assert chosen(kernel, 64) == ANALYTIC
    kernel.forget()
    assert chosen(kernel, 64) == (2, True)


class _Versioned:
    __version__ = "99"


def test_other_devices_do_not(kernel):
    kernel.keep("NVIDIA H200, 132 SMs", KIND, (64,), (2, True), 1.0)
    assert chosen(kernel, 64) == ANALYTIC
    assert family_of(CPU) == "cpu"


def test_a_changed_source_is_another(tmp_path, monkeypatch):
    hashes = {_tuned._hash_of.__wrapped__(k.source) for k in KERNELS.values()}
    assert len(hashes) == len({k.source for k in KERNELS.values()})
    source = tmp_path / "kernel.py"
    source.write_text("a = 1")
    before = _tuned._hash_of.__wrapped__(source)
    source.write_text("a = 2")
    assert _tuned._hash_of.__wrapped__(source) != before


def test_processes_at_once_lose_nothing(kernel, folder):
    kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    kernel._tables = {"cpu": {}}  # as of one that had read before
    kernel.keep("cpu", KIND, (128,), (4, True), 1.0)
    assert set(kernel.read("cpu")) == {(repr(KIND), (64,)), (repr(KIND), (128,))}
    assert {path.suffix for path in folder.rglob("*.*")} == {".json"}


BROKEN = [
    "",
    "{",
    "[]",
    '{"family": 1}',
    lambda kept: {**kept, "value": {"blocks": None}},
    lambda kept: {**kept, "value": {"blocks": [2.5, True]}},
    lambda kept: {**kept, "value": []},
    lambda kept: {**kept, "key": "?"},
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_left_out(broken, kernel, folder, caplog):
    kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    (path,) = folder.rglob("*.json")
    kept = json.loads(path.read_text())
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken(kept)))
    kernel._tables = {"cpu": {}}
    kernel.keep("cpu", KIND, (512,), (4, True), 1.0)
    kernel.forget()
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        assert chosen(kernel, 64) == ANALYTIC
        assert chosen(kernel, 512) == (4, True)
    warned = [record for record in caplog.records if "ignored" in record.getMessage()]
    assert len(warned) == (0 if broken == '{"family": 1}' else 1)


def test_a_disk_that_takes_nothing(kernel, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(_measured, "cache_dir", lambda: str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    assert "kept nothing" in caplog.text
    assert chosen(kernel, 64) == (2, True)


def test_a_rank_reads_nothing_by_itself(kernel, monkeypatch):
    kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    kernel.forget()
    monkeypatch.setattr(_tuned, "is_one_of_several", lambda: True)
    assert chosen(kernel, 64) == ANALYTIC
    kernel.replace("cpu", kernel.read("cpu"))
    assert chosen(kernel, 64) == (2, True)


def test_choices_do_not_grow_without_bound(kernel, monkeypatch):
    monkeypatch.setattr(_tuned, "_MOST_CHOSEN", 8)
    for size in range(1, 100):
        chosen(kernel, size)
    assert len(kernel._chosen) <= 8


def test_recording_sees_what_was_chosen_before(kernel, monkeypatch):
    monkeypatch.setattr(_tuned, "KERNELS", {"mine": kernel})
    kernel.keep("cpu", KIND, (64,), (2, True), 1.0)
    chosen(kernel, 64)
    with recording() as asked:
        for size in 64, 512, 512:
            chosen(kernel, size)
    chosen(kernel, 1024)
    assert asked == {Asked(kernel, CPU, KIND, (s,)): ANALYTIC for s in (64, 512)}
    assert [one.is_measured() for one in asked] == [True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel in the interpreter")
def test_a_launch_takes_them(monkeypatch):
    launched = []
    kernel = _skinny_mm_kernel.skinny_mm_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **how: launched.append(how) or kernel[grid](*args, **how)

    monkeypatch.setattr(_skinny_mm_kernel, "skinny_mm_kernel", Spy())
    x, w = torch.randn(2, 96), torch.randn(40, 96).t()
    SKINNY_MM.keep("cpu", (2, torch.float32, True), (96, 40), Blocks(8, 128, False, 1, 2), 1.0)
    for columns in 40, 24, 10:  # measured, near, too few
        assert_close(skinny_mm_triton(x, w[:, :columns]), skinny_mm_reference, x, w[:, :columns])
    found = [(how["BLOCK_N"], how["BLOCK_K"], how["num_warps"]) for how in launched]
    assert found[:2] == [(8, 128, 1)] * 2
    assert found[2] != (8, 128, 1)


def test_sources_exist():
    for kernel in KERNELS.values():
        assert (Path(_tuned.__file__).parent / kernel.source).exists()
