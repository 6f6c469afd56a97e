import sys

import pytest
import torch

from moe_compile.ops.sort_tokens import sort_tokens, sort_tokens_reference, sort_tokens_triton

FUNCTIONS = [sort_tokens, sort_tokens_triton]
CASES = {  # ids and the number of experts
    "some": lambda: (torch.randint(0, 8, (13, 3)), 8),
    "one row": lambda: (torch.tensor([[5]]), 7),
    "empty": lambda: (torch.empty(0, 2, dtype=torch.int64), 5),
    "no slots": lambda: (torch.empty(3, 0, dtype=torch.int64), 5),
    "one expert takes all": lambda: (torch.full((40, 2), 3), 6),
    "one expert": lambda: (torch.zeros(4, 1, dtype=torch.int64), 1),
    "more experts than rows": lambda: (torch.randint(0, 99, (4, 2)), 99),
    "-1, E and foreign": lambda: (torch.randint(-3, 9, (50, 3)), 5),
    "no owner": lambda: (torch.full((9, 2), -1), 4),
    "int32": lambda: (torch.randint(-1, 4, (20, 2), dtype=torch.int32), 4),
    "huge ids": lambda: (torch.tensor([[2**40, 1], [-(2**40), 2**32 + 1]]), 3),
    "strided": lambda: (torch.randint(0, 5, (3, 20)).t(), 5),
}


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(fn, case, device):
    ids, num_experts = CASES[case]()
    check(fn, ids.to(device), num_experts)


def check(fn, ids, num_experts):
    for got, expected in zip(
        fn(ids, num_experts), sort_tokens_reference(ids, num_experts), strict=True
    ):
        assert got.dtype == torch.int32
        assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_kernels_for_many_rows(case, device, monkeypatch):
    module = sys.modules[sort_tokens_triton.__module__]
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(module, "BLOCK_R", 32)
    ids, num_experts = CASES[case]()
    check(sort_tokens_triton, ids.to(device), num_experts)


def test_many_rows(device):
    check(sort_tokens_triton, torch.randint(-1, 21, (701, 3), device=device), 20)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 8, 128, 500])
def test_prefill(num_experts, device):
    check(sort_tokens, torch.randint(-1, num_experts + 1, (20_001, 8), device=device), num_experts)


def test_what_it_means():
    ids = torch.tensor([[2, 0], [-1, 2]])
    rows, offsets, position = sort_tokens(ids, 3)
    assert rows.tolist() == [1, 0, 3, 2]  # expert 0: pair 1; expert 2: pairs 0 and 3; none: pair 2
    assert offsets.tolist() == [1, 1, 3]
    assert position.tolist() == [[1, 0], [-1, 2]]


def test_opcheck(device):
    torch.library.opcheck(sort_tokens, (torch.randint(-1, 4, (6, 2), device=device), 4))


@pytest.mark.parametrize(
    ("ids", "num_experts", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 2, r"ids \[T, K\], got \[3\]"),
        (torch.zeros(3, 2), 2, r"ids in int32 or int64, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, r"num_experts >= 1, got 0"),
    ],
)
def test_wrong_input(ids, num_experts, message, device):
    with pytest.raises(ValueError, match=f"sort_tokens: expected {message}"):
        sort_tokens(ids.to(device), num_experts)
