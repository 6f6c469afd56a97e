import pytest
import torch
from helpers import FLOATS, assert_close
from test_grouped_mm import BLOCKS, CASES, STRIDES, inputs

from moe_compile.ops.grouped_mm import grouped_mm_reference
from moe_compile.ops.grouped_mm_silu_mul import (
    grouped_mm_silu_mul,
    grouped_mm_silu_mul_triton,
)
from moe_compile.ops.silu_mul import silu_mul_reference

FUNCTIONS = [grouped_mm_silu_mul, grouped_mm_silu_mul_triton]
ATTRIBUTES = {
    "silu": {},
    "interleaved": {"interleaved": True},
    "gpt-oss": {"interleaved": True, "alpha": 1.702, "limit": 7.0, "up_shift": 1.0},
    "clamped halves": {"limit": 0.5},
}


def reference(x, w, offsets, rows=None, top_k=1, bias=None, **attributes):
    """As the op rounds: once where the product would be stored, once at the end."""
    y = grouped_mm_reference(x, w, offsets, rows, top_k, bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return silu_mul_reference(y.to(wide), **attributes).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3] % 2 == 0])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, dtype, device):
    x, w, offsets = inputs(*CASES[case], device, dtype)
    assert_close(fn(x, w, offsets), reference, x, w, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("blocks", BLOCKS, ids=lambda blocks: "x".join(map(str, blocks)))
def test_attributes_rows_and_bias_in_any_blocks(blocks, attributes, dtype, device):
    x, w, offsets = inputs([3, 0, 4], 1, 40, 40, device, dtype)
    rows = torch.randperm(8, device=device).int()
    bias = torch.randn(3, 40, device=device).to(dtype)
    args, how = (x, w, offsets, rows, 1, bias), ATTRIBUTES[attributes]
    assert_close(grouped_mm_silu_mul_triton(*args, **how, blocks=blocks), reference, *args, **how)
    assert_close(grouped_mm_silu_mul(*args, **how), reference, *args, **how)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, interleaved, strides, device):
    x, w, offsets = inputs([3, 0, 6], 2, 40, 24, device)
    x, w = x.t().contiguous().t(), STRIDES[strides](w)
    how = {"interleaved": interleaved}
    assert_close(fn(x, w, offsets, **how), reference, x, w, offsets, **how)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nothing_of_no_owner_is_read(fn, device):
    x, w, offsets = inputs([2, 0, 3], 6, 24, 40, device)
    w[1] = float("nan")
    x[5:] = float("nan")
    y = fn(x, w, offsets, up_shift=1.0)
    assert (y[5:] == 0).all()
    assert y.isfinite().all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_stays_in_its_row(fn, device):
    x, w, offsets = inputs([4, 3], 0, 24, 8, device)
    x[2, 5] = float("nan")
    y = fn(x, w, offsets, limit=7.0)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5, 6]].isfinite().all()


def test_opcheck(device):
    x, w, offsets = inputs([3, 0, 2], 2, 16, 8, device)
    rows = torch.randperm(7, device=device).int()
    torch.library.opcheck(grouped_mm_silu_mul, (x, w, offsets))
    bias = torch.randn(3, 8, device=device)
    torch.library.opcheck(grouped_mm_silu_mul, (x, w, offsets, rows, 1, bias, True, 1.7, 7.0, 1.0))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_wrong_inputs(fn):
    x, w, offsets = inputs([3, 0, 2], 0, 16, 7, "cpu")
    with pytest.raises(ValueError, match=r"grouped_mm_silu_mul: expected w \[E, H, 2F\], got"):
        fn(x, w, offsets)
    with pytest.raises(ValueError, match=r"grouped_mm_silu_mul: expected x \[N, 16\]"):
        fn(x[:, 1:], w, offsets)
