import pytest
import torch
from float8 import assert_close_fp8, scales

from moe_compile.ops import moe
from moe_compile.ops._skinny_mm_fp8_kernel import Blocks
from moe_compile.ops.linear_fp8 import linear_fp8_reference
from moe_compile.ops.rms_norm_mms import rms_norm
from moe_compile.ops.skinny_mms_fp8 import (
    skinny_mms_fp8,
    skinny_mms_fp8_reference,
    skinny_mms_fp8_triton,
)

FP8 = torch.float8_e4m3fn
FUNCTIONS = [skinny_mms_fp8, skinny_mms_fp8_triton]
CASES = {  # M, K, columns of each, which have a bias
    "q, k, v": (1, 256, (12, 3, 3), ()),
    "some with bias": (2, 640, (5, 3), (1,)),
    "a short group": (1, 200, (1, 9, 1, 4), (0, 3)),
    "one": (4, 300, (7,), (0,)),
    "tensor cores": (9, 384, (140, 5), (1,)),
    "tensor cores, a short group": (16, 200, (20,), ()),
    "no rows": (0, 128, (4, 5), ()),
    "one without columns": (2, 128, (4, 0, 3), (1, 2)),
    "none has columns": (2, 128, (0, 0), ()),
    "nothing to add": (2, 0, (4, 3), (1,)),
    "many rows": (17, 128, (4, 3), (1,)),
}
EVERY_BLOCK = [
    Blocks(n, k, dot, ahead, 1, 2)
    for n, k, dot in [(32, 128, True), (64, 512, False), (32, 128, False)]
    for ahead in (False, True)
]
HOW = [{"power_of_two": True, "amax_floor": 2.0}, {"amax_floor": 0.0}]


