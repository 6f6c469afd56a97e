import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops._route_many_kernel import choose_rows
from moe_compile.ops.route import route, route_reference, route_triton

FUNCTIONS = [route, route_triton]
ROWS = [1, 4]  # tokens of one program
DEEPSEEK = {
    "score": "sigmoid",
    "num_groups": 4,
    "top_groups": 2,
    "group_score": "top2_sum",
    "renormalize": True,
    "eps": 1e-20,
    "scale": 2.5,
}
OPTIONS = {
    "switch": {},
    "qwen": {"renormalize": True},
    "mixtral": {"score_first": False},
    "llama4": {"score": "sigmoid", "score_first": False},
    "raw": {"score": "none", "scale": 0.5},
    "sigmoid": {"score": "sigmoid", "renormalize": True, "eps": 1e-9},
    "deepseek": DEEPSEEK,
    "best of groups": {"num_groups": 3, "top_groups": 2},
    "all groups": {"num_groups": 4, "top_groups": 4, "group_score": "top2_sum"},
}


def distinct(T, E, device, dtype=torch.float32):
    """Logits without ties, in any dtype."""
    rows = torch.stack([torch.randperm(E, device=device) for _ in range(T)])
    return ((rows - E / 2) / 16).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, options, dtype, device):
    logits = distinct(5, 24, device, dtype)
    assert_close(fn(logits, 4, **options), route_reference, logits, 4, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 5, 5), (16, 60, 6), (4, 512, 22), (0, 8, 2)])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_sizes(fn, shape, device):
    T, E, top_k = shape
    logits = distinct(T, E, device) if T else torch.empty(T, E, device=device)
    assert_close(fn(logits, top_k), route_reference, logits, top_k)


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_bias_chooses_but_does_not_weigh(fn, bias_dtype, device):
    logits = torch.randn(6, 32, device=device)
    bias = torch.randn(32, device=device).to(bias_dtype)
    for options in (), (8, 3, "top2_sum", True, 1e-20, 2.5):
        args = (logits, 4, "sigmoid", True, bias, *options)
        assert_close(fn(*args), route_reference, *args)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_dtype_of_weights(fn, dtype, device):
    logits = distinct(4, 16, device)
    assert_close(fn(logits, 3, dtype=dtype), route_reference, logits, 3, dtype=dtype)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    for logits in distinct(5, 24, device).t().contiguous().t(), distinct(5, 48, device)[:, 3:27]:
        assert_close(fn(logits, 4), route_reference, logits, 4)


@pytest.mark.parametrize("rows", ROWS)
def test_lowest_experts_of_equals(rows, device):
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 0.0], [0.0, -0.0, 0.0, -0.0, 0.0, -0.0]])
    for options in {}, {"score": "none"}, {"score_first": False}:
        _, ids = route_triton(logits.to(device), 4, **options, rows=rows)
        assert ids.tolist() == [[1, 4, 0, 2], [0, 1, 2, 3]]


def test_lowest_groups_of_equals(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.0, 0.0, 2.0, 0.0]], device=device)
    _, ids = route_triton(logits, 2, num_groups=4, top_groups=1)
    assert ids.tolist() == [[2, 3]]


UNGROUPED = {name: options for name, options in OPTIONS.items() if "num_groups" not in options}


@pytest.mark.parametrize("options", UNGROUPED.values(), ids=UNGROUPED)
def test_several_tokens_a_program(options, device):
    for E, top_k, rows, dtype in (24, 4, 2, torch.float32), (8, 2, 64, torch.bfloat16):
        logits = distinct(5, E, device, dtype)
        actual = route_triton(logits, top_k, **options, rows=rows)
        assert_close(actual, route_reference, logits, top_k, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 5, 5), (3, 60, 6), (5, 128, 22)])
def test_sizes_of_several_tokens_a_program(shape, device):
    T, E, top_k = shape
    wide = distinct(T, E + 3, device)
    for logits in distinct(T, E, device), wide[:, 3:], wide[:, :E].t().contiguous().t():
        actual = route_triton(logits, top_k, dtype=torch.float16, rows=4)
        assert_close(actual, route_reference, logits, top_k, dtype=torch.float16)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "none"])
def test_bias_of_several_tokens_a_program(score, device):
    logits, bias = torch.randn(6, 20, device=device), torch.randn(20, device=device).half()
    args = (logits, 3, score, True, bias, 1, 1, "max", True, 1e-9, 2.5)
    assert_close(route_triton(*args, rows=4), route_reference, *args)


