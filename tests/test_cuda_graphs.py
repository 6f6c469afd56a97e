"""cuda_graphs: batches, padding and addresses without a GPU; recording and long runs on one."""

import gc
import importlib
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_compile
from moe_compile._graph_inputs import Addresses, Inputs
from moe_compile.ops import moe

E, K, H, F = 16, 2, 64, 32
SIZES = (1, 2, 4, 8, 16)
DTYPES = [torch.float32, torch.bfloat16]
MODULE = importlib.import_module("moe_compile.cuda_graphs")  # the name is that of the class, too
DOCS = Path(__file__).parents[1] / "docs" / "cuda_graphs.md"


class Replay:
    """In place of a torch.cuda.CUDAGraph: calls, and writes where the recorded call wrote."""

    def __init__(self, call, out):
        self.call, self.out, self.count = call, out, 0

    def replay(self):
        self.count += 1
        pairs = zip(MODULE._as_tuple(self.out), MODULE._as_tuple(self.call()), strict=True)
        for old, new in pairs:
            old.copy_(new)


@pytest.fixture
def no_gpu(monkeypatch):
    """Replays are calls: all else is as it is on a GPU."""

    @torch.no_grad()
    def record_all(calls, warmups, device):
        outs = {size: call() for size, call in calls.items()}
        for size, out in outs.items():
            MODULE._check_outputs(out, size)
        return {size: (Replay(calls[size], out), out) for size, out in outs.items()}

    monkeypatch.setattr(MODULE, "_record_all", record_all)
    monkeypatch.setattr(MODULE, "_cuda_device", lambda examples: examples[0].device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def counts(step):
    return {size: graph.count for size, (graph, _) in step._graphs.items()}


def test_the_smallest_graph_that_fits(no_gpu):
    step = moe_compile.cuda_graphs(lambda x: x + 1, torch.zeros(1, 3), batch_sizes=(8, 2, 4, 2))
    assert step.batch_sizes == [2, 4, 8]
    for batch in range(1, 9):
        x = torch.randn(batch, 3)
        assert torch.equal(step(x), x + 1)
    assert counts(step) == {2: 2, 4: 2, 8: 4}


def test_padding_is_whole_in_any_order_of_batches(no_gpu):
    seen = []

    def fn(x, ids):
        seen.append((x.clone(), ids.clone()))
        return x, ids

    example = torch.ones(2, 3), torch.zeros(2, K, dtype=torch.int64)
    step = moe_compile.cuda_graphs(fn, example, batch_sizes=SIZES, pad=(0.5, -1))
    for _ in range(200):
        batch = random.Random(len(seen)).randint(1, 16)
        x, ids = torch.randn(batch, 3), torch.randint(0, E, (batch, K))
        out = step(x, ids)
        assert isinstance(out, tuple)
        assert torch.equal(out[0], x)
        assert torch.equal(out[1], ids)
        assert len(seen[-1][0]) == next(size for size in SIZES if size >= batch)
        assert (seen[-1][0][batch:] == 0.5).all()
        assert (seen[-1][1][batch:] == -1).all()


def test_padding_is_written_only_where_a_batch_was():
    inputs = Inputs([torch.ones(1, 2)], (8,), 7)
    inputs.load([torch.ones(3, 2)])
    (rows,) = inputs.rows(8)
    assert torch.equal(rows[3:], torch.full((5, 2), 7.0))
    rows[5] = 1
    inputs.load([torch.ones(3, 2)])
    inputs.load([torch.ones(4, 2)])
    assert (rows[5] == 1).all()  # nothing was written there again
    inputs.load([torch.ones(2, 2)])
    assert (rows[2:4] == 7).all()
    assert (rows[5] == 1).all()


def test_recording_runs_on_rows_of_the_example(no_gpu):
    seen = []
    fn = lambda x: seen.append(x.tolist()) or x  # noqa: E731
    moe_compile.cuda_graphs(fn, torch.tensor([5, 6]), batch_sizes=(1, 3))
    assert seen == [[5, 6, 5], [5]]  # the largest first


def test_outputs_are_the_graphs_or_with_copy_the_callers(no_gpu):
    one, two = torch.ones(2, 1), torch.full((2, 1), 2.0)
    for copy, after in (False, two), (True, one):
        step = moe_compile.cuda_graphs(lambda x: x * 1, one, batch_sizes=(2,), copy=copy)
        out = step(one)
        step(two)
        assert torch.equal(out, after)


def test_fixed_arguments(no_gpu):
    cache = torch.zeros(4, 2)
    fn = lambda x, cache, scale: cache.index_add_(0, x, torch.ones(len(x), 2))[x] * scale  # noqa: E731
    rows, fixed = torch.tensor([3]), {"cache": cache, "scale": 2}
    step = moe_compile.cuda_graphs(fn, rows, batch_sizes=(2,), fixed=fixed, pad=3)
    cache.zero_()  # as the docs say, what the warm-ups wrote
    assert step(torch.tensor([1])).tolist() == [[2, 2]]
    assert cache.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]  # row 3 is where padding leads


