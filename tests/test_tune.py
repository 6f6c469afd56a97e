"""Measuring blocks: what is measured, on what, and who keeps it. A fake timer on a CPU."""

import functools
import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import assert_close
from triton.runtime.errors import OutOfResources

from moe_compile.ops import _candidates, _measured, _scratch, _tune, _tuned, moe
from moe_compile.ops._skinny_mm_kernel import Blocks
from moe_compile.ops._tune import Job
from moe_compile.ops._tuned import KERNELS, Asked, recording
from moe_compile.ops._tuned_kernels import SKINNY_MM
from moe_compile.ops.attend import attend_triton
from moe_compile.ops.experts import experts_triton
from moe_compile.ops.experts_fp8 import experts_fp8_triton
from moe_compile.ops.linear_fp8 import linear_fp8_triton
from moe_compile.ops.skinny_mm import skinny_mm_reference, skinny_mm_triton

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
ANALYTIC = Blocks(2, 128, False, 1, 4)
OTHERS = [Blocks(n, 128, False, 1, 4) for n in (4, 8, 16)]
JOB = Job("skinny_mm", (2, torch.float32, True), (96, 16), ANALYTIC)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path, request):
    """A cache of this test's own, and kernels that know nothing yet."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        pytest.skip("a fake timer, and kernels in the interpreter")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for kernel in KERNELS.values():
        kernel.forget()
    yield tmp_path / "moe_compile"
    for kernel in KERNELS.values():
        kernel.forget()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(_candidates, "skinny_mm", lambda kind, sizes, analytic: OTHERS)


def timer(**us):
    """A timer by the columns of a program: n2=1.0 and so on."""
    return lambda calls: us[f"n{calls[0].args[-1].n}"]


def test_the_fastest_is_taken(few):
    state = torch.get_rng_state()
    found = JOB.measured(CPU, timer(n2=10.0, n4=9.0, n8=7.0, n16=8.0))
    assert found == (*JOB[:3], OTHERS[1], 7.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_analytic_model_stays_where_little_is_gained(few):
    assert JOB.measured(CPU, timer(n2=10.0, n4=9.9, n8=12.0, n16=9.81)).blocks == ANALYTIC


def scratch_with(monkeypatch, change):
    """The launches of skinny_mm, with what they return changed by the blocks."""
    make = _scratch.skinny_mm

    def changed(call, blocks):
        return change(blocks, call(blocks))

    monkeypatch.setattr(
        _scratch, "skinny_mm", lambda *args: [functools.partial(changed, c) for c in make(*args)]
    )


@pytest.mark.parametrize("wrong", [lambda y: y * 1.1, lambda y: y * float("nan")])
def test_what_computes_something_else_is_left_out(wrong, few, monkeypatch, caplog):
    scratch_with(monkeypatch, lambda b, ys: [wrong(y) for y in ys] if b.n == 8 else ys)
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        found = JOB.measured(CPU, timer(n2=10.0, n4=9.0, n8=7.0, n16=8.0))
    assert found.blocks == OTHERS[2]
    assert "computes something else with Blocks(n=8" in caplog.text


def fail(error):
    raise error


ERRORS = [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")]


@pytest.mark.parametrize("error", ERRORS, ids=["triton", "compiler"])
def test_what_does_not_run_is_left_out(error, few, monkeypatch):
    scratch_with(monkeypatch, lambda b, ys: fail(error) if b.n == 8 else ys)
    assert JOB.measured(CPU, timer(n2=10.0, n4=9.0, n16=8.0)).blocks == OTHERS[2]


def test_without_memory_there_is_no_measurement(few, monkeypatch, caplog):
    scratch_with(monkeypatch, lambda b, ys: fail(torch.OutOfMemoryError("no memory")))
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        assert JOB.measured(CPU, timer()) is None
    assert "left" in caplog.text
    _tune.keep([None], CPU)
    assert SKINNY_MM.table("cpu") == {}


def test_never_while_a_graph_is_recorded(few, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^tune: expected no CUDA graph being recorded"):
        JOB.measured(CPU, timer())


def test_what_was_measured_is_not_again_and_launches_take_it(few):
    x, w = torch.randn(2, 96), torch.randn(16, 96).t()
    with recording() as asked:
        skinny_mm_triton(x, w)
        skinny_mm_triton(x, w)
    (job,) = _tune.jobs(asked, CPU)
    assert job == JOB
    _tune.keep([job.measured(CPU, timer(n2=10.0, n4=9.0, n8=7.0, n16=8.0))], CPU)
    assert _tune.jobs(asked, CPU) == []
    SKINNY_MM.forget()  # as a later process
    assert SKINNY_MM.chosen(CPU, job.kind, job.sizes, lambda: ANALYTIC) == OTHERS[1]
    assert_close(skinny_mm_triton(x, w), skinny_mm_reference, x, w)


def launch_skinny():
    x, w = torch.randn(2, 64, dtype=torch.bfloat16), torch.randn(24, 64, dtype=torch.bfloat16)
    skinny_mm_triton(x, w.t())
    skinny_mm_triton(x, w.t().contiguous())


def launch_attend():
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 40, 32)
    attend_triton(q, k, k)
    attend_triton(q, k, k, last=torch.tensor([30]))
    attend_triton(q, k, k, torch.ones(1, 1, 1, 40, dtype=torch.bool))
    attend_triton(q, k, k, torch.zeros(1, 4, 1, 40))
    attend_triton(q, k, None, q_rot=q[..., :16], k_rot=k[..., :16])


def launch_experts(T, columns=False):
    E, H, F, K = 8, 16, 8, 2
    up, down = torch.randn(E, 2 * F, H).mT, torch.randn(E, H, F).mT
    if columns:
        up, down = up.contiguous(), down.contiguous()
    weights, ids = torch.rand(T, E).topk(K)
    experts_triton(torch.randn(T, H), ids, weights, up, down)


def launch_experts_fp8(T):
    E, H, F, K = 16, 128, 128, 2
    up, down = torch.randn(E, 2 * F, H).to(FP8).mT, torch.randn(E, H, F).to(FP8).mT
    scales = torch.ones(E, 2, 1).mT, torch.ones(E, 1, 1).mT
    weights, ids = torch.rand(T, E).topk(K)
    x = moe.quant_fp8(torch.randn(T, H, dtype=torch.bfloat16))
    experts_fp8_triton(*x, ids, weights, up, scales[0], down, scales[1])


def launch_linear_fp8():
    x = moe.quant_fp8(torch.randn(3, 128, dtype=torch.bfloat16))
    linear_fp8_triton(*x, torch.randn(128, 128).to(FP8), torch.ones(1, 1))


LAUNCHES = {  # and the kernels that they ask for
    "skinny_mm": (launch_skinny, ["skinny_mm"] * 2),
    "attend": (launch_attend, ["attend"] * 5),
    "few experts": (lambda: launch_experts(1), ["experts_down", "experts_up"]),
    "few experts, columns": (
        lambda: launch_experts(1, columns=True),
        ["experts_down_columns", "experts_up_columns"],
    ),
    "more experts": (lambda: launch_experts(3), ["grouped_mm"] * 2),
    "few experts, float8": (lambda: launch_experts_fp8(1), ["experts_down", "experts_up_fp8"]),
    "linear, float8": (launch_linear_fp8, ["grouped_mm_fp8"]),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_scratch_asks_what_the_launch_asked(name):
    """So what is measured is what is looked up."""
    launch, kernels = LAUNCHES[name]
    with torch.inference_mode(), recording() as asked:
        launch()
    assert sorted(one.kernel.name for one in asked) == kernels
    for one, analytic in asked.items():
        is_up = one.kernel.name in ("experts_up", "experts_up_fp8")
        with torch.inference_mode(), recording() as again:
            (call,) = getattr(_scratch, one.kernel.name)(one.kind, one.sizes, CPU)
            # Without blocks the launch chooses; where each row is a tile its caller did.
            y = call(analytic if is_up else None)
        assert again == ({} if is_up else {one: analytic})
        assert all(part.isfinite().all() for part in (y if isinstance(y, list) else [y]))


CASES = {  # kind, sizes
    "skinny_mm": [
        *(((rows, dt, nk), (2048, 4096, 512, 512)) for rows in (1, 2, 4) for dt in (torch.float32,)
          for nk in (True, False)),
        *(((rows, torch.bfloat16, nk), (2048, 128)) for rows in (1, 4, 16) for nk in (True, False)),
    ],
    "attend": [((A, 1, D, D, 64, torch.bfloat16, "last"), (h, S)) for A, D in ((8, 128), (128, 512))
               for h in (1, 4, 512) for S in (1, 40, 4096)],
    "experts_up": [((torch.bfloat16, False, 8), (8, 2048, 1536))],
    "experts_up_columns": [((torch.bfloat16, True, 4), (4, 2880, 5760))],
    "experts_up_fp8": [((torch.bfloat16, 128, 8), (8, 2048, 1536))],
    "experts_down_columns": [((torch.bfloat16, K), (1, 2880, 2880)) for K in (1, 4, 6)],
    "experts_down": [((torch.bfloat16, fp8, 8), (1, 768, 2048)) for fp8 in (True, False)],
    "grouped_mm": [((torch.bfloat16, layout, 0, 8), (R, 128, 2048, 1536))
                   for layout in (True, False) for R in (1, 128, 1024, 8192, 65536)],
    "grouped_mm_fp8": [((torch.bfloat16, 128, False, 0, False), (R, 128, 768, 2048))
                       for R in (1, 128, 1024, 8192, 2**20)],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_candidates(name):
    """There are some, none twice, all of powers of two, and with what the kernels need."""
    analytic = _candidates.AttendBlocks(16, 64, 4, 4, 2)
    for kind, sizes in CASES[name]:
        found = getattr(_candidates, name)(kind, sizes, analytic)
        assert len(found) == len(set(found))
        assert 1 <= len(found) < 60
        for blocks in found:
            assert blocks.warps in (1, 2, 4, 8)
            assert 1 <= blocks.stages <= 8
            if name == "skinny_mm":
                assert blocks.dot or kind[0] <= 4
                assert not (blocks.dot and kind[1] == torch.float32)  # it would be TF32
                assert (blocks.n & (blocks.n - 1), blocks.k & (blocks.k - 1)) == (0, 0)
            elif name == "attend":
                assert blocks.rows == analytic.rows or kind[3] > 256
                assert KERNELS[name].takes(sizes, blocks)
            elif name == "experts_up":  # each row is a tile
                assert blocks.m == 1
            elif name == "experts_down":
                assert not kind[1] or (blocks.f % 128, 128 % blocks.o) == (0, 0)
            elif "fp8" in name:  # a tile's features have one scale
                assert 128 % blocks.n == 0
                assert blocks.m == 1 or blocks.m >= 16


def test_every_kernel_has_candidates_and_scratch():
    assert set(CASES) == set(KERNELS)
    for name in KERNELS:
        assert callable(getattr(_candidates, name))
        assert callable(getattr(_scratch, name))


class Ranks:
    """torch.distributed as one rank of two sees it; the other says what the test says."""

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return 2

    def all_gather_object(self, values, value):
        values[self.rank], values[1 - self.rank] = value, self.other(value)


@pytest.fixture
def as_rank(monkeypatch):
    def be(rank, other):
        for module in _tune, _tuned:
            monkeypatch.setattr(module, "is_one_of_several", lambda: True)
        monkeypatch.setattr(_tune, "dist", Ranks(rank, other))

    return be


def test_ranks_know_what_the_first_one_does(as_rank, folder):
    SKINNY_MM.keep("cpu", *JOB[1:3], OTHERS[0], 1.0)
    known = {(repr(JOB.kind), JOB.sizes): tuple(OTHERS[1])}
    SKINNY_MM.forget()
    as_rank(1, lambda _: {"skinny_mm": known, "attend": {}})
    chosen = functools.partial(SKINNY_MM.chosen, CPU, JOB.kind, JOB.sizes, lambda: ANALYTIC)
    assert chosen() == ANALYTIC  # not what is on this rank's disk
    _tune.share(CPU)
    assert chosen() == OTHERS[1]
    SKINNY_MM.forget()
    as_rank(0, lambda _: {})
    _tune.share(CPU)
    assert chosen() == OTHERS[0]


def test_ranks_share_the_work_and_what_they_find(as_rank, folder):
    kinds = [(rows, torch.float32, True) for rows in (1, 2, 3, 4)]
    asked = {Asked(SKINNY_MM, CPU, kind, (96, 16)): ANALYTIC for kind in kinds[:3]}
    theirs = [Job("skinny_mm", kind, (96, 16), ANALYTIC) for kind in kinds[1:]]
    work = []
    for rank in 0, 1:
        as_rank(rank, lambda _: theirs)
        work.append(_tune.jobs(asked, CPU))
    assert sorted((job.kind for jobs in work for job in jobs), key=repr) == kinds
    assert [len(jobs) for jobs in work] == [2, 2]
    first, second = ([_tune.Measured(*job[:3], OTHERS[0], 1.0) for job in jobs] for jobs in work)
    as_rank(1, lambda _: first)
    _tune.keep(second, CPU)
    assert not list(folder.rglob("*.json"))  # the first one writes
    assert len(SKINNY_MM.table("cpu")) == 4
    SKINNY_MM.forget()
    as_rank(0, lambda _: second)
    _tune.keep(first, CPU)
    assert len(SKINNY_MM.table("cpu")) == 4
    assert len(list(folder.rglob("*.json"))) == 4


def test_nothing_is_written_unasked(monkeypatch):
    monkeypatch.setattr(_measured, "save", lambda *_: fail(AssertionError("written")))
    launch_skinny()


ANOTHER_PROCESS = """
    import torch
    from moe_compile.ops import _tuned, _measured
    from moe_compile.ops._tuned_kernels import ATTEND, SKINNY_MM
    family = _tuned.family_of(torch.device("cuda", 0))
    for kernel in SKINNY_MM, ATTEND:
        for (kind, sizes), blocks in kernel.table(family).items():
            print(kernel.name, kind, sizes, blocks)
