import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import router as module
from moe_compile.ops._route_kernel import Routing
from moe_compile.ops._skinny_mm_kernel import Blocks
from moe_compile.ops.rms_norm_mms import rms_norm_mms, rms_norm_mms_triton
from moe_compile.ops.route import route, route_triton
from moe_compile.ops.router import router, router_reference, router_triton, takes_one_launch
from moe_compile.ops.skinny_mm import skinny_mm, skinny_mm_triton

EPS = 1e-6
QWEN3 = (4, "softmax", True, None, 1, 1, "max", True)
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CASES = {  # T, H, E, has a bias, has a norm, dtype, how experts are chosen
    "Qwen3": (1, 64, 24, False, True, BF16, QWEN3),
    "Mixtral": (3, 40, 8, False, True, F16, (2, "softmax", False)),
    "gpt-oss": (2, 37, 33, True, True, BF16, (4, "softmax", False, None, 1, 1, "max", True, 1e-9)),
    "tensor cores": (6, 50, 20, True, True, BF16, (3,)),
    "float32": (1, 64, 6, True, False, F32, (6, "sigmoid", False, None, 1, 1, "max", True)),
    "raw": (2, 16, 5, False, False, F16, (1, "none", True, None, 1, 1, "max", False, 0.0, 0.5)),
}
TWO_LAUNCHES = {
    "float32 on tensor cores": (6, 16, 8, False, True, F32, (2,)),
    "no rows": (0, 16, 8, False, True, BF16, (2,)),
    "nothing to add": (2, 0, 4, True, False, BF16, (2,)),
    "many rows": (17, 16, 8, False, False, BF16, (2,)),
    "few programs to keep rows": (6, 600, 3, False, True, BF16, (2,)),
}
GROUPS = {
    "DeepSeek": (5, 24, (4, "sigmoid", True, None, 4, 2, "top2_sum", True, 1e-20, 2.5)),
    "two lines": (1, 160, (6, "softmax", True, None, 8, 3, "max", False, 0.0, 16.0)),
}


def inputs(T, H, E, has_bias, has_norm, dtype, how, device):
    x, w, bias = (torch.randn(s, device=device).to(dtype) for s in ((T, H), (E, H), (E,)))
    norm = (1 + torch.randn(H, device=device) / 4).to(dtype) if has_norm else None
    product = x, (w / 4).t(), bias if has_bias else None, norm, EPS, True, has_norm
    return *product, *how


def with_bias(args, device):
    """Of the choice, which comes fourth of how experts are chosen."""
    return *args[:10], torch.randn(args[1].shape[1], device=device), *args[11:]


def two_launches(x, w, bias, norm, eps, round_first, keep, *how):
    if norm is None:
        return route_triton(skinny_mm_triton(x, w, bias), *how)
    logits, *kept = rms_norm_mms_triton(x, norm, eps, [w], [bias], round_first, keep)
    return *route_triton(logits, *how), *kept


def ops(x, w, bias, norm, eps, round_first, keep, *how):
    if norm is None:
        return route(skinny_mm(x, w, bias), *how)
    logits, *kept = rms_norm_mms(x, norm, eps, [w], [bias], round_first, keep)
    return *route(logits, *how), *kept


def is_one_launch(x, w, _bias, norm, _eps, _round_first, keep, *how):
    return takes_one_launch(x, w, norm is not None, keep, Routing(*how))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_two_launches(case, device):
    args = inputs(*CASES[case], device)
    assert is_one_launch(*args)
    assert_same(router_triton(*args), two_launches(*args))


@pytest.mark.parametrize("case", GROUPS)
def test_groups_and_a_bias_of_the_choice(case, device):
    T, E, how = GROUPS[case]
    args = with_bias(inputs(T, 40, E, False, False, BF16, how, device), device)
    assert_same(router_triton(*args), two_launches(*args))


@pytest.mark.parametrize("case", TWO_LAUNCHES)
def test_what_one_launch_does_not_take(case, device):
    args = inputs(*TWO_LAUNCHES[case], device)
    assert not is_one_launch(*args)
    assert_same(router_triton(*args), ops(*args))


@pytest.mark.parametrize("case", CASES)
def test_op(case, device):
    args = inputs(*CASES[case], device)
    assert_same(router(*args), ops(*args))


@pytest.mark.parametrize("fn", [router, router_triton], ids=["op", "triton"])
def test_matches_reference(fn, device):
    """Where logits lie far apart: near ones may change places with how they were summed."""
    T, H, E = 3, 32, 32
    x = torch.eye(H, device=device)[:T] * 4
    w = torch.stack([torch.randperm(E, device=device) for _ in range(H)]) / 16
    args = x, w, torch.zeros(E, device=device), None, 0.0, True, False, 4, "softmax", True
    assert_close(fn(*args), router_reference, *args)
    norm = torch.ones(H, device=device)
    args = x, w, None, norm, EPS, False, True, 4, "sigmoid"
    assert_close(fn(*args), router_reference, *args)