@pytest.mark.parametrize("recorded_in", [False, True])
def test_inference_mode_of_recording_and_calls(recorded_in, no_gpu):
    with torch.inference_mode(recorded_in):
        step = moe_compile.cuda_graphs(nn.Linear(3, 3), torch.randn(1, 3))
    for called_in in (False, True, False):
        with torch.inference_mode(called_in):
            x = torch.randn(3, 3)
            if recorded_in and not called_in:
                continue  # the stand-in writes outputs itself, which a graph does not
            assert not step(x).requires_grad


def test_no_gradients(no_gpu):
    step = moe_compile.cuda_graphs(nn.Linear(3, 3), torch.randn(1, 3, requires_grad=True))
    assert not step(torch.randn(2, 3, requires_grad=True)).requires_grad
    assert not step._inputs.rows(1)[0].requires_grad


X = torch.zeros(2, 3)
AT_RECORDING = {
    r"1 or more warmups.*, got 0": (X, {"warmups": 0}),
    r"batch_sizes from 1 on, got \[\]": (X, {"batch_sizes": ()}),
    r"batch_sizes from 1 on, got \[0, 2\]": (X, {"batch_sizes": (2, 0)}),
    r"an example of tensors \[B, ...\], got nothing": ((), {}),
    r"an example of tensors \[B, ...\], got \[0, 3\] torch.float32 on cpu": (X[:0], {}),
    r"an example of tensors \[B, ...\], got \[2, 3\] .*, int": ((X, 1), {}),
    r"an example of tensors \[B, ...\], got \[\] torch.int64": (torch.tensor(1), {}),
    r"2 pads, got \[1\]": ((X, X), {"pad": (1,)}),
    r"an example on one CUDA device, got cpu": (X, {}),
}


@pytest.mark.parametrize("message", AT_RECORDING)
def test_errors_at_recording(message):
    example, options = AT_RECORDING[message]
    with pytest.raises(ValueError, match=f"^cuda_graphs: expected {message}"):
        moe_compile.cuda_graphs(lambda *x: x, example, **options)


AT_CALLS = {
    r"1 to 4 rows, got 5": torch.zeros(5, 3),
    r"1 to 4 rows, got 0": X[:0],
    r"input 0 to be \[2, 3\] torch.float32 on cpu, got \[2, 3\] torch.float64 on cpu": X.double(),
    r"input 0 to be \[2, 3\] torch.float32 on cpu, got \[2, 4\] torch.float32": torch.zeros(2, 4),
    r"input 0 to be .* on cpu, got \[2, 3\] torch.float32 on meta": X.to("meta"),
    r"1 tensors, got list": [1],
}


@pytest.mark.parametrize("message", AT_CALLS)
def test_errors_at_calls(message, no_gpu):
    step = moe_compile.cuda_graphs(lambda x: x + 1, X, batch_sizes=(4,))
    with pytest.raises(ValueError, match=f"^cuda_graphs: expected {message}"):
        step(AT_CALLS[message])
    assert torch.equal(step(X), X + 1)


def test_inputs_of_different_batches_and_numbers(no_gpu):
    step = moe_compile.cuda_graphs(lambda x, y: x + y, (X, X))
    with pytest.raises(ValueError, match=r"input 1 to be \[2, 3\] .*, got \[1, 3\]"):
        step(X, X[:1])
    with pytest.raises(ValueError, match=r"expected 2 tensors, got \[2, 3\] torch.float32 on cpu$"):
        step(X)


