"""All-reduce, residual add and RMSNorm: the kernel's exchange, the op, and two GPUs together."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from ranks import Mesh, spawn
from torch.library import opcheck

from moe_compile.ops import moe
from moe_compile.ops._all_reduce_kernel import launch
from moe_compile.ops._symmetric_memory import Inbox
from moe_compile.ops.all_reduce_add_rms_norm import add_rms_norm_reference
from moe_compile.parallel import use_symmetric_memory

HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (3, 96), (2, 2), (5, 2048), (1, 7168)]


def given(shape, dtype, device, n=1):
    """What each of n ranks reduces, and the residual and the weight of all."""
    xs = [torch.randn(shape, device=device).to(dtype) for _ in range(n)]
    return xs, torch.randn(shape, device=device).to(dtype), torch.rand(shape[1:]).to(device, dtype)


def inboxes(n, rows, row_words, device):
    """Inboxes of n ranks on one device, as if each were on its own."""
    words = [torch.zeros(2, n, rows, row_words, dtype=torch.int64, device=device) for _ in range(n)]
    addresses = torch.tensor([w.data_ptr() for w in words], device=device)
    counts = [torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(n)]
    return [Inbox(r, words[r], addresses, counts[r]) for r in range(n)]


def assert_result(got, x, residual, weight, round_first=True):
    """`got`, x being the sum over ranks."""
    args = x, residual, weight, 1e-6, round_first
    if x.dtype == torch.bfloat16 and not x.is_cuda:  # Triton's interpreter cuts bits off
        want = add_rms_norm_reference(*args)
        torch.testing.assert_close(got, want, rtol=3 * 2**-7, atol=2**-6)
        return
    assert torch.equal(got[0], residual + x)
    assert_close(got, add_rms_norm_reference, *args)


def send(x, source, target, exchange):
    """Put what `source` sends in an exchange into the inbox of `target`."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    target.words[exchange & 1, source, : len(x), : bits.shape[1]] = (exchange << 32) | bits