BLOCKS = [Blocks(1, 64, False, 8, 4), Blocks(32, 32, False, 1, 4), Blocks(8, 32, True, 4, 3)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
def test_any_blocks(blocks, device):
    """One program, many, and more warps than rows."""
    x, w, *rest = inputs(3, 80, 6, True, True, BF16, QWEN3, device)
    logits, *kept = rms_norm_mms_triton(x, rest[1], EPS, [w], rest[:1], True, True, blocks)
    want = *route_triton(logits, *QWEN3), *kept
    assert_same(router_triton(x, w, *rest, blocks=blocks), want)


def test_logits_that_are_no_numbers(device):
    x, *rest = inputs(3, 40, 8, False, False, BF16, QWEN3, device)
    x[0, 3], x[2] = float("nan"), 0.0
    weights, ids = router_triton(x, *rest)
    assert weights[0].isnan().all()
    assert ids[[0, 2]].tolist() == [[0, 1, 2, 3]] * 2
    assert_same((weights[1:], ids[1:]), (w[1:] for w in two_launches(x, *rest)))


def test_strided_input(device):
    x, w, bias, norm, *rest = inputs(3, 40, 8, True, True, BF16, QWEN3, device)
    wide, biases = torch.cat((x, x), 1)[:, 3:43], torch.stack((bias, bias), 1)[:, 0]
    for args in (wide, w, biases), (x.t().contiguous().t(), w.contiguous(), bias):
        assert_same(router_triton(*args, norm, *rest), two_launches(*args, norm, *rest))


def test_without_counters_it_takes_two_launches(monkeypatch, device):
    args = inputs(*CASES["Qwen3"], device)
    monkeypatch.setattr(module, "tickets", lambda x, count: None)
    assert_same(router_triton(*args), ops(*args))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtype_of_weights(dtype, device):
    x, w, *rest = inputs(1, 40, 8, False, False, BF16, QWEN3, device)
    args = x, w, *rest, 0.0, 1.0, dtype
    weights, *_ = router_triton(*args)
    assert weights.dtype == dtype
    assert_same(router_triton(*args), two_launches(*args))


REAL = {  # H, E, bias, norm, dtype, how, bias of the choice
    "Qwen3": (2048, 128, False, True, BF16, (8, *QWEN3[1:]), False),
    "Qwen3-Next": (2048, 512, False, False, BF16, (10, *QWEN3[1:]), False),
    "Mixtral": (4096, 8, False, True, BF16, (2, *QWEN3[1:]), False),
    "gpt-oss": (2880, 32, True, True, BF16, (4, "softmax", False), False),
    "DeepSeek-V3": (
        *(7168, 256, False, False, F32),
        (8, "sigmoid", True, None, 8, 4, "top2_sum", True, 1e-20, 2.5),
        True,
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case, T, device):
    H, E, has_bias, has_norm, dtype, how, biased = REAL[case]
    args = inputs(T, H, E, has_bias, has_norm, dtype, how, device)
    args = with_bias(args, device) if biased else args
    want = two_launches(*args)
    for _ in range(20):
        assert_same(router(*args), want)


@pytest.mark.gpu
def test_replays_of_a_graph(device):
    """Many routers in a row, each with its own counter, and again."""
    many = [inputs(1, 2048, 128, False, True, BF16, (8, *QWEN3[1:]), device) for _ in range(20)]
    want = [two_launches(*args) for args in many]
    router(*many[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [router(*args) for args in many]
    for _ in range(20):
        graph.replay()
        for pair in zip(got, want, strict=True):
            assert_same(*pair)


def test_opcheck(device):
    for case in CASES["Qwen3"], CASES["raw"], TWO_LAUNCHES["no rows"]:
        torch.library.opcheck(router, inputs(*case, device))
    _, E, how = GROUPS["DeepSeek"]
    args = with_bias(inputs(2, 40, E, True, False, F32, how, device), device)
    torch.library.opcheck(router, (*args, torch.bfloat16))
    named = {"renormalize": True, "choice_bias": args[10]}
    torch.library.opcheck(router, args[:8], named)


WRONG = {
    "x of rank 1": ({0: torch.zeros(8)}, r"x \[M, K\], got \[8\]"),
    "another H": ({0: torch.zeros(2, 7)}, r"x \[M, 8\] for w \[8, 6\], got \[2, 7\]"),
    "bias of another size": ({2: torch.zeros(5)}, r"bias \[6\], got \[5\]"),
    "norm of another size": ({3: torch.zeros(7)}, r"norm \[8\], got \[7\]"),
    "nothing to keep": ({3: None}, "a norm whose rows to keep, got none"),
    "too many experts": ({7: 7}, "top_k in 1..3, got 7"),
    "an unknown score": ({8: "relu"}, "score in .*, got relu"),
    "choice_bias of another size": ({10: torch.zeros(5)}, r"choice_bias \[6\], got \[5\]"),
    "choice_bias of ints": ({10: torch.zeros(6).long()}, "choice_bias in float32, .*got torch.i"),
    "groups that do not fit": ({11: 4}, "num_groups dividing E = 6, got 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    """By the fake too, which is what a compile runs first."""
    changes, message = WRONG[case]
    args = inputs(2, 8, 6, True, True, F32, (2, "softmax", True, None, 2, 1), device)
    args = [changes.get(i, arg) for i, arg in enumerate(args)]
    for place in device, "meta":
        there = [a.to(place) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(ValueError, match=f"router: expected {message}"):
            router(*there)


def test_no_gradient(device):
    x, w, *rest = inputs(*CASES["Qwen3"], device)
    with pytest.raises(RuntimeError, match="router: expected inputs without gradients"):
        router(x, w.requires_grad_(), *rest)
