import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops._skinny_mm_kernel import Blocks, can_keep, fits
from moe_compile.ops.rms_norm_mms import (
    rms_norm,
    rms_norm_mms,
    rms_norm_mms_reference,
    rms_norm_mms_triton,
)

EPS = 1e-6
FUNCTIONS = [rms_norm_mms, rms_norm_mms_triton]
CASES = {  # M, K, columns of each, which have a bias
    "q, k, v": (1, 64, (6, 2, 2), ()),
    "all with bias": (2, 40, (5, 3), (0, 1)),
    "one, ragged": (3, 37, (3,), (0,)),
    "several steps": (2, 1100, (2,), ()),
    "tensor cores": (9, 300, (12, 5, 8), (1,)),
    "no rows": (0, 16, (4, 5), ()),
    "none has columns": (2, 16, (0, 0), ()),
    "nothing to add": (2, 0, (4, 3), (1,)),
    "many rows": (17, 16, (4, 3), (1,)),
}


def inputs(M, K, columns, has_bias, device, dtype=torch.float32):
    x = (3 * torch.randn(M, K, device=device)).to(dtype)
    norm = (1 + torch.randn(K, device=device) / 4).to(dtype)
    ws = [(torch.randn(N, K, device=device) / 8).to(dtype).t() for N in columns]
    biases = [torch.randn(N, device=device).to(dtype) for N in columns]
    return x, norm, EPS, ws, [b if i in has_bias else None for i, b in enumerate(biases)]


def assert_all_close(got, args, **how):
    """Products by the rule of all ops, all columns together; kept rows as the model rounds them."""
    x, norm, eps, ws, biases = args
    wide = torch.cat(ws, 1)
    none = [x.new_zeros(w.shape[1]) for w in ws]
    bias = torch.cat([n if b is None else b for n, b in zip(none, biases, strict=True)])

    def whole(x, norm, w, bias):
        return rms_norm_mms_reference(x, norm, eps, [w], [bias], how.get("round_first", True))[0]

    assert [y.shape[1] for y in got[: len(ws)]] == [w.shape[1] for w in ws]
    assert_close(torch.cat(got[: len(ws)], 1), whole, x, norm, wide, bias)
    if how.get("keep"):
        want = rms_norm(x, norm, eps, how.get("round_first", True))
        assert got[-1].shape == want.shape
        assert got[-1].is_contiguous()
        torch.testing.assert_close(got[-1], want)  # sums of squares in another order
        if got[-1].numel() and x.dtype != torch.float32:
            assert (got[-1] == want).double().mean() > 0.99
    assert len(got) == len(ws) + bool(how.get("keep"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, dtype, device):
    args = inputs(*CASES[case], device, dtype)
    assert_all_close(fn(*args), args)
    x, norm, eps, ws, biases = args
    args = x, norm, eps, [w.contiguous() for w in ws], biases
    how = {"round_first": False, "keep": True}
    assert_all_close(fn(*args, **how), args, **how)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
@pytest.mark.parametrize("M", [3, 6])
def test_strided_input(M, fn, device):
    x, norm, eps, ws, biases = inputs(M, 40, (6, 9), (0,), device, torch.bfloat16)
    part = torch.cat((x, x), 1)[:, 3:43]
    norm = torch.stack((norm, norm), -1)[:, 0]
    mixed = [ws[0], ws[1].contiguous()]
    for args in (part, norm, eps, ws, biases), (x.t().contiguous().t(), norm, eps, mixed, biases):
        assert_all_close(fn(*args, keep=True), args, keep=True)


BLOCKS = [
    Blocks(1, 64, False, 8, 4),
    Blocks(16, 128, False, 4, 2),
    Blocks(8, 32, True, 4, 3),
    Blocks(32, 64, True, 4, 4),
]


@pytest.mark.parametrize("round_first", [True, False])
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
def test_any_blocks_give_the_same(blocks, round_first, device):
    how = {"round_first": round_first, "keep": True}
    args = inputs(3, 100, (5,), (0,), device, torch.bfloat16)
    assert_all_close(rms_norm_mms_triton(*args, **how, blocks=blocks), args, **how)


@pytest.mark.parametrize("M", [1, 4, 12])
def test_errs_less_than_eager(M, device):
    """Rows that are not rounded, or once, before the product instead of twice."""
    x, norm, eps, ws, biases = inputs(M, 1024, (16,), (), device, torch.bfloat16)
    (y,) = rms_norm_mms_triton(x, norm, eps, ws, biases)
    eager = rms_norm(x, norm, eps, True) @ ws[0]
    want = rms_norm(x.double(), norm.double(), eps, True) @ ws[0].double()
    error, least = ((a.double() - want).square().mean().sqrt() for a in (y, eager))
    assert error <= least


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("M", [2, 6])
def test_rows_of_any_size(M, scale, device):
    """In float16, x * norm has no place among its numbers before the scale."""
    for dtype in torch.bfloat16, torch.float16:
        x, norm, *rest = inputs(M, 64, (5,), (), device, dtype)
        x, norm = (x.float() * scale).to(dtype), norm * 8
        args = x, norm, *rest
        assert_all_close(rms_norm_mms_triton(*args), args)


@pytest.mark.parametrize("M", [3, 6])
def test_nan_stays_in_its_row_and_infinity_becomes_nan(M, device):
    x, norm, *rest = inputs(M, 40, (9,), (), device, torch.bfloat16)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    y, normed = rms_norm_mms_triton(x, norm, *rest, keep=True)
    assert y[[1, 2]].isnan().all()
    assert y[[0, *range(3, M)]].isfinite().all()
    want = rms_norm(x, norm, EPS, True)
    torch.testing.assert_close(normed, want, equal_nan=True)


def test_zeros_are_normed_by_eps(device):
    x, norm, _, ws, biases = inputs(2, 40, (9,), (0,), device)
    y, normed = rms_norm_mms_triton(x * 0, norm, 1e-6, ws, biases, keep=True)
    assert torch.equal(y, biases[0].expand(2, 9))
    assert (normed == 0).all()


def test_float16_on_tensor_cores_is_normed_first(device):
    x, _, _, ws, _ = inputs(5, 16, (4,), (), device, torch.float16)
    assert fits(x, ws)
    assert not fits(x, ws, norm=True)
    assert fits(x[:4], ws, norm=True)
    assert fits(x.bfloat16(), [w.bfloat16() for w in ws], norm=True)


def test_few_programs_keep_no_long_rows(device):
    def weight(N, K):
        return torch.empty(N, K, device="meta", dtype=torch.bfloat16).t()

    def rows(M, K):
        return torch.empty(M, K, device="meta", dtype=torch.bfloat16)

    assert can_keep(rows(1, 2048), [weight(128, 2048)])
    assert can_keep(rows(16, 2048), [weight(128, 2048)])
    assert can_keep(rows(4, 4096), [weight(8, 4096)])  # Mixtral's router
    assert not can_keep(rows(16, 4096), [weight(8, 4096)])
    assert not can_keep(rows(1, 64), [weight(0, 64)])
    args = inputs(6, 600, (3,), (), device, torch.bfloat16)
    assert not can_keep(args[0], args[3])
    assert_all_close(rms_norm_mms_triton(*args, keep=True), args, keep=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 16])
