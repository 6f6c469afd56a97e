import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops.skinny_mm import skinny_mm, skinny_mm_reference
from moe_compile.ops.skinny_mms import skinny_mms, skinny_mms_reference, skinny_mms_triton

FUNCTIONS = [skinny_mms, skinny_mms_triton]
CASES = {  # M, K, columns of each, which have a bias
    "q, k, v": (1, 64, (12, 3, 3), ()),
    "all with bias": (2, 40, (5, 3), (0, 1)),
    "some with bias": (1, 37, (1, 9, 1, 4), (0, 3)),
    "one": (3, 40, (7,), (0,)),
    "tensor cores": (9, 40, (20, 5, 8), (1,)),
    "no rows": (0, 16, (4, 5), ()),
    "one without columns": (2, 16, (4, 0, 3), (1, 2)),
    "none has columns": (2, 16, (0, 0), ()),
    "nothing to add": (2, 0, (4, 3), (1,)),
    "many rows": (17, 16, (4, 3), (1,)),
}


def inputs(M, K, columns, has_bias, device, dtype=torch.float32):
    x = torch.randn(M, K, device=device).to(dtype)
    ws = [torch.randn(N, K, device=device).to(dtype).t() for N in columns]
    biases = [torch.randn(N, device=device).to(dtype) for N in columns]
    return x, ws, [b if i in has_bias else None for i, b in enumerate(biases)]


def assert_all_close(got, x, ws, biases):
    for y, w, bias in zip(got, ws, biases, strict=True):
        assert_close(y, skinny_mm_reference, x, w, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, dtype, device):
    x, ws, biases = inputs(*CASES[case], device, dtype)
    assert_all_close(fn(x, ws, biases), x, ws, biases)
    ws = [w.contiguous() for w in ws]
    assert_all_close(fn(x, ws, biases), x, ws, biases)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    x, ws, biases = inputs(2, 40, (6, 9, 4), (0, 2), device)
    x = torch.cat((x, x), 1)[:, 3:43]
    parts = torch.cat(ws, 1).contiguous()
    split = list(parts.split([6, 9, 4], 1))
    mixed = [ws[0], ws[1].contiguous(), torch.stack((ws[2], ws[2]), -1)[..., 0]]
    biases[0] = torch.stack((biases[0], biases[0]), -1)[:, 0]
    for weights in split, mixed, [ws[0]] * 3:
        Ns = [w.shape[1] for w in weights]
        bias = biases if Ns == [6, 9, 4] else [None] * 3
        assert_all_close(fn(x, weights, bias), x, weights, bias)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_each_is_skinny_mm(fn, device):
    x, ws, biases = inputs(2, 48, (6, 4), (1,), device, torch.bfloat16)
    for y, w, bias in zip(fn(x, ws, biases), ws, biases, strict=True):
        torch.testing.assert_close(y, skinny_mm(x, w, bias))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_stays_in_its_row_and_weight(fn, device):
    x, ws, biases = inputs(3, 40, (5, 6, 3), (), device)
    x[1, 7], ws[1][3, 4] = float("nan"), float("inf")
    first, second, third = fn(x, ws, biases)
    assert first[1].isnan().all()
    for y in (first, third, second[:, [0, 1, 2, 3, 5]]):
        assert y[[0, 2]].isfinite().all()
    assert not second[:, 4].isfinite().any()


def test_opcheck(device):
    for case in "some with bias", "one", "no rows":
        torch.library.opcheck(skinny_mms, inputs(*CASES[case], device))


def test_no_gradient(device):
    x, ws, biases = inputs(1, 8, (4, 3), (), device)
    ws[1].requires_grad_()
    with pytest.raises(RuntimeError, match="skinny_mms: expected inputs without gradients"):
        skinny_mms(x, ws, biases)
    with torch.no_grad():
        skinny_mms(x, ws, biases)


@torch.no_grad()
def test_compiled(device):
    def layer(x, w, v, bias):
        return torch.ops.moe_compile.skinny_mms(x, [w.t(), v.t()], [None, bias])

    x, (w, v), (_, bias) = inputs(2, 24, (8, 6), (1,), device)
    fn = torch.compile(layer, fullgraph=True)
    want = skinny_mms_reference(x, [w, v], [None, bias])
    torch.testing.assert_close(fn(x, w.t(), v.t(), bias), want)


WRONG = {
    "no weight": (lambda x, w, b: (x, [], []), "1 to 4 weights, got 0"),
    "five weights": (lambda x, w, b: (x, [w[0]] * 5, [None] * 5), "1 to 4 weights, got 5"),
    "a bias less": (lambda x, w, b: (x, w, b[:1]), "2 biases or None, one a weight, got 1"),
    "x of rank 1": (lambda x, w, b: (x[0], w, b), r"x \[M, K\], got \[8\]"),
    "w of rank 1": (lambda x, w, b: (x, [w[0], w[1][0]], b), r"w \[K, N\], got \[3\]"),
    "another K": (lambda x, w, b: (x, [w[0], w[1][:7]], b), r"x \[M, 7\] for w \[7, 3\], got"),
    "float64": (lambda x, w, b: (x.double(), w, b), r"x in float32, float16 or bfloat16, got"),
    "dtypes": (lambda x, w, b: (x, [w[0], w[1].half()], b), r"w in x's dtype torch.float32, got"),
    "size of bias": (lambda x, w, b: (x, w, [b[0], b[1][:2]]), r"bias \[3\], got \[2\]"),
    "dtype of bias": (lambda x, w, b: (x, w, [b[0], b[1].half()]), r"bias in x's dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    change, message = WRONG[case]
    args = change(*inputs(2, 8, (4, 3), (0, 1), device))
    for fn in FUNCTIONS:
        with pytest.raises(ValueError, match=f"skinny_mms: expected {message}"):
            fn(*args)
    x, *lists = args
    lists = [[None if t is None else t.to("meta") for t in many] for many in lists]
    with pytest.raises(ValueError, match=f"skinny_mms: expected {message}"):
        skinny_mms(x.to("meta"), *lists)