"""


@pytest.mark.gpu
def test_on_a_gpu(folder, device):
    x = torch.randn(1, 512, device=device, dtype=torch.bfloat16)
    w = torch.randn(256, 512, device=device, dtype=torch.bfloat16).t()
    q, k, v = (
        torch.randn(1, a, s, 64, device=device).half() for a, s in ((8, 1), (2, 70), (2, 70))
    )
    gpu = torch.device("cuda", torch.cuda.current_device())
    with recording() as asked:
        want = skinny_mm_triton(x, w), attend_triton(q, k, v)
    jobs = _tune.jobs(asked, gpu)
    assert [job.name for job in jobs] == ["attend", "skinny_mm"]
    found = [job.measured(gpu) for job in jobs]
    assert all(0 < one.us < 1000 for one in found)
    _tune.keep(found, gpu)
    assert len(list(folder.rglob("*.json"))) == 2
    for kernel in KERNELS.values():
        kernel.forget()
    with recording() as asked:
        got = skinny_mm_triton(x, w), attend_triton(q, k, v)
    assert all(one.is_measured() for one in asked)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    code, env = textwrap.dedent(ANOTHER_PROCESS), {**os.environ}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["skinny_mm", "attend"], out.stderr
    for one, line in zip(reversed(found), lines, strict=True):
        assert line.endswith(f"{one.kind!r} {one.sizes} {tuple(one.blocks)}")


@pytest.mark.gpu
def test_a_recorded_graph_is_never_measured_in(device):
    graph, gpu = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(4, device=device)
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(RuntimeError, match=r"^tune: expected no CUDA graph"):
            JOB.measured(gpu)
    graph.replay()
