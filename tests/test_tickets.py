"""The last program of a launch, and who counts with what."""

import pytest
import torch
import triton
import triton.language as tl

from moe_compile.ops import _tickets
from moe_compile.ops._tickets import MOST, is_last, tickets


@triton.jit
def sum_kernel(x_ptr, parts_ptr, out_ptr, ticket_ptr, programs, BLOCK: tl.constexpr):
    """Each program leaves the sum of its block; the last adds them up."""
    row, part = tl.program_id(0), tl.program_id(1)
    x = tl.load(x_ptr + (row * programs + part) * BLOCK + tl.arange(0, BLOCK))
    tl.store(parts_ptr + row * programs + part, tl.sum(x))
    if is_last(ticket_ptr + row, programs):
        total = tl.zeros([], tl.int64)
        for i in range(programs):
            total += tl.load(parts_ptr + row * programs + i, cache_modifier=".cg")
        tl.store(out_ptr + row, total)


def row_sums(x, programs, block):
    parts, out = (torch.empty(*shape, dtype=torch.int64, device=x.device)
                  for shape in ((len(x), programs), (len(x),)))  # fmt: skip
    zeros = tickets(x, len(x))
    sum_kernel[(len(x), programs)](x, parts, out, zeros, programs, BLOCK=block)
    return out, zeros


def numbers(rows, columns, device):
    return torch.randint(-9, 9, (rows, columns), device=device)


def test_the_last_program_sees_all_and_leaves_zeros(device):
    x = numbers(3, 5 * 16, device)
    for _ in range(2):
        out, zeros = row_sums(x, 5, 16)
        assert torch.equal(out, x.sum(1))
        assert not zeros.any()


@pytest.mark.gpu
def test_many_programs_many_times(device):
    x = numbers(64, 100 * 128, device)
    for _ in range(200):
        out, zeros = row_sums(x, 100, 128)
        assert torch.equal(out, x.sum(1))
    assert not zeros.any()


@pytest.mark.gpu
def test_streams_count_apart(device):
    """Launches of several streams at once, and replays of two graphs beside them."""
    xs = [numbers(16, 400 * 128, device) for _ in range(4)]
    row_sums(xs[0], 400, 128)
    graphs, outs = [], []
    for x in xs[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(row_sums(x, 400, 128)[0])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(100):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for x, stream in zip(xs[2:], streams[2:], strict=True):
            with torch.cuda.stream(stream):
                outs.append(row_sums(x, 400, 128)[0])
    torch.cuda.synchronize()
    for i, out in enumerate(outs):
        assert torch.equal(out, xs[i if i < 2 else 2 + i % 2].sum(1))


@pytest.mark.gpu
def test_each_captured_launch_has_its_own(monkeypatch, device):
    monkeypatch.setattr(_tickets, "_COUNTERS", {})
    x = torch.empty(1, device=device)

    def captured(*counts):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.zero_()
            return [tickets(x, count) for count in counts]

    assert captured(1) == [None]  # nothing was there before
    outside = tickets(x, 8)
    assert tickets(x, 8).data_ptr() == outside.data_ptr()
    a, b, c = *captured(8, 8), *captured(8)
    places = {t.data_ptr() for t in (a, b, c, outside)}
    assert len(places) == 4
    assert all(len(t) == 8 for t in (a, b, c))
    assert tickets(x, MOST + 1) is None
    assert captured(_tickets._CAPTURED) == [None]  # not enough
    monkeypatch.setattr(_tickets, "_CAPTURED", 32)
    tickets(x, 8)  # more than half are given: there is room again
    assert captured(32)[0] is not None