@pytest.mark.parametrize("round_first", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_ranks_matches_reference(shape, dtype, round_first, device):
    (x,), residual, weight = given(shape, dtype, device)
    got = launch(x, residual, weight, 1e-6, round_first, None)
    assert_result(got, x, residual, weight, round_first)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_that_have_sent(n, shape, dtype, device):
    """Each rank finds what the others sent, sends its own, and gets the same bits."""
    every = inboxes(n, shape[0] + 1, shape[1] // 2 + 3, device)
    for exchange in 1, 2, 3:
        xs, residual, weight = given(shape, dtype, device, n)
        for target in every:
            for source in range(n):
                if source != target.rank:
                    send(xs[source], source, target, exchange)
        expected = [w.words.clone() for w in every]
        got = [launch(x, residual, weight, 1e-6, True, i) for x, i in zip(xs, every, strict=True)]
        for before, inbox in zip(expected, every, strict=True):
            assert torch.equal(inbox.words, before)  # what the kernels sent is what was put there
            assert inbox.exchanges.tolist() == [exchange] * shape[0] + [0]
        total = sum(x.float() for x in xs[1:]) + xs[0].float()
        for theirs in got[1:]:
            assert torch.equal(theirs[0], got[0][0])
            assert torch.equal(theirs[1], got[0][1])
        assert_result(got[0], total.to(dtype), residual, weight)


def test_exchanges_count_past_the_largest_number(device):
    """0 stands in memory that nobody wrote: the exchange after -1 is 2, in the other half."""
    mine, other = inboxes(2, 1, 4, device)
    (x, y), residual, weight = given((1, 8), torch.float16, device, 2)
    mine.exchanges.fill_(-1)
    send(y, 1, mine, 2)
    total, _ = launch(x, residual, weight, 1e-6, True, mine)
    assert torch.equal(total, residual + (x + y))
    assert mine.exchanges.tolist() == [2]
    assert (other.words[0, 0] >> 32 == 2).all()
    assert not other.words[1].any()


@pytest.mark.gpu
def test_a_peer_that_never_sends_ends_in_an_error():
    """In a process of its own, which the trap costs its CUDA context."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from moe_compile.ops import _all_reduce_kernel
from test_all_reduce_add_rms_norm import given, inboxes, launch
_all_reduce_kernel.MOST_LOOKS = 1000
(x, _), residual, weight = given((1, 64), torch.bfloat16, "cuda", 2)
launch(x, residual, weight, 1e-6, True, inboxes(2, 1, 32, "cuda")[0])
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2048), (7, 7168), (64, 2048)], ids=str)
def test_two_streams_talk(shape):
    """Two ranks on two streams of one GPU, captured, and replayed a thousand times."""
    every = inboxes(2, shape[0], shape[1] // 2, "cuda")
    xs, residual, weight = given(shape, torch.bfloat16, "cuda", 2)
    want = add_rms_norm_reference(xs[0] + xs[1], residual, weight, 1e-6)
    streams = [torch.cuda.Stream() for _ in every]
    graphs, results = [], []
    for x, inbox, stream in zip(xs, every, streams, strict=True):
        launch(x, residual, weight, 1e-6, True, None)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            for _ in range(3):
                result = launch(x, residual, weight, 1e-6, True, inbox)
            results.append(result)
    for _ in range(1000):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert [int(i.exchanges.min()) for i in every] == [3000, 3000]
    for total, normed in results:
        assert torch.equal(total, want[0])
        torch.testing.assert_close(normed, want[1])
    assert torch.equal(results[0][1], results[1][1])


@pytest.fixture
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def test_opcheck(mesh):
    args = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), 1e-6, mesh.all.group_name, True
    opcheck(
        moe.all_reduce_add_rms_norm.default, args, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": (2, 8)}, r"expected residual \[3, 8\] as x, got \[2, 8\]"),
        ({"residual": (8,)}, r"expected x and residual \[.., H\], got \[\[3, 8\], \[8\]\]"),
        ({"weight": (4,)}, r"expected weight \[8\], got \[4\]"),
        ({"weight": (1, 8)}, r"expected weight \[H\], got \[1, 8\]"),
    ],
)
def test_refused(mesh, change, message):
    shapes = {"x": (3, 8), "residual": (3, 8), "weight": (8,), **change}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"all_reduce_add_rms_norm: {message}"):
        moe.all_reduce_add_rms_norm(*tensors.values(), 1e-6, mesh.all.group_name, True)


def test_refused_dtypes_and_groups(mesh):
    x, weight, name = torch.randn(3, 8), torch.randn(8), mesh.all.group_name
    op = moe.all_reduce_add_rms_norm
    with pytest.raises(ValueError, match=r"expected residual in x's torch.float32, got .*bfloat16"):
        op(x, x.bfloat16(), weight, 1e-6, name, True)
    with pytest.raises(ValueError, match=r"expected weight in x's torch.bfloat16, got .*float32"):
        op(x.bfloat16(), x.bfloat16(), weight, 1e-6, name, True)
    with pytest.raises(ValueError, match=r"expected the name of a process group, got 'nobody'"):
        op(x, x, weight, 1e-6, "nobody", True)


def test_symmetric_memory_wants_gpus(mesh):
    with pytest.raises(ValueError, match=r"use_symmetric_memory: expected a group of GPUs"):
        use_symmetric_memory(64)


def by_gloo(rank, n, dtype):
    torch.manual_seed(0)
    xs, residual, weight = given((3, 64), dtype, "cpu", n)
    name = dist.group.WORLD.group_name
    got = moe.all_reduce_add_rms_norm(xs[rank], residual, weight, 1e-6, name, True)
    want = add_rms_norm_reference(xs[0] + xs[1], residual, weight, 1e-6)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_on_two_processes(dtype):
    spawn(by_gloo, 2, dtype, backend="gloo")


def on_gpus(rank, n):
    """Against NCCL and the reference, below and above the rows measured; then whole graphs."""
    most = use_symmetric_memory(2048, most_rows=64)
    everyone = [None] * n
    dist.all_gather_object(everyone, most)
    assert len(set(everyone)) == 1
    assert use_symmetric_memory(2048, most_rows=64) == most  # from the disk
    name = dist.group.WORLD.group_name
    for rows in 1, 3, 64, 65, 300:
        torch.manual_seed(rows)
        xs, residual, weight = given((rows, 2048), torch.bfloat16, "cuda", n)
        want = add_rms_norm_reference(sum(xs), residual, weight, 1e-6)
        for _ in range(20):
            got = moe.all_reduce_add_rms_norm(xs[rank], residual, weight, 1e-6, name, True)
        if n == 2:  # one rounding, whatever the order
            assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    replays(rank, n, name)


def replays(rank, n, name):
    torch.manual_seed(7)
    xs, residual, weight = given((4, 2048), torch.bfloat16, "cuda", n)
    want = add_rms_norm_reference(sum(xs), residual, weight, 1e-6)[0]
    graph = torch.cuda.CUDAGraph()
    moe.all_reduce_add_rms_norm(xs[rank], residual, weight, 1e-6, name, True)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(3):  # odd: halves alternate from one replay to the next
            total, _ = moe.all_reduce_add_rms_norm(xs[rank], residual, weight, 1e-6, name, True)
    for _ in range(500):
        total.zero_()
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(total, want, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus():
    spawn(on_gpus, 2)