def inputs(M, K, columns, has_bias, device, x_dtype=torch.bfloat16, dtype=torch.bfloat16):
    """Values and scales far apart, so that what is scaled or quantised elsewhere is seen."""
    x = (torch.randn(M, K, device=device) * scales(device, M, K)).to(x_dtype)
    ws = [(torch.randn(N, K, device=device) * 4).to(FP8) for N in columns]
    w_scales = [scales(device, -(-N // 128), -(-K // 128)) for N in columns]
    biases = [torch.randn(N, device=device).to(dtype) for N in columns]
    return x, ws, w_scales, [b if i in has_bias else None for i, b in enumerate(biases)]


def assert_all_close(got, x, ws, w_scales, biases, dtype=torch.bfloat16, **how):
    """Against products of just what `quant_fp8` makes of x: on a GPU, ties may round otherwise."""
    q = moe.quant_fp8(x, **how)
    for y, *weight in zip(got, ws, w_scales, biases, strict=True):
        assert y.dtype == dtype
        assert_close_fp8(y, linear_fp8_reference, *q, *weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, dtype, device):
    args = inputs(*CASES[case], device, dtype=dtype)
    assert_all_close(fn(*args, dtype=dtype), *args, dtype=dtype)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("blocks", EVERY_BLOCK, ids=str)
def test_any_blocks(blocks, how, device):
    args = inputs(2, 328, (130, 7), (1,), device, torch.float32, torch.float16)
    got = skinny_mms_fp8_triton(*args, **how, dtype=torch.float16, blocks=blocks)
    assert_all_close(got, *args, dtype=torch.float16, **how)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_is_its_parts(fn, device):
    """Not the values before they were quantised: these differ by 1 in 16."""
    x, ws, w_scales, _ = inputs(2, 256, (6, 4), (), device, torch.float16)
    q = moe.quant_fp8(x)
    got = fn(x, ws, w_scales, [None, None], dtype=torch.float32)
    for y, w, scale in zip(got, ws, w_scales, strict=True):
        want = moe.linear_fp8(*q, w, scale, None, torch.float32)
        torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())


WITH_RESIDUAL = {
    "one row": ((1, 200, (7,), ()), torch.bfloat16),
    "rows with bias": ((3, 256, (9,), (0,)), torch.float16),
    "tensor cores": ((9, 128, (20,), (0,)), torch.bfloat16),
    "many rows": ((17, 128, (3,), ()), torch.float32),
    "no rows": ((0, 128, (3,), ()), torch.bfloat16),
}


@pytest.mark.parametrize("case", WITH_RESIDUAL)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_residual(fn, case, device):
    """Bit by bit the rounded product, plus the residual; whatever its strides are."""
    sizes, dtype = WITH_RESIDUAL[case]
    args = inputs(*sizes, device, dtype=dtype)
    (y,) = fn(*args, dtype=dtype)
    residual = (torch.randn(y.mT.shape, device=device) * 4 * args[2][0].mean()).to(dtype).mT
    (got,) = fn(*args, False, 1e-10, dtype, residual)
    assert torch.equal(got, y + residual)


def norm_inputs(M, K, columns, device, **how):
    x, ws, w_scales, biases = inputs(M, K, columns, range(len(columns)), device, **how)
    norm = (1 + torch.randn(K, device=device) / 2).to(x.dtype)
    return (x, ws, w_scales, biases), norm


def exactly_normed(x, norm, eps):
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.double()


NORMS = {  # M, K, columns
    "q, k, v": (1, 256, (12, 3, 3)),
    "four rows, a short group": (4, 328, (9,)),
    "several blocks": (2, 1224, (5, 3)),
    "many rows": (5, 256, (9,)),
}


@pytest.mark.parametrize("round_first", [True, False])
@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_norm(fn, case, round_first, device):
    """As far from products of what float64 norms, quantised, as norm and product apart are.

    A tenth to spare: a value near a tie may become another float8 in either.
    """
    args, norm = norm_inputs(*NORMS[case], device, dtype=torch.float32)
    how = (False, 1e-10, torch.float32, None, norm, 1e-6, round_first)
    got, eager = fn(*args, *how), skinny_mms_fp8_reference(*args, *how)
    q = moe.quant_fp8(exactly_normed(args[0], norm, 1e-6).float())
    for y, apart, *weight in zip(got, eager, *args[1:], strict=True):
        exact = linear_fp8_reference(*q, *weight, torch.float64)
        errors = [(each - exact).square().mean().sqrt() for each in (y, apart)]
        assert errors[0] <= 1.1 * errors[1] + 1e-5 * exact.abs().max()


def test_norm_in_the_kernel_does_not_round(device):
    """Up to a rare tie the very float8 values of rows normed in float64, by any blocks."""
    args, norm = norm_inputs(3, 328, (40,), device, x_dtype=torch.float32, dtype=torch.float32)
    for blocks in Blocks(8, 512, False, False, 1, 2), Blocks(16, 128, False, False, 1, 2):
        how = {"dtype": torch.float32, "norm_K": norm, "norm_eps": 1e-6, "blocks": blocks}
        (y,) = skinny_mms_fp8_triton(*args, **how)
        q = moe.quant_fp8(exactly_normed(args[0], norm, 1e-6).float())
        want = linear_fp8_reference(*q, *(each[0] for each in args[1:]), torch.float64)
        torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("size", [0.0, 1e-22, 1e-14])
def test_norm_of_rows_below_the_floor(size, device):
    """Rows of almost nothing are off by no more than an eighth of the floor for each value."""
    args, norm = norm_inputs(1, 256, (5,), device, x_dtype=torch.float32, dtype=torch.float32)
    x, (w,), (w_scale,), (bias,) = (args[0] * 0 + size).sign() * size, *args[1:]
    rest = ([w], [w_scale], [bias * 0])
    how = {"dtype": torch.float32, "norm_K": norm, "norm_eps": 1e-6}
    (y,) = skinny_mms_fp8_triton(x, *rest, **how)
    (want,) = skinny_mms_fp8_reference(x, *rest, **how)
    allowed = 1e-10 / 8 * (w.float().abs() * w_scale.repeat_interleave(128, 1)).sum(1)
    assert ((y - want).abs() <= allowed).all()


NOT_IN_THE_KERNEL = {
    "powers of two": (True, 1e-10, 1e-6),
    "a large floor": (False, 2.0, 1e-6),
    "no eps": (False, 1e-10, 0.0),
}


@pytest.mark.parametrize("case", NOT_IN_THE_KERNEL)
def test_norm_before_the_kernel(case, device):
    """Just what the norm and the product apart give."""
    power_of_two, floor, eps = NOT_IN_THE_KERNEL[case]
    args, norm = norm_inputs(2, 256, (5,), device)
    how = (power_of_two, floor, torch.bfloat16)
    got = skinny_mms_fp8_triton(*args, *how, None, norm, eps)
    want = skinny_mms_fp8_triton(rms_norm(args[0], norm, eps, True), *args[1:], *how)
    assert torch.equal(got[0], want[0])


def test_norm_and_residual(device):
    args, norm = norm_inputs(2, 256, (5,), device)
    residual = torch.randn(2, 5, device=device).bfloat16()
    for fn in FUNCTIONS:
        how = (False, 1e-10, torch.bfloat16)
        (y,) = fn(*args, *how, None, norm, 1e-6)
        (got,) = fn(*args, *how, residual, norm, 1e-6)
        assert torch.equal(got, y + residual)


@pytest.mark.gpu  # the interpreter's NaN in float8 is a number
@pytest.mark.parametrize("blocks", EVERY_BLOCK, ids=str)
def test_zeros_over_a_least_amax_of_zero_are_nan_in_their_row_alone(blocks, device):
    """As `quant_fp8` gives them; beyond K nothing is NaN."""
    args = inputs(2, 200, (5,), (), device)
    args[0][1, :128] = 0
    (y,) = skinny_mms_fp8_triton(*args, amax_floor=0.0, blocks=blocks)
    (want,) = skinny_mms_fp8_reference(*args, amax_floor=0.0)
    assert torch.equal(y.isnan(), want.isnan())
    assert y[0].isfinite().all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    x, ws, w_scales, biases = inputs(2, 256, (6, 9), (0, 1), device)
    x = torch.cat((x, x), 1)[:, 3:259]
    ws[0] = torch.cat((ws[0], ws[0]), 1)[:, :256]
    w_scales = [torch.stack((scale, scale), -1)[..., 0].mT.contiguous().mT for scale in w_scales]
    biases[0] = torch.stack((biases[0], biases[0]), -1)[:, 0]
    assert_all_close(fn(x, ws, w_scales, biases), x, ws, w_scales, biases)
    x = x.mT.contiguous().mT
    assert_all_close(fn(x, ws, w_scales, biases), x, ws, w_scales, biases)


def test_opcheck(device):
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")  # test_schema multiplies float8
    for case in "some with bias", "one", "no rows":
        args = inputs(*CASES[case], device)
        torch.library.opcheck(skinny_mms_fp8, args, test_utils=tests)


def test_opcheck_with_norm_and_residual(device):
    args, norm = norm_inputs(4, 300, (7,), device)
    how = {"residual": torch.randn(4, 7, device=device).bfloat16(), "norm": norm, "norm_eps": 1e-6}
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(skinny_mms_fp8, args, how, test_utils=tests)


def test_no_gradient(device):
    x, *rest = inputs(1, 128, (4, 3), (), device)
    with pytest.raises(RuntimeError, match="skinny_mms_fp8: expected inputs without gradients"):
        skinny_mms_fp8(x.requires_grad_(), *rest)


def add(args, *last):
    """Arguments of the first weight alone, and a residual, and a norm."""
    x, *lists = args
    return x, *(each[:1] for each in lists), False, 1e-10, torch.bfloat16, *last


WRONG = {
    "no weight": (lambda x, w, s, b: (x, [], [], []), "1 to 4 weights, got 0"),
    "five": (lambda x, w, s, b: (x, [w[0]] * 5, s, b), "1 to 4 weights, got 5"),
    "a scale less": (lambda x, w, s, b: (x, w, s[:1], b), "2 w_scale, one a weight, got 1"),
    "a bias less": (lambda x, w, s, b: (x, w, s, b[:1]), "2 biases or None, one a weight, got 1"),
    "x of rank 1": (lambda x, w, s, b: (x[0], w, s, b), r"x \[M, K\], got \[8\]"),
    "w of rank 1": (lambda x, w, s, b: (x, [w[0][0], w[1]], s, b), r"w \[N, K\], got \[8\]"),
    "another K": (
        lambda x, w, s, b: (x, [w[0][:, :7], w[1]], s, b),
        r"x \[M, 7\] for w \[4, 7\], got \[2, 8\]",
    ),
    "x in float8": (lambda x, w, s, b: (w[0], w, s, b), "x in float32, float16 or bfloat16, got"),
    "w in bfloat16": (
        lambda x, w, s, b: (x, [w[0].bfloat16(), w[1]], s, b),
        r"w in torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "w along N": (
        lambda x, w, s, b: (x, [w[0].t().contiguous().t(), w[1]], s, b),
        r"w stored along K, got \(1, 4\)",
    ),
    "a scale for each": (
        lambda x, w, s, b: (x, w, [s[0].expand(4, 1), s[1]], b),
        r"w_scale \[1, 1\], got \[4, 1\]",
    ),
    "scale in half": (
        lambda x, w, s, b: (x, w, [s[0].half(), s[1]], b),
        "w_scale in float32, got torch.float16",
    ),
    "size of bias": (lambda x, w, s, b: (x, w, s, [b[0], b[1][:2]]), r"bias \[3\], got \[2\]"),
    "dtype of bias": (
        lambda x, w, s, b: (x, w, s, [b[0], b[1].half()]),
        "bias in torch.bfloat16, got torch.float16",
    ),
    "a floor below 0": (lambda *a: (*a, False, -1.0), "amax_floor of 0 or more, got -1.0"),
    "dtype": (
        lambda *a: (*a, False, 1e-10, torch.float64),
        "dtype float32, float16 or bfloat16, got torch.float64",
    ),
    "residual of several": (
        lambda *a: (*a, False, 1e-10, torch.bfloat16, a[0][:, :4]),
        "1 weight with a residual, got 2",
    ),
    "shape of residual": (
        lambda *a: add(a, a[0]),
        r"residual \[2, 4\], got \[2, 8\]",
    ),
    "dtype of residual": (
        lambda *a: add(a, a[0][:, :4].float()),
        "residual in the result's torch.bfloat16, got torch.float32",
    ),
    "shape of norm": (lambda *a: add(a, None, a[0][0, :7]), r"norm \[8\], got \[7\]"),
    "dtype of norm": (
        lambda *a: add(a, None, a[0][0].float()),
        "norm in x's dtype torch.bfloat16, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    change, message = WRONG[case]
    args = change(*inputs(2, 8, (4, 3), (0, 1), device))
    for fn in FUNCTIONS:
        with pytest.raises(ValueError, match=f"skinny_mms_fp8: expected {message}"):
            fn(*args)
