"""Ints that count with every call are read from memory: what is compiled gets the same ones."""

import importlib

import pytest
import torch

from moe_compile import _counts

backend = importlib.import_module("moe_compile.backend")  # the package has the function's name
aten = torch.ops.aten


@pytest.fixture
def ints(monkeypatch):
    """The ints that each call handed to a compiled graph; nothing is compiled, the graph runs."""
    seen = []

    def run(gm, example_inputs, **how):
        def call(inputs):
            seen.append([x for x in inputs if isinstance(x, int)])
            return gm(*inputs)

        call._boxed_call = True
        return call

    monkeypatch.setattr(backend, "compile_fx_inner", run)
    monkeypatch.setattr(_counts, "_DEVICES", ("cpu",))
    torch._dynamo.reset()
    return seen


class Counter:
    def __init__(self, count=5):
        self.count, self.other = count, 2 * count


def run(fn, *args, steps=5, mode=None):
    """`fn` some steps long, compiled and not: the same values, and the same counts."""
    compiled = torch.compile(fn, backend="moe_compile", fullgraph=True, mode=mode)
    mine, theirs = Counter(), Counter()
    with torch.no_grad():
        for _ in range(steps):
            torch.testing.assert_close(compiled(mine, *args), fn(theirs, *args), rtol=0, atol=0)
    assert vars(mine) == vars(theirs)


def positions(counter, x):
    start = max(counter.count - 7, 0)
    places = torch.arange(4, device=x.device)
    ahead = places + (20 - counter.count)
    counter.count += 1
    counter.other = 3 * counter.other + counter.count
    return torch.where(places + start > counter.count - 6, ahead, x) - 2 * start


def test_counts_are_tensors(ints):
    run(positions, torch.arange(4), mode="reduce-overhead")
    assert ints == [[], [36], [36], [36], [36]]  # the other count, which no tensor is made of


def test_a_count_that_nothing_reads(ints):
    def step(counter, x):
        counter.count += 1
        return x + 1

    run(step, torch.randn(4))
    assert ints == [[], [6], [6], [6], [6]]


def shape(counter, x):
    counter.count += 1
    return x[: counter.count] + 1


def factor(counter, x):
    counter.count += 1
    return x * counter.count


def quotient(counter, x):
    counter.count += 1
    return x.long() + counter.count // 2


@pytest.mark.parametrize("step", [shape, factor, quotient])
def test_left_alone(ints, step):
    """What decides a shape, is rounded to a float, or computed in a way that we do not know."""
    run(step, torch.randn(16))
    assert ints == [[], [6], [7], [8], [9]]


def test_on_a_gpu_only(ints, monkeypatch):
    monkeypatch.undo()
    graph = torch.fx.Graph()
    gm = torch.fx.GraphModule({}, graph)
    graph.output([])
    wrap = _counts.take_counts(gm, [], {"is_inference": True})
    assert wrap(run) is run


def test_decode_of_gpt_oss(ints):
    """Its window is full; the first graph knew the count, the second takes it as a tensor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_local_experts=4, head_dim=8,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True)
    prompt = torch.randint(64, (1, 9))
    caches = [transformers.StaticCache(config=config, max_cache_len=16) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt, past_key_values=cache)
        for _ in range(4):
            token = torch.randint(64, (1, 1))
            ours, eager = (
                f(token, past_key_values=cache).logits
                for f, cache in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert ints == [[], [], [], []]


def test_inductor_compiles_it(monkeypatch):
    """Of outputs that users see, it looks at the nodes; the counts' are none any more."""
    monkeypatch.setattr(_counts, "_DEVICES", ("cpu",))
    torch._dynamo.reset()
    with torch._inductor.config.patch(disable_padding_cpu=False):  # padding looks at them
        run(positions, torch.arange(4))


@pytest.mark.gpu
def test_a_cuda_graph_is_recorded_once(monkeypatch, device):
    """One for all counts; the graph that knew the first of them ran once and is not recorded."""
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    recorded, init = [], CUDAGraphNode.__init__

    def counted(self, *args, **kwargs):
        recorded.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(CUDAGraphNode, "__init__", counted)
    torch._dynamo.reset()
    run(positions, torch.arange(4, device=device), steps=12, mode="reduce-overhead")
    assert len(recorded) == 1