def test_real_shapes(M, dtype, device):
    for K, columns in (2048, (128,)), (2048, (4096, 512, 512)), (4096, (8,)), (1000, (777,)):
        args = inputs(M, K, columns, (0,), device, dtype)
        for how in {}, {"keep": True}, {"keep": True, "round_first": False}:
            got = rms_norm_mms(*args, **how)
            assert_all_close(got, args, **how)
            for a, b in zip(got, rms_norm_mms(*args, **how), strict=True):
                assert torch.equal(a, b)


def test_opcheck(device):
    for case in "all with bias", "one, ragged", "no rows":
        args = inputs(*CASES[case], device)
        torch.library.opcheck(rms_norm_mms, args)
        torch.library.opcheck(rms_norm_mms, args, {"keep": True, "round_first": False})


def test_no_gradient(device):
    x, norm, *rest = inputs(1, 8, (4,), (), device)
    norm.requires_grad_()
    with pytest.raises(RuntimeError, match="rms_norm_mms: expected inputs without gradients"):
        rms_norm_mms(x, norm, *rest)


WRONG = {
    "no weight": (lambda x, n, w, b: (x, n, [], []), "1 to 4 weights, got 0"),
    "a bias less": (lambda x, n, w, b: (x, n, w, b[:1]), "2 biases or None, one a weight, got 1"),
    "x of rank 1": (lambda x, n, w, b: (x[0], n, w, b), r"x \[M, K\], got \[8\]"),
    "another K": (lambda x, n, w, b: (x[:, 1:], n, w, b), r"x \[M, 8\] for w \[8, 4\], got"),
    "norm of another size": (lambda x, n, w, b: (x, n[1:], w, b), r"norm \[8\], got \[7\]"),
    "norm of rank 2": (lambda x, n, w, b: (x, n[None], w, b), r"norm \[8\], got \[1, 8\]"),
    "norm of another dtype": (lambda x, n, w, b: (x, n.half(), w, b), "norm in x's dtype torch.fl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case, device):
    change, message = WRONG[case]
    x, norm, _, ws, biases = inputs(2, 8, (4, 3), (0, 1), device)
    x, norm, ws, biases = change(x, norm, ws, biases)
    for fn in FUNCTIONS:
        with pytest.raises(ValueError, match=f"rms_norm_mms: expected {message}"):
            fn(x, norm, EPS, ws, biases)
    x, norm, *lists = (
        [None if t is None else t.to("meta") for t in many]
        if isinstance(many, list)
        else many.to("meta")
        for many in (x, norm, ws, biases)
    )
    with pytest.raises(ValueError, match=f"rms_norm_mms: expected {message}"):
        rms_norm_mms(x, norm, EPS, *lists)
