"""The lint: published bugs, rebuilt small, are found by name and line; correct models are silent.

Rows of the mesh of 2 x 2 share experts' features (TP), columns own different experts (EP).
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, Mesh, all_gather, all_reduce, reduce_scatter

import moe_compile
from moe_compile.ops import moe
from moe_compile.parallel import CollectivesWarning
from moe_compile.passes._settings import Settings, set_settings
from moe_compile.passes.lint_collectives import lint_collectives
from moe_compile.testing import capture, run_passes

T, H, F = 8, 16, 4  # tokens, hidden, features of one rank


@pytest.fixture(scope="module", autouse=True, params=[0, 3], ids=lambda rank: f"rank {rank}")
def mesh(request):
    mesh = Mesh(request.param)
    MESHES.append(mesh)
    yield mesh
    mesh.close()
    MESHES.clear()


MESHES: list = []


def tp():
    return MESHES[0].row


def ep():
    return MESHES[0].column


def replicated(x, group=None):
    return moe_compile.parallel.mark_replicated(x, group)


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Mlp(torch.nn.Module):
    """Column-parallel, then row-parallel: a partial sum over the group."""

    def __init__(self, group=None, bias=False):
        super().__init__()
        self.group = group
        self.up = torch.nn.Parameter(torch.randn(H, F))
        self.down = torch.nn.Parameter(torch.randn(F, H))
        self.bias = torch.nn.Parameter(torch.randn(H)) if bias else None

    def forward(self, x):
        up = moe_compile.parallel.mark_shard(self.up, 1, self.group)
        down = moe_compile.parallel.mark_shard(self.down, 0, self.group)
        h = torch.nn.functional.silu(x @ up)
        if self.bias is None:
            return h @ down
        return torch.addmm(replicated(self.bias, self.group), h, down)


class Layer(torch.nn.Module):
    """One decoder layer's second half: x, then the experts, then the next layer's norm."""

    def __init__(self, forward, group=None, bias=False):
        super().__init__()
        self.routed = Mlp(group, bias)
        self.shared = torch.nn.Parameter(torch.randn(H, H))
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


# The bugs. Each is a function of the layer and x; the line that is wrong ends in "# WRONG".


def double_reduce_in_the_communicator(layer, x):  # SGLang 23729, 23731, 23732
    y = all_reduce(layer.routed(replicated(x)))
    return reduce_scatter(y)  # WRONG


def double_reduce_in_the_next_norm(layer, x):  # SGLang 23732: fused all-reduce and norm
    x = replicated(x)
    y = all_reduce(layer.routed(x))
    return norm(all_reduce(y) + x)  # WRONG


def shared_expert_reduced_twice(layer, x):  # vLLM 49378, 49122
    x = replicated(x)
    shared = all_reduce(layer.routed(x))
    both = layer.routed(x.cos()) + shared  # WRONG
    return norm(all_reduce(both))


def experts_without_reduce_scatter(layer, x):  # SGLang 23734: the EP branch reduces, then all do
    x = replicated(x)
    y = all_reduce(layer.routed(x), ep())
    return reduce_scatter(y)  # WRONG


def hybrid_reduced_over_experts_only(layer, x):  # SGLang 32963
    x = replicated(x)
    y = moe_compile.parallel.mark_partial(layer.routed(x), ep())
    y = moe_compile.parallel.mark_partial(y, tp())
    y = all_reduce(y, ep())
    return norm(y)  # WRONG


def replicated_shared_expert_inside(layer, x):  # SGLang 31475, 31476, 35535, 26845, 27191
    x = replicated(x)
    shared = x @ replicated(layer.shared)
    return all_reduce(layer.routed(x) + shared)  # WRONG


def residual_inside(layer, x):
    x = replicated(x)
    return norm(all_reduce(layer.routed(x) + x))  # WRONG


def no_reduce_at_all(layer, x):
    x = replicated(x)
    return norm(layer.routed(x))  # WRONG


def partial_returned(layer, x):
    return layer.routed(replicated(x))  # WRONG


def all_ranks_for_a_part(layer, x):
    y = moe_compile.parallel.mark_partial(x, tp())
    return all_reduce(y)  # WRONG


def part_for_all_ranks(layer, x):
    y = moe_compile.parallel.mark_partial(x)
    y = all_reduce(y, tp())
    return y.relu()  # WRONG


def logits_of_partial(layer, x):
    y = layer.routed(replicated(x))
    return y.softmax(-1)  # WRONG


BUGS = {
    double_reduce_in_the_communicator: ("double reduce", None),
    double_reduce_in_the_next_norm: ("double reduce", None),
    shared_expert_reduced_twice: ("replicated term", None),
    experts_without_reduce_scatter: ("wrong group", "ep"),
    hybrid_reduced_over_experts_only: ("missing reduce", "unmarked"),
    replicated_shared_expert_inside: ("replicated term", None),
    residual_inside: ("replicated term", None),
    no_reduce_at_all: ("missing reduce", None),
    partial_returned: ("missing reduce", None),
    all_ranks_for_a_part: ("wrong group", None),
    part_for_all_ranks: ("missing reduce", None),
    logits_of_partial: ("missing reduce", None),
}


@torch.no_grad()
def lint(rule, group=None, bias=False, collectives="warn"):
    torch.manual_seed(0)
    gm = capture(Layer(rule, group, bias).requires_grad_(False), torch.randn(T, H))
    set_settings(gm, Settings(collectives=collectives))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", CollectivesWarning)
        (outcome,) = run_passes(gm, lint_collectives)
    return outcome, [str(w.message) for w in said if w.category is CollectivesWarning]


def wrong_line(rule):
    import inspect

    lines, start = inspect.getsourcelines(rule)
    return next(start + i for i, line in enumerate(lines) if line.rstrip().endswith("# WRONG"))


@pytest.mark.parametrize("rule", BUGS, ids=lambda rule: rule.__name__)
def test_finds_the_bug_and_its_line(rule):
    kind, how = BUGS[rule]
    group = ep() if how == "ep" else None
    outcome, said = lint(rule, group)
    assert {e.detail.partition(":")[0] for e in outcome.mistakes} == {kind}, outcome.mistakes
    where = f"test_lint_collectives.py:{wrong_line(rule)}:"
    assert any(where in e.source or where in e.detail for e in outcome.mistakes), outcome.mistakes
    assert said
    assert kind in said[0]


# Correct models: the same, corrected, and others that look alike.


def reduced_once(layer, x):
    x = replicated(x)
    return norm(all_reduce(layer.routed(x)) + x)


def scattered_once(layer, x):
    return all_gather(norm(reduce_scatter(layer.routed(replicated(x)))))


def shared_reduced_with_routed(layer, x):
    x = replicated(x)
    return norm(all_reduce(layer.routed(x) + layer.routed(x.cos())) + x)


def shared_added_outside(layer, x):
    x = replicated(x)
    return norm(all_reduce(layer.routed(x)) + x @ replicated(layer.shared))


def hybrid_reduced_over_both(layer, x):
    y = moe_compile.parallel.mark_partial(replicated(x).sin(), ep())
    y = moe_compile.parallel.mark_partial(y, tp())
    return norm(all_reduce(all_reduce(y, ep()), tp()))


def hybrid_reduced_over_all_at_once(layer, x):
    y = moe_compile.parallel.mark_partial(replicated(x).sin(), ep())
    y = moe_compile.parallel.mark_partial(y, tp())
    return norm(all_reduce(y))


def hierarchical(layer, x):
    y = layer.routed(replicated(x))
    return norm(all_reduce(all_reduce(y, tp()), ep()))


def nth_of_a_replicated_term(layer, x):  # as transformers' identity experts
    x = replicated(x)
    return norm(all_reduce(layer.routed(x) + x / RANKS))


def one_rank_adds(layer, x):
    x = replicated(x)
    y = layer.routed(x)
    if dist.get_rank() == 0:
        y = y + moe_compile.parallel.mark_partial(x @ replicated(layer.shared))
    return norm(all_reduce(y))


def average_of_a_replicated_loss(layer, x):
    loss = all_reduce(layer.routed(replicated(x))).square().mean()
    return all_reduce(loss) / RANKS


def average_before(layer, x):
    loss = all_reduce(layer.routed(replicated(x))).square().mean()
    return all_reduce(loss * (1 / RANKS))


def greatest_for_a_softmax(layer, x):
    y = all_reduce(layer.routed(replicated(x)))
    top = all_reduce(y.amax(-1, keepdim=True), op="max")
    return (y - top).exp()


def experts_by_rank(layer, x):  # expert parallelism by hand, with this rank's number as a literal
    x = replicated(x)
    ids = (x @ replicated(layer.shared)).topk(2).indices
    mine = (ids // (H // RANKS)) == dist.get_rank()
    return norm(all_reduce((mine.to(x.dtype).sum(-1, keepdim=True)) * x))


def experts_by_range(layer, x):  # the same with the rank's experts counted out
    x = replicated(x)
    ids = (x @ replicated(layer.shared)).topk(2).indices
    n = H // RANKS
    own = torch.arange(n) + dist.get_rank() * n
    mine = (ids[..., None] == own).any(-1).to(x.dtype)
    return norm(all_reduce(mine.sum(-1, keepdim=True) * x))


def experts_by_mask(layer, x):
    x = replicated(x)
    own = (torch.arange(H) // (H // RANKS) == dist.get_rank()).to(x.dtype)
    return norm(all_reduce(x * own))


def experts_by_bounds(layer, x):
    x = replicated(x)
    start = dist.get_rank() * (H // RANKS)
    number = torch.arange(H)
    own = (number >= start) & (number < start + H // RANKS)
    return norm(all_reduce(torch.where(own, x, 0.0)))


def embedding_by_rank(layer, x):  # vocabulary-parallel
    ids = replicated(x).argmax(-1)
    start = dist.get_rank() * F
    own = (ids >= start) & (ids < start + F)
    rows = torch.where(own, ids - start, 0)
    return norm(all_reduce(torch.where(own[:, None], layer.shared[:F][rows], 0.0)))


def own_part_by_slice(layer, x):
    y = all_reduce(layer.routed(replicated(x)))
    n, rank = T // RANKS, dist.get_rank()
    part = y[rank * n : (rank + 1) * n]
    return all_gather(norm(part))


def data_parallel_sum(layer, x):  # nothing is known of x: other ranks hold other tokens
    return all_reduce((x @ layer.shared).sum(0))


def partial_returned_on_purpose(layer, x):
    return moe_compile.parallel.mark_partial(layer.routed(replicated(x)))


def scaled_and_gated(layer, x):
    x = replicated(x)
    gate = (x @ replicated(layer.shared))[:, :1].sigmoid()
    return norm(all_reduce(2.5 * layer.routed(x) + gate * layer.routed(x.cos())))


CORRECT = [
    reduced_once,
    scattered_once,
    shared_reduced_with_routed,
    shared_added_outside,
    hybrid_reduced_over_both,
    hybrid_reduced_over_all_at_once,
    hierarchical,
    nth_of_a_replicated_term,
    one_rank_adds,
    average_of_a_replicated_loss,
    average_before,
    greatest_for_a_softmax,
    experts_by_rank,
    experts_by_range,
    experts_by_mask,
    experts_by_bounds,
    embedding_by_rank,
    own_part_by_slice,
    data_parallel_sum,
    partial_returned_on_purpose,
    scaled_and_gated,
]


@pytest.mark.parametrize("rule", CORRECT, ids=lambda rule: rule.__name__)
def test_no_false_alarm(rule):
    outcome, said = lint(rule)
    assert not outcome.mistakes
    assert not said


def test_bias_counted_by_every_rank():
    outcome, _ = lint(reduced_once, bias=True)
    assert [e.detail.partition(":")[0] for e in outcome.mistakes] == ["replicated term"]


def test_unknown_is_said_as_unknown():
    outcome, _ = lint(data_parallel_sum)
    (declined,) = outcome.declined
    assert "1 of 1 reductions not judged" in declined.detail
    assert "nothing says how the input" in declined.detail


def test_options():
    with pytest.raises(RuntimeError, match=r"expected none, got\n  test_lint_collectives.py:\d+"):
        lint(no_reduce_at_all, collectives="error")
    outcome, said = lint(no_reduce_at_all, collectives="ignore")
    assert not outcome.mistakes
    assert not said
    with pytest.raises(ValueError, match="collectives among warn, error, ignore, got 'loud'"):
        moe_compile.Options(collectives="loud")


@torch.no_grad()
def test_the_backend_refuses_on_request():
    layer = Layer(no_reduce_at_all).requires_grad_(False)
    fn = torch.compile(layer, backend="moe_compile", options={"collectives": "error"})
    with pytest.raises(Exception, match="missing reduce"):
        fn(torch.randn(T, H))


def experts_of_ours(layer, x):
    x = replicated(x)
    up = moe_compile.parallel.mark_shard(layer.up, 0)
    down = moe_compile.parallel.mark_shard(layer.down, 0)
    weights, ids = moe.route(x @ replicated(layer.gate), 2)
    ids = torch.where(ids // 2 == dist.get_rank(), ids % 2, 2)
    rows, offsets, position = moe.sort_tokens(ids, 2)
    h = moe.silu_mul(moe.grouped_mm(x, up, offsets, rows, 2))
    return moe.combine(moe.grouped_mm(h, down, offsets), position, weights)


class Experts(Layer):
    def __init__(self, rule):
        super().__init__(rule)
        self.gate = torch.nn.Parameter(torch.randn(H, 8))
        self.up = torch.nn.Parameter(torch.randn(2, H, 2 * F))
        self.down = torch.nn.Parameter(torch.randn(2, F, H))


@torch.no_grad()
def test_experts_of_several_ranks_are_partial():
    def missing(layer, x):
        return norm(experts_of_ours(layer, x))

    def right(layer, x):
        return norm(all_reduce(experts_of_ours(layer, x)))

    for rule, kinds in (missing, ["missing reduce"]), (right, []):
        gm = capture(Experts(rule).requires_grad_(False), torch.randn(T, H))
        set_settings(gm, Settings())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CollectivesWarning)
            (outcome,) = run_passes(gm, lint_collectives)
        assert [e.detail.partition(":")[0] for e in outcome.mistakes] == kinds
        assert not outcome.declined


def test_the_report_tells_mistakes():
    """With the lines of the model, where explain prints."""

    def fn(x):
        return all_reduce(all_reduce(x.sin()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollectivesWarning)
        text = str(moe_compile.explain(fn, torch.randn(4, 4)))
    (line,) = [x.strip() for x in text.splitlines() if x.strip().startswith("!")]
    assert line.startswith("! test_lint_collectives.py:")
    assert "double reduce" in line
