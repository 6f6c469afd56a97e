import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops.grouped_mm import grouped_mm, grouped_mm_reference, grouped_mm_triton
from moe_compile.ops.sort_tokens import sort_tokens_reference

FUNCTIONS = [grouped_mm, grouped_mm_triton]
CASES = {  # rows of each expert, rows of none, H, G
    "some": ([3, 1, 5, 2], 0, 64, 48),
    "experts with none": ([0, 7, 0, 0, 4, 0], 0, 40, 24),
    "one expert takes all": ([0, 0, 37], 0, 32, 16),
    "one row": ([0, 1, 0], 0, 16, 8),
    "one expert": ([5], 0, 200, 40),
    "no rows": ([0, 0], 0, 16, 8),
    "rows of none": ([2, 0, 3], 20, 24, 40),
    "only rows of none": ([0, 0], 5, 16, 8),
    "many small experts": ([1, 0, 2] * 6, 3, 16, 8),
    "no columns": ([2, 1], 0, 16, 0),
    "one column": ([2, 1], 1, 17, 1),
}


def inputs(sizes, num_unowned, H, G, device, dtype=torch.float32):
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    x = torch.randn(sum(sizes) + num_unowned, H, device=device).to(dtype)
    w = torch.randn(len(sizes), G, H, device=device).to(dtype).transpose(1, 2)
    return x, w, offsets


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, dtype, device):
    x, w, offsets = inputs(*CASES[case], device, dtype)
    assert_close(fn(x, w, offsets), grouped_mm_reference, x, w, offsets)


BLOCKS = [
    Blocks(1, 16, 32, 1, 2, 3),
    Blocks(16, 32, 32, 1, 2, 2),
    Blocks(16, 16, 64, 4, 4, 3),
    Blocks(32, 16, 32, 8, 4, 2),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
@pytest.mark.parametrize("case", ["some", "one expert takes all", "rows of none", "one column"])
def test_any_blocks_give_the_same(case, blocks, dtype, device):
    x, w, offsets = inputs(*CASES[case], device, dtype)
    rows = torch.randperm(x.shape[0], device=device).int()
    bias = torch.randn(w.shape[0], w.shape[2], device=device).to(dtype)
    y = grouped_mm_triton(x, w, offsets, rows, 1, bias, blocks)
    assert_close(y, grouped_mm_reference, x, w, offsets, rows, 1, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_rows_and_bias(fn, dtype, device):
    T, K, E, H, G = 11, 3, 5, 72, 40
    rows, offsets, _ = sort_tokens_reference(torch.randint(-1, E + 1, (T, K), device=device), E)
    x, w, _ = inputs([0] * E, T, H, G, device, dtype)
    bias = torch.randn(E, G, device=device).to(dtype)
    args = (x, w, offsets, rows, K, bias)
    assert_close(fn(*args), grouped_mm_reference, *args)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nothing_of_no_owner_is_read(fn, device):
    x, w, offsets = inputs([2, 0, 3], 6, 24, 40, device)
    w[1] = float("nan")
    x[5:] = float("nan")
    y = fn(x, w, offsets)
    assert (y[5:] == 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_stays_in_its_row(fn, device):
    x, w, offsets = inputs([4, 3], 0, 24, 8, device)
    x[2, 5] = float("nan")
    y = fn(x, w, offsets)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5, 6]].isfinite().all()


STRIDES = {
    "columns contiguous": lambda w: w.contiguous(),
    "experts last": lambda w: w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "half of a wider weight": lambda w: torch.cat([w, w], 2)[:, :, 5 : 5 + w.shape[2]],
    "one weight for all": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, strides, device):
    x, w, offsets = inputs([3, 0, 6], 2, 40, 24, device)
    x, w = x.t().contiguous().t(), STRIDES[strides](w)
    assert_close(fn(x, w, offsets), grouped_mm_reference, x, w, offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_expert", [1, 12, 30, 60, 130, 400])
def test_every_block_size(per_expert, dtype, device):
    E, K, H, G = 9, 4, 520, 392
    T = per_expert * E // K + 1
    ids = torch.rand(T, E, device=device).square().topk(K).indices
    rows, offsets, _ = sort_tokens_reference(ids, E + 1)
    x, w, _ = inputs([0] * (E + 1), T, H, G, device, dtype)
    for weight in w, w.contiguous():
        args = (x, weight, offsets, rows, K)
        assert_close(grouped_mm(*args), grouped_mm_reference, *args)


@pytest.mark.gpu
def test_weights_of_more_than_2_31_elements(device):
    E, H, G = 3, 30_000, 30_000
    w = torch.empty(E, G, H, device=device, dtype=torch.bfloat16).normal_()
    x, offsets = torch.randn(E, H, device=device).bfloat16(), torch.arange(1, E + 1, device=device)
    y = grouped_mm(x, w.transpose(1, 2), offsets.int())
    assert_close(y[2], lambda x, w: w @ x, x[2], w[2])


def test_opcheck(device):
    x, w, offsets = inputs([3, 0, 2], 2, 16, 8, device)
    rows = torch.randperm(7, device=device).int()
    torch.library.opcheck(grouped_mm, (x, w, offsets))
    torch.library.opcheck(grouped_mm, (x, w, offsets, rows, 1, torch.randn(3, 8, device=device)))


def wrong(**changes):
    x, w, offsets = inputs([3, 0, 2], 0, 16, 8, "cpu")
    args = {"x": x, "w": w, "offsets": offsets, "rows": None, "top_k": 1, "bias": None}
    return {**args, **changes}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (wrong(x=torch.ones(5)), r"x \[N, H\], got \[5\]"),
        (wrong(x=torch.ones(5, 17)), r"x \[N, 16\] for w \[3, 16, 8\], got \[5, 17\]"),
        (wrong(x=torch.ones(5, 16).long()), "x in float32, .*, got torch.int64"),
        (wrong(w=torch.ones(16, 8)), r"w \[E, H, G\], got \[16, 8\]"),
        (wrong(w=torch.ones(3, 16, 8).half()), "w in x's dtype torch.float32, got torch.float16"),
        (wrong(offsets=torch.ones(2).int()), r"offsets \[3\], got \[2\]"),
        (wrong(offsets=torch.ones(3).long()), "int32 offsets, got torch.int64"),
        (wrong(rows=torch.ones(5).long()), "int32 rows, got torch.int64"),
        (wrong(rows=torch.ones(5, 1).int()), r"rows \[R\], got \[5, 1\]"),
        (wrong(top_k=0), "top_k >= 1, got 0"),
        (wrong(bias=torch.ones(8)), r"bias \[3, 8\], got \[8\]"),
        (wrong(bias=torch.ones(3, 8).half()), "bias in x's dtype .*, got torch.float16"),
        (wrong(offsets=torch.ones(3, device="meta").int()), "all tensors on one device, got"),
    ],
)
def test_wrong_input(args, message):
    """By the fake too, which is what a compile runs first."""
    with pytest.raises(ValueError, match=f"grouped_mm: expected {message}"):
        grouped_mm_triton(*args.values())
    if "one device" not in message:
        with pytest.raises(ValueError, match=f"grouped_mm: expected {message}"):
            grouped_mm(*args.values())
        with pytest.raises(ValueError, match=f"grouped_mm: expected {message}"):
            grouped_mm(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args.values()))