def test_many_tokens(device):
    """Of few experts several share a program, the last of which is not full."""
    logits = distinct(520, 8, device)
    assert_close(route_triton(logits, 2), route_reference, logits, 2)
    bias = torch.zeros(8, device=device)
    grouped = (logits[:513], 2, "sigmoid", True, bias, 2, 1)
    for args in (logits[:513], 2), grouped:
        assert_close(route(*args), route_reference, *args)


def test_tokens_of_one_program():
    assert [choose_rows(T, 8) for T in (1, 512, 513, 8192, 2**20)] == [1, 1, 16, 16, 64]
    assert [choose_rows(T, 128) for T in (512, 1024, 2048, 8192)] == [1, 2, 4, 4]
    assert [choose_rows(8192, E) for E in (1, 5, 33, 64, 129, 256)] == [32, 16, 8, 8, 1, 1]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -3e38])
def test_ids_are_distinct_whatever_the_logits(value, options, device):
    logits = torch.randn(3, 24, device=device)
    logits[0] = value
    logits[1, ::3] = value
    logits[2, 7] = value
    expected = route_triton(logits, 5, **options)
    for weights, ids in expected, route_triton(logits, 5, **options, rows=4):
        assert ((ids >= 0) & (ids < 24)).all()
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(weights, expected[0], equal_nan=True)


@pytest.mark.parametrize("rows", ROWS)
def test_nan_is_the_largest(rows, device):
    logits = torch.tensor([[1.0, INF, NAN, 2.0, -NAN]], device=device)
    weights, ids = route_triton(logits, 4, "none", rows=rows)
    assert ids.tolist() == [[2, 4, 1, 3]]
    assert weights.isnan().tolist() == [[True, True, False, False]]


@pytest.mark.gpu
def test_like_topk_of_ties(device):
    """The set that torch.topk takes on a GPU, where bfloat16 logits tie all the time."""
    logits = torch.randn(8192, 128, device=device).bfloat16()
    expected = logits.topk(8).indices
    for rows in None, 1, 8:
        _, ids = route_triton(logits, 8, score_first=False, rows=rows)
        assert torch.equal(ids.sort().values, expected.sort().values)


def test_opcheck(device):
    logits = torch.randn(5, 24, device=device)
    bias = torch.randn(24, device=device)
    torch.library.opcheck(route, (logits, 4))
    args = (logits, 4, "sigmoid", True, bias, 4, 2, "top2_sum", True, 1e-20, 2.5, torch.bfloat16)
    torch.library.opcheck(route, args)


E24 = torch.zeros(2, 24)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(24), 2), r"logits \[T, E\], got \[24\]"),
        ((E24.long(), 2), "logits in float32, .*, got torch.int64"),
        ((E24, 0), "top_k in 1..24, got 0"),
        ((E24, 25), "top_k in 1..24, got 25"),
        ((E24, 13, "softmax", True, None, 4, 2), "top_k in 1..12, got 13"),
        ((E24, 2, "relu"), "score in .*, got relu"),
        ((E24, 2, "softmax", True, torch.zeros(23)), r"bias \[24\], got \[23\]"),
        ((E24, 2, "softmax", True, torch.zeros(24).long()), "bias in float32, .*, got torch.int64"),
        ((E24, 2, "softmax", True, None, 5), "num_groups dividing E = 24, got 5"),
        ((E24, 2, "softmax", True, None, 4, 5), r"top_groups in 1..4, got 5"),
        ((E24, 2, "softmax", True, None, 4, 2, "mean"), "group_score in .*, got mean"),
        ((E24, 2, "softmax", True, None, 24, 2, "top2_sum"), "groups of two or more .*, got 1"),
        ((E24, 2, "softmax", False, torch.zeros(24)), "bias and groups only with score_first, got"),
    ],
)
def test_wrong_input(args, message, device):
    """By the fake too, which is what a compile runs first."""
    for place in device, "meta":
        there = (a.to(place) if isinstance(a, torch.Tensor) else a for a in args)
        with pytest.raises(ValueError, match=f"route: expected {message}"):
            route(*there)


def test_wrong_output_dtype(device):
    with pytest.raises(ValueError, match=r"route: expected dtype float32, .*, got torch.int32"):
        route(E24.to(device), 2, dtype=torch.int32)
