import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import _cpu
from moe_compile.ops import skinny_mm as module
from moe_compile.ops._skinny_mm_kernel import Blocks, choose_blocks
from moe_compile.ops.skinny_mm import skinny_mm, skinny_mm_reference, skinny_mm_triton

SHAPES = [  # M, K, N
    *((M, 64, 96) for M in (0, 1, 3, 8, 16, 17)),
    (1, 1, 1),
    (1, 37, 5),
    (3, 129, 70),
    (16, 1000, 3),
    (2, 0, 8),
    (2, 8, 0),
]
STRIDES = {
    "K contiguous": lambda w: w.t().contiguous().t(),
    "N contiguous": lambda w: w,
    "neither": lambda w: torch.stack((w, w), -1)[..., 0],
    "part of a larger weight": lambda w: torch.cat((w, w, w))[5 : 5 + len(w)],
    "one row for all": lambda w: w[:1].expand(w.shape),
}


def inputs(M, K, N, device, dtype=torch.float32):
    w = torch.randn(N, K, device=device).to(dtype).t()
    return torch.randn(M, K, device=device).to(dtype), w, torch.randn(N, device=device).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x, w, bias = inputs(*shape, device, dtype)
    assert_close(skinny_mm(x, w), skinny_mm_reference, x, w)
    assert_close(skinny_mm(x, w, bias), skinny_mm_reference, x, w, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_strided_input(strides, dtype, device):
    x, w, bias = inputs(3, 40, 72, device, dtype)
    w = STRIDES[strides](w.contiguous())
    x = torch.cat((x, x, x), 1)[:, 7 : 7 + x.shape[1]]
    assert_close(skinny_mm(x, w, bias), skinny_mm_reference, x, w, bias)
    x, bias = x.t().contiguous().t(), torch.stack((bias, bias), -1)[:, 0]
    assert_close(skinny_mm(x, w, bias), skinny_mm_reference, x, w, bias)


KERNEL_SHAPES = [  # M, K, N
    (0, 8, 4),
    (1, 37, 5),
    (1, 1, 1),
    (2, 700, 3),
    (3, 64, 1),
    (4, 129, 9),
    (5, 600, 11),
    (16, 40, 17),
    (17, 40, 6),
    (2, 0, 3),
    (2, 3, 0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["K contiguous", "N contiguous"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel(shape, layout, dtype, device):
    x, w, bias = inputs(*shape, device, dtype)
    w = STRIDES[layout](w.contiguous())
    assert_close(skinny_mm_triton(x, w), skinny_mm_reference, x, w)
    assert_close(skinny_mm_triton(x, w, bias), skinny_mm_reference, x, w, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_kernel_on_strided_input(strides, dtype, device):
    for M in 2, 6:
        x, w, bias = inputs(M, 40, 12, device, dtype)
        w, x = STRIDES[strides](w.contiguous()), torch.cat((x, x, x), 1)[:, 7:47]
        assert_close(skinny_mm_triton(x, w, bias), skinny_mm_reference, x, w, bias)
        x, bias = x.t().contiguous().t(), torch.stack((bias, bias), -1)[:, 0]
        assert_close(skinny_mm_triton(x, w, bias), skinny_mm_reference, x, w, bias)


BLOCKS = [
    Blocks(1, 64, False, 8, 4),
    Blocks(4, 32, False, 2, 1),
    Blocks(16, 128, False, 4, 2),
    Blocks(8, 32, True, 4, 3),
    Blocks(32, 64, True, 4, 4),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
def test_any_blocks_give_the_same(blocks, dtype, device):
    for M, K in (1, 128), (4, 100):
        x, w, bias = inputs(M, K, 19, device, dtype)
        for weight in w, w.contiguous():
            y = skinny_mm_triton(x, weight, bias, blocks=blocks)
            assert_close(y, skinny_mm_reference, x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fn", [skinny_mm, skinny_mm_triton], ids=["op", "triton"])
@pytest.mark.parametrize("M", [0, 1, 3, 6, 17])
def test_a_residual_is_added_to_what_was_rounded(M, fn, dtype, device):
    x, w, bias = inputs(M, 40, 9, device, dtype)
    residual = torch.randn(9, M, device=device).to(dtype).t()
    for weight in w, w.contiguous():
        out = fn(x, weight, bias, residual)
        assert out.is_contiguous()
        assert torch.equal(out, fn(x, weight, bias) + residual)
        assert torch.equal(fn(x, weight, None, residual), fn(x, weight) + residual)


@pytest.mark.parametrize("M", [3, 6])
def test_nan_stays_in_its_row(M, device):
    x, w, _ = inputs(M, 40, 9, device, torch.bfloat16)
    x[1, 7] = float("nan")
    y = skinny_mm_triton(x, w)
    assert y[1].isnan().all()
    assert y[[0, *range(2, M)]].isfinite().all()


@pytest.mark.parametrize("M", [1, 4, 5, 16])
@pytest.mark.parametrize("k_contiguous", [True, False])
def test_blocks_fill_a_gpu(k_contiguous, M):
    """Two programs for each SM where columns allow it, and no more than they can hold."""
    for N in (1, 128, 512, 2048, 5120, 32768):
        b = choose_blocks(M, 2048, N, torch.bfloat16, k_contiguous)
        assert -(-N // b.n) >= 264 or b.n <= (2 if not b.dot and k_contiguous else 16)
        assert b.n & (b.n - 1) == b.k & (b.k - 1) == b.warps & (b.warps - 1) == 0
        assert 2 * b.stages * b.k * (b.n + M) <= 100 * 1024


def test_no_warp_without_work():
    assert choose_blocks(1, 2048, 128, torch.bfloat16, True)[1:4] == (1024, False, 4)
    assert choose_blocks(1, 512, 128, torch.bfloat16, True)[1:4] == (512, False, 2)
    assert choose_blocks(1, 8, 128, torch.bfloat16, True)[1:4] == (256, False, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", range(1, 18))
def test_real_shapes(M, dtype, device):
    for K, N in (2048, 128), (2048, 4096), (4096, 2048), (2880, 512), (1000, 777):
        x, w, bias = inputs(M, K, N, device, dtype)
        for weight in w, w.contiguous():
            if M <= module.MOST_ROWS:  # above it torch's own product
                assert_close(skinny_mm(x, weight, bias), skinny_mm_reference, x, weight, bias)
            y, residual = skinny_mm(x, weight, bias), torch.randn(M, N, device=device).to(dtype)
            assert torch.equal(y, skinny_mm(x, weight, bias))
            assert torch.equal(y + residual, skinny_mm(x, weight, bias, residual))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(module, "_library", lambda: None)
    x, w, bias = inputs(3, 40, 72, "cpu")
    torch.testing.assert_close(module._cpu(x, w, bias), torch.addmm(bias, x, w))


@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows_never_reach_torch_mm(has_bias, monkeypatch):
    if _cpu._library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(module, "_mm", None)
    for M in range(1, module.MOST_ROWS + 1):
        x, w, bias = inputs(M, 40, 72, "cpu")
        for fn in skinny_mm, module._cpu:
            fn(x, w, bias if has_bias else None)


def test_opcheck(device):
    x, w, bias = inputs(3, 24, 72, device)
    torch.library.opcheck(skinny_mm, (x, w))
    torch.library.opcheck(skinny_mm, (x, w, bias))
    torch.library.opcheck(skinny_mm, (x, w, None, x.new_ones(3, 72)))


WRONG = {
    "x of rank 1": (lambda x, w, b: (x[0], w), r"x \[M, K\], got \[8\]"),
    "w of rank 1": (lambda x, w, b: (x, w[0]), r"w \[K, N\], got \[4\]"),
    "another K": (lambda x, w, b: (x[:, :7], w), r"x \[M, 8\] for w \[8, 4\], got \[2, 7\]"),
    "float64": (lambda x, w, b: (x.double(), w), r"x in float32, float16 or bfloat16, got"),
    "w of another dtype": (lambda x, w, b: (x, w.half()), r"w in x's dtype torch.float32, got"),
    "bias of another size": (lambda x, w, b: (x, w, b[:3]), r"bias \[4\], got \[3\]"),
    "bias of rank 2": (lambda x, w, b: (x, w, b[None]), r"bias \[4\], got \[1, 4\]"),
    "bias of another dtype": (lambda x, w, b: (x, w, b.half()), r"bias in x's dtype"),
    "residual of one row": (lambda x, w, b: (x, w, b, b[None]), r"residual \[2, 4\], got \[1, 4\]"),
    "residual of another dtype": (
        lambda x, w, b: (x, w, b, x[:, :4].half()),
        "residual in the result's torch.float32, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    change, message = WRONG[case]
    args = change(*inputs(2, 8, 4, device))
    with pytest.raises(ValueError, match=f"skinny_mm: expected {message}"):
        skinny_mm(*args)
    with pytest.raises(ValueError, match=f"skinny_mm: expected {message}"):
        skinny_mm(*(a.to("meta") for a in args))