@pytest.mark.parametrize("out", [None, X[:1], [X], (X, 1), torch.tensor(1), ()])
def test_outputs_without_the_batch_first(out, no_gpu):
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected fn to return tensors \[2, ...\]"):
        moe_compile.cuda_graphs(lambda x: out, X, batch_sizes=(2,))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("missing", None)

    def forward(self, x):
        return self.inner(x) + self.shift

    def decode(self, x):
        return self(x)


def assign(module, name, value):
    setattr(module, name, value)


MOVES = {
    "inner.weight": lambda net: assign(net.inner.weight, "data", torch.randn(3, 3)),
    "inner.bias": lambda net: assign(net.inner, "bias", nn.Parameter(torch.randn(3))),
    "shift": lambda net: assign(net, "shift", torch.ones(3)),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_has_moved_is_named(name, no_gpu):
    net = Net()
    step = moe_compile.cuda_graphs(net, X)
    unchecked = moe_compile.cuda_graphs(net, X, check=False)
    kept = [p.data for p in net.parameters()]  # else the new memory might be the old
    with torch.no_grad():
        net.inner.weight.add_(1)
        net.load_state_dict(net.state_dict())
    torch.testing.assert_close(step(X), net(X))
    MOVES[name](net)
    message = f"cuda_graphs: expected {name} where it lay .*, got another address"
    with pytest.raises(RuntimeError, match=message):
        step(X)
    unchecked(X)
    del kept


def test_what_is_gone_is_named(no_gpu):
    net = Net()
    step = moe_compile.cuda_graphs(net, X)
    net.inner.bias = None
    with pytest.raises(RuntimeError, match=r"expected inner.bias where .*, got no tensor"):
        step(X)
    del net.inner.weight
    with pytest.raises(RuntimeError, match=r"expected inner.weight where .*, got no tensor"):
        step(X)


def test_fixed_tensors_that_have_moved(no_gpu):
    caches = [torch.zeros(3), torch.ones(3)]
    fn = lambda x, caches: x + caches[1]  # noqa: E731
    step = moe_compile.cuda_graphs(fn, X, fixed={"caches": caches})
    step(X)
    caches[1].data = torch.full((3,), 2.0)
    with pytest.raises(RuntimeError, match="expected fixed tensor 1 where it lay"):
        step(X)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: (net, ()),
        lambda net: (net.decode, ()),
        lambda net: (torch.compile(net, backend="eager"), ()),
        lambda net: (torch.compile(net.decode, backend="eager"), ()),
        lambda net: (lambda x: net(x), net),
        lambda net: (lambda x: net(x), [net]),
    ],
)
def test_modules_whose_addresses_count(wrap, no_gpu):
    net = Net()
    fn, modules = wrap(net)
    step = moe_compile.cuda_graphs(fn, X, batch_sizes=(2,), modules=modules)
    torch.testing.assert_close(step(X), net(X))
    net.double()
    with pytest.raises(RuntimeError, match=r"expected (_orig_mod.)?(inner|shift).* where it lay"):
        step(X)


def test_a_call_while_another_graph_is_recorded(no_gpu, monkeypatch):
    step = moe_compile.cuda_graphs(lambda x: x, X)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = "expected a stream that records no graph, got one that does"
    with pytest.raises(RuntimeError, match=message):
        step(X)
    with pytest.raises(RuntimeError, match=message):
        moe_compile.cuda_graphs(lambda x: x, X)


def test_addresses_of_tied_weights_and_no_modules():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    Addresses([net], []).check()
    Addresses([], []).check()


# On a GPU.


