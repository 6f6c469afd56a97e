import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import _cpu
from moe_compile.ops import skinny_mm as module
from moe_compile.ops.skinny_mm import skinny_mm, skinny_mm_reference

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


WRONG = {
    "x of rank 1": (lambda x, w, b: (x[0], w), r"x \[M, K\], got \[8\]"),
    "w of rank 1": (lambda x, w, b: (x, w[0]), r"w \[K, N\], got \[4\]"),
    "another K": (lambda x, w, b: (x[:, :7], w), r"x \[M, 8\] for w \[8, 4\], got \[2, 7\]"),
    "float64": (lambda x, w, b: (x.double(), w), r"x in float32, float16 or bfloat16, got"),
    "w of another dtype": (lambda x, w, b: (x, w.half()), r"w in x's dtype torch.float32, got"),
    "bias of another size": (lambda x, w, b: (x, w, b[:3]), r"bias \[4\], got \[3\]"),
    "bias of rank 2": (lambda x, w, b: (x, w, b[None]), r"bias \[4\], got \[1, 4\]"),
    "bias of another dtype": (lambda x, w, b: (x, w, b.half()), r"bias in x's dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    change, message = WRONG[case]
    args = change(*inputs(2, 8, 4, device))
    with pytest.raises(ValueError, match=f"skinny_mm: expected {message}"):
        skinny_mm(*args)
    with pytest.raises(ValueError, match=f"skinny_mm: expected {message}"):
        skinny_mm(*(a.to("meta") for a in args))
