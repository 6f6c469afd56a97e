"""A model of one's own in float8: what becomes so, how it computes, and what is refused."""

import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_compile
from moe_compile._own_model import Float8Linear
from moe_compile.ops._grouped_mm_fp8_kernel import dequantize
from moe_compile.testing import capture, run_passes

FP8 = torch.float8_e4m3fn
V, E, H, FEATURES, T, K = 384, 4, 256, 128, 5, 2


class Grouped(nn.Module):
    """Rows sorted by expert and torch._grouped_mm; up is [E, G, H] and down [E, F, H]."""

    def __init__(self, bias=False):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, 2 * FEATURES, H) / 16)
        self.down = nn.Parameter(torch.randn(E, FEATURES, H) / 16)
        self.bias = nn.Parameter(torch.randn(E, H) / 4) if bias else None

    def forward(self, x, ids, weights):
        expert, order = ids.reshape(-1).sort(stable=True)
        counts = torch.histc(expert.float(), bins=E, min=0, max=E - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        h = torch._grouped_mm(x[order // K], self.up.to(x.dtype).mT, offs=offsets)
        gate, up = h.chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down, offs=offsets)
        y = y if self.bias is None else y + self.bias[expert]
        y = y * weights.reshape(-1)[order][:, None]
        return torch.zeros_like(y)[: x.shape[0]].index_add_(0, order // K, y)


class Batched(Grouped):
    """Weights gathered for each row, on either side of a torch.bmm."""

    def forward(self, x, ids, weights):
        expert = ids.reshape(-1)
        h = x.repeat_interleave(K, dim=0)
        gate, up = torch.bmm(self.up[expert], h.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm((F.silu(gate) * up).unsqueeze(1), self.down[expert]).squeeze(1)
        y = y if self.bias is None else y + self.bias[expert]
        return (y * weights.reshape(-1, 1)).view(-1, K, H).sum(1)


class Model(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.mix, self.thin = nn.Linear(H, H), nn.Linear(H, 64)
        self.choose = nn.Linear(H, E)
        self.experts = experts
        self.norm, self.head = nn.RMSNorm(H), nn.Linear(H, V, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.mix(x) + self.thin(x).sum(-1, keepdim=True) / 64
        weights, ids = (self.choose(x) * 4).softmax(-1).topk(K)
        return self.head(self.norm(x + self.experts(x, ids, weights)))


def build(form=Grouped, **options):
    torch.manual_seed(0)
    return Model(form(**options)).bfloat16().eval().requires_grad_(False)


@pytest.fixture
def tokens(device):
    return torch.arange(T, device=device) * 7


@pytest.fixture(params=[(Grouped, {"bias": True}), (Batched, {})], ids=str)
def plain(request, device):
    form, options = request.param
    return build(form, **options).to(device)


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@torch.no_grad()
def test_what_is_quantised(plain, tokens, caplog):
    caplog.set_level("INFO", logger="moe_compile")
    want = plain(tokens)
    model = copy.deepcopy(plain)
    before = sum(p.nbytes for p in model.parameters())
    assert moe_compile.quantize(model, "fp8", example_inputs=tokens) is model
    state = model.state_dict()
    assert {name for name, value in state.items() if value.dtype == FP8} == {
        "mix.weight_fp8",
        "experts.parametrizations.up.original0",
        "experts.parametrizations.down.original0",
    }
    assert all(type(value) is torch.Tensor for value in state.values())
    assert state["experts.parametrizations.down.original0"].shape == (E, H, FEATURES)
    for kept in ("embed", "thin", "choose", "norm", "head", "mix.bias", "experts.bias"):
        assert all(v.dtype == torch.bfloat16 for n, v in state.items() if n.startswith(kept))
    text = "\n".join(caplog.messages)
    assert "quantize: kept thin, choose, head" in text
    layers, was, now = re.search(r"(\d+) layers, (.+) -> (.+) MiB", text).groups()
    assert int(layers) == 2
    saved = before - sum(p.nbytes for p in model.parameters())
    assert float(was) - float(now) == pytest.approx(saved / 2**20, abs=0.1)
    assert 0 < relative(model(tokens), want) < 0.1


@torch.no_grad()
def test_activations_are_quantised_too(plain, tokens):
    """The same weights without float8 rows give something else, not far off."""
    model = moe_compile.quantize(copy.deepcopy(plain), example_inputs=(tokens,))
    for name in ("up", "down"):
        stored = model.experts.parametrizations[name]
        w = dequantize(stored.original0, stored.original1, 128, 128, torch.float32).bfloat16()
        setattr(plain.experts, name, nn.Parameter(w.mT.contiguous() if name == "down" else w))
    w = dequantize(model.mix.weight_fp8, model.mix.weight_scale, 128, 128, torch.float32)
    plain.mix.weight = nn.Parameter(w.bfloat16())
    assert 1e-3 < relative(model(tokens), plain(tokens)) < 0.05


@torch.no_grad()
def test_compiled(plain, tokens):
    """One graph, all passes of a layer, values as uncompiled: as near as Inductor's alone are.

    It leaves out roundings to bfloat16, so that some rows have other float8 values: 1.3 %.
    """
    torch._dynamo.reset()
    wide = plain(tokens)
    model = moe_compile.quantize(plain, example_inputs=tokens)
    want = model(tokens)
    require = {"find_experts": 1, "find_routing": 1, "fuse_activation_quant": 1}
    options = {"require": require}
    compiled = torch.compile(model, backend="moe_compile", fullgraph=True, options=options)
    for _ in range(2):
        got = compiled(tokens)
        assert relative(got, want) < 0.02
        assert relative(got, wide) < 1.1 * relative(want, wide)


def test_graph_of_a_layer(tokens, device):
    """The stages of a layer, each token quantised once; no weight is gathered or copied.

    On a GPU the dense layers of so few tokens quantise in their own kernel.
    """
    model = moe_compile.quantize(build(Batched).to(device), example_inputs=tokens)
    with torch.no_grad():
        gm = capture(model, tokens)
    run_passes(gm)
    names = [str(n.target).split(".")[1] for n in gm.graph.nodes if "moe_compile." in str(n.target)]
    stages = ["quant_fp8", "grouped_mm_fp8", "silu_mul_quant", "grouped_mm_fp8", "combine"]
    found = [n for n in names if n in stages]
    dense = ["quant_fp8"] if device == "cpu" else []
    assert found == [*dense, *stages]
    assert ("linear_fp8" if device == "cpu" else "skinny_mms_fp8") in names
    for node in gm.graph.nodes:
        if "grouped_mm_fp8" in str(node.target):
            w = node.args[2].meta["val"]
            assert w.shape[0] == E
            assert w.stride(1) == 1


@torch.no_grad()
def test_saved_and_loaded(plain, tokens, tmp_path):
    """By a plain state dict, into a model that is built and quantised; in any memory of its own."""
    other = copy.deepcopy(plain)
    for p in other.parameters():
        p.mul_(0.5)
    model = moe_compile.quantize(plain, example_inputs=tokens)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    moe_compile.quantize(other, example_inputs=tokens)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(other)(tokens), model(tokens))
    with torch.inference_mode():
        assert torch.equal(other(tokens), model(tokens))


@torch.no_grad()
def test_loaded_into_a_model_without_memory(tokens, device):
    """Built and quantised on the meta device: not a byte of bfloat16 is needed."""
    model = moe_compile.quantize(build(bias=True).to(device), example_inputs=tokens)
    with torch.device("meta"):
        other = Model(Grouped(bias=True)).bfloat16().eval()
    moe_compile.quantize(other, example_inputs=tokens.to("meta"))
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(tokens), model(tokens))


def test_linear_layers_alone():
    """Nothing that may be experts: no example is asked for. In place, hooks and all."""
    calls = []
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, 200, bias=False)).requires_grad_(False)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    layers, x = list(model), torch.randn(2, 3, H)
    want = model(x)
    moe_compile.quantize(model)
    assert [type(layer) for layer in layers] == [Float8Linear] * 2
    assert model(x).shape == (2, 3, 200)
    assert relative(model(x), want) < 0.06
    assert len(calls) == 3
    with pytest.raises(ValueError, match="expected a linear layer in float8 to be called, got its"):
        F.linear(x, model[0].weight)
    with pytest.raises(ValueError, match="expected layers of 128 features or more"):
        moe_compile.quantize(model)


def test_linear_layers_that_are_kept():
    """By their shapes and names: nothing of a model's meaning is asked for."""

    class Own(nn.Linear):
        pass

    layers = {
        "gate": nn.Linear(128, 128),
        "router_of_160": nn.Linear(128, 160),
        "head": nn.Linear(128, 300),
        "tied": nn.Linear(128, 144),
        "own": Own(128, 128),
        "thin": nn.Linear(128, 127),
        "named": nn.Linear(128, 128),
        "dense": nn.Linear(128, 128),
        "embed": nn.Embedding(300, 128),
        "other": nn.Embedding(144, 128),
    }
    layers["tied"].weight = layers["other"].weight
    model = nn.ModuleDict(layers)
    model.experts = nn.ModuleDict({"w": nn.Linear(128, 128)})
    model.experts.bank = nn.Parameter(torch.ones(160, 128, 128))
    moe_compile.quantize(model, keep=["named", "experts"])
    made = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert made == {"dense", "experts.w"}


class Bank(nn.Module):
    """A parameter that looks like experts, used in a way of its own."""

    def __init__(self, use):
        super().__init__()
        self.bank, self.use = nn.Parameter(torch.randn(E, 128, 128)), use

    def forward(self, x):
        return self.use(x, self.bank)


REFUSED = {
    "einsum over all": lambda x, w: torch.einsum("th,egh->teg", x, w),
    "a sum": lambda x, w: x + w.sum((0, 1)),
    "one expert's": lambda x, w: x @ w[1],
    "ids of two dims": lambda x, w: w[torch.zeros(2, 2, dtype=torch.int64)].sum() + x,
    "written": lambda x, w: w.data.mul_(2).sum() + x,
}
READS = r"expected bank in torch._grouped_mm\(x, w, .* got aten\..* \(keep=\['bank'\] leaves"


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_uses_that_are_refused(use):
    model, x = Bank(use).requires_grad_(False), torch.randn(2, 128)
    with pytest.raises(ValueError, match=READS):
        moe_compile.quantize(model, example_inputs=x)
    assert type(model.bank) is nn.Parameter  # nothing was changed
    with pytest.raises(ValueError, match="expected layers of 128 features or more"):
        moe_compile.quantize(model, keep=["bank"], example_inputs=x)


def test_a_dim_that_the_example_did_not_show():
    """Square weights: what is summed is proved for the one way only."""
    x = torch.randn(E, 1, 128)
    model = Bank(lambda x, w: torch.bmm(x, w) if x.shape[1] == 1 else torch.bmm(x, w.mT))
    model = moe_compile.quantize(model.requires_grad_(False), example_inputs={"x": x})
    assert model(x).shape == x.shape
    with pytest.raises(ValueError, match="expected bank summed over the dim that example_inputs"):
        model(x.expand(E, 2, 128))
    with pytest.raises(ValueError, match=READS):
        model.bank.float().sum()
    with pytest.raises(ValueError, match=r"expected w in .*e4m3fn, got torch.bfloat16"):
        model.bfloat16()(x)


def test_several_rows_for_each_weight():
    model, x = Bank(torch.bmm).requires_grad_(False), torch.randn(E, 3, 128)
    want = model(x)
    assert relative(moe_compile.quantize(model, example_inputs=x)(x), want) < 0.06


def test_torch_nn_functional_grouped_mm():
    """Where torch has it."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("an older torch")
    x, ends = torch.randn(5, 128).bfloat16(), torch.tensor([1, 3, 3, 5], dtype=torch.int32)
    model = Bank(lambda x, w: F.grouped_mm(x, w.mT, offs=ends)).bfloat16().requires_grad_(False)
    want = model(x)
    assert relative(moe_compile.quantize(model, example_inputs=x)(x), want) < 0.06


def test_refused():
    grouped = Grouped().requires_grad_(False)
    with pytest.raises(ValueError, match="expected example_inputs, to see whether up, down are"):
        moe_compile.quantize(grouped)
    with pytest.raises(ValueError, match=r"example_inputs with which bank is used .* got none"):
        moe_compile.quantize(Bank(lambda x, _: x), example_inputs=torch.ones(1))
    both = Bank(lambda x, w: torch.bmm(x, w) + torch.bmm(x, w.mT)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"is used .* got both of its dims summed"):
        moe_compile.quantize(both, example_inputs=torch.ones(E, 1, 128))
    twice = nn.ModuleList([Grouped(), Grouped()])
    twice[1].up = twice[0].up
    with pytest.raises(ValueError, match=r"a plain parameter 0.up .* got one that two modules"):
        moe_compile.quantize(twice, example_inputs=())
    with pytest.raises(ValueError, match=r"expected a model \(torch.nn.Module\) to quantise, got"):
        moe_compile.quantize("model")


def test_needs_no_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    model = nn.Sequential(nn.Linear(128, 128)).requires_grad_(False)
    assert moe_compile.quantize(model)(torch.ones(1, 128)).shape == (1, 128)