class Routed(nn.Module):
    """An MoE layer of our ops. The router is float32, so that near ties are rare."""

    pad = 0

    def __init__(self, dtype, device):
        super().__init__()
        how = {"dtype": dtype, "device": device}
        self.router = nn.Parameter(torch.randn(H, E, device=device))
        self.up = nn.Parameter(torch.randn(E, H, 2 * F, **how) / H**0.5)
        self.down = nn.Parameter(torch.randn(E, F, H, **how) / F**0.5)
        self.requires_grad_(False)

    def forward(self, x):
        weights, ids = moe.route(x.float() @ self.router, K, renormalize=True)
        rows, offsets, position = moe.sort_tokens(ids, E)
        h = moe.silu_mul(moe.grouped_mm(x, self.up, offsets, rows, K))
        return moe.combine(moe.grouped_mm(h, self.down, offsets), position, weights, dtype=x.dtype)

    def inputs(self, batch, kind):
        """Any tokens; one many times, whose experts take all; zeros, for which experts tie."""
        x = torch.randn(batch, H, device=self.up.device).to(self.up.dtype)
        return (x if kind == 0 else x[:1].repeat(batch, 1) if kind == 1 else torch.zeros_like(x),)


class Dispatched(Routed):
    """The experts alone, by the op for few tokens; who routes is the caller."""

    pad = (0, -1, 0)

    def forward(self, x, ids, weights):
        return moe.experts(x, ids, weights, self.up, self.down)

    def inputs(self, batch, kind):
        """Any experts; one that takes all; none."""
        (x,) = super().inputs(batch, 0)
        ids = torch.rand(batch, E, device=x.device).argsort(1)[:, :K].contiguous()
        if kind:
            ids.fill_(-1)[:, 0] = -1 if kind == 2 else batch % E
        return x, ids, torch.rand(batch, K, device=x.device)


def padded(model, inputs, size):
    pads = model.pad if isinstance(model.pad, tuple) else [model.pad] * len(inputs)
    for x, pad in zip(inputs, pads, strict=True):
        out = x.new_full((size, *x.shape[1:]), pad)
        out[: len(x)] = x
        yield out


def compare(model, inputs, out):
    """`out` is what the model says of as many rows as the graph has."""
    batch = len(out)
    size = next(size for size in SIZES if size >= batch)
    tolerance = 1e-4 if out.dtype == torch.float32 else 4e-2  # a wrong row is off by 0.5
    expected = model(*padded(model, inputs, size))[:batch]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    if isinstance(model, Dispatched) and (inputs[1] == -1).all():
        assert not out.any()


def memory():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [Routed, Dispatched])
@torch.no_grad()
def test_10_000_replays(build, dtype, device):
    model = build(dtype, device)
    step = moe_compile.cuda_graphs(model, model.inputs(3, 0), batch_sizes=SIZES, pad=model.pad)
    batches = random.Random(0)
    stored = {(n, kind): model.inputs(n, kind) for n in range(1, 17) for kind in range(3)}
    for (n, kind), inputs in stored.items():  # all batches, and the largest was before the smallest
        compare(model, inputs, step(*inputs))
        compare(model, stored[17 - n, kind], step(*stored[17 - n, kind]))
    before = None
    for i in range(10_000):
        n, kind = batches.randint(1, 16), i % 3
        inputs = stored[n, kind]
        if kind == 0:
            inputs[0].normal_()
        out = step(*inputs)
        if i % 500 == 0:  # 500 is 2 modulo 3: each kind in turn
            compare(model, inputs, out)
        if i == 100:
            before = memory()
    assert memory() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_2_000_steps_of_cuda_graph_trees(dtype, device):
    torch._dynamo.reset()
    model = Routed(dtype, device)
    how = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
    fn = torch.compile(model, backend="moe_compile", **how)
    batches = random.Random(0)
    stored = {(n, kind): model.inputs(n, kind) for n in (2, 16) for kind in range(3)}

    def run(n, kind, look=False):
        inputs = stored[n, kind]
        if kind == 0:
            inputs[0].normal_()
        torch.compiler.cudagraph_mark_step_begin()
        out = fn(*inputs)
        if look:
            compare(model, inputs, out)

    for n, kind in list(stored) * 4:  # compile, warm up, record
        run(n, kind, look=True)
    before = None
    for i in range(2_000):
        run(batches.choice((2, 16)), i % 3, look=i % 500 == 0)
        if i in (100, 1_999):
            run(16, 1)  # the same graph last
            before = before or memory()
    assert memory() == before
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [False, True])
def test_of_a_compiled_module(inference, device):
    torch._dynamo.reset()
    model = Routed(torch.bfloat16, device)
    fn = torch.compile(model, backend="moe_compile", dynamic=False)
    with torch.inference_mode(inference):
        step = moe_compile.cuda_graphs(fn, model.inputs(1, 0), batch_sizes=(2, 4))
    for n in (1, 2, 3, 4):
        inputs = model.inputs(n, 0)
        for mode in (False, True):
            with torch.inference_mode(mode):
                out = step(*inputs)
                expected = model(*padded(model, inputs, 2 if n <= 2 else 4))[:n]
                torch.testing.assert_close(out, expected, rtol=4e-2, atol=4e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_share_their_memory(device):
    def grown(sizes):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        fn = lambda x: x.repeat(1, 2**20).sum(1)  # noqa: E731  64 MiB for 16 rows
        step = moe_compile.cuda_graphs(fn, torch.ones(1, 1, device=device), batch_sizes=sizes)
        assert step(torch.ones(3, 1, device=device)).tolist() == [2.0**20] * 3
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    grown((16,))
    alone = grown((16,))
    assert alone >= 2**26
    assert grown(SIZES) <= alone + 2**22


@pytest.mark.gpu
@torch.no_grad()
def test_a_cache_and_outputs_fed_back(device):
    """Tokens are written to a cache, padding to a row that nobody reads; the output is an input."""
    cache = torch.zeros(9, 4, H, device=device)  # slot 8 is nobody's

    def fn(x, slots, positions, cache):
        cache[slots, positions] = x
        return x + 1, positions + 1, cache[slots].sum(1)

    zeros = torch.zeros(1, dtype=torch.int64, device=device)
    example = torch.zeros(1, H, device=device), zeros + 8, zeros
    fixed, pad = {"cache": cache}, (0, 8, 0)
    step = moe_compile.cuda_graphs(fn, example, batch_sizes=(2, 4, 8), fixed=fixed, pad=pad)
    cache.zero_()
    slots = torch.tensor([5, 0, 3], device=device)
    x, positions = torch.ones(3, H, device=device), torch.zeros_like(slots)
    for i in range(4):
        x, positions, total = step(x, slots, positions)
        assert (total == sum(range(1, i + 2))).all()
    assert (cache[:8].sum((1, 2)) / H).tolist() == [10, 0, 0, 10, 0, 10, 0, 0]


@pytest.mark.gpu
@torch.no_grad()
def test_live_constants_are_written_where_graphs_read_them(device):
    torch._dynamo.reset()
    router = nn.Linear(H, E, bias=False, device=device, dtype=torch.bfloat16)
    fn = torch.compile(
        lambda x: x @ router.weight.float().t(), backend="moe_compile", dynamic=False
    )
    x = torch.randn(2, H, device=device)
    step = moe_compile.cuda_graphs(fn, x, batch_sizes=(2, 4), modules=router)
    router.weight.add_(1)
    assert moe_compile.refresh(router) == 1
    torch.testing.assert_close(step(x), x @ router.weight.float().t(), rtol=1e-3, atol=1e-3)
    router.weight.data = router.weight.data.clone()
    with pytest.raises(RuntimeError, match="expected weight where it lay"):
        step(x)


@pytest.mark.gpu
@torch.no_grad()
def test_a_call_within_a_capture(device):
    x = torch.ones(2, 3, device=device)
    step = moe_compile.cuda_graphs(lambda x: x + 1, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = x * 2
        with pytest.raises(RuntimeError, match="expected a stream that records no graph"):
            step(x)
    graph.replay()
    assert (out == 2).all()
    assert (step(x) == 2).all()


@pytest.mark.gpu
def test_inputs_on_the_cpu(device):
    step = moe_compile.cuda_graphs(lambda x: x + 1, torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=r"input 0 to be .* on cuda:0, got .* on cpu"):
        step(torch.ones(2, 3))


def blocks():
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_the_docs_example_with_buckets(no_gpu):
    (example,) = [block for block in blocks() if "moe_compile.cuda_graphs(" in block]
    exec(example.replace('"cuda"', '"cpu"'), {})


@pytest.mark.gpu
def test_the_docs_examples():
    torch._dynamo.reset()
    for block in blocks():
        exec(block, {})
