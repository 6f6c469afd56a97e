import pytest
import torch
from float8 import assert_close_fp8, gemm_inputs

from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops.grouped_mm_fp8_silu_mul import (
    grouped_mm_fp8_silu_mul,
    grouped_mm_fp8_silu_mul_reference,
    grouped_mm_fp8_silu_mul_triton,
)

FUNCTIONS = [grouped_mm_fp8_silu_mul, grouped_mm_fp8_silu_mul_triton]
CASES = {"some": [3, 0, 5], "one row": [0, 1, 0], "no rows": [0, 0]}
ATTRIBUTES = {
    "silu": {},
    "rounded": {"round_silu": True},
    "all": {"alpha": 1.702, "limit": 300.0, "up_shift": 1.0},
}


@pytest.mark.parametrize("attributes", ATTRIBUTES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, case, attributes, device):
    args = gemm_inputs(CASES[case], 2, 256, 512, device)
    how = ATTRIBUTES[attributes]
    got = fn(*args, **how)
    assert_close_fp8(got, grouped_mm_fp8_silu_mul_reference, *args, **how)
    assert (got[sum(CASES[case]) :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("blocks", [Blocks(1, 16, 0, 1, 2, 1), Blocks(16, 64, 0, 2, 4, 2)], ids=str)
def test_rows_and_bias_in_any_blocks(blocks, group, dtype, device):
    *args, offsets = gemm_inputs([3, 0, 5], 0, 320, 256, device, group)
    rows = torch.tensor([0, 3, 8, 15, 1, 2, 11, 7], device=device).int()
    bias = torch.randn(3, 256, device=device).to(dtype)
    args = (*args, offsets, rows, 2, bias, dtype)
    got = grouped_mm_fp8_silu_mul_triton(*args, blocks=blocks)
    assert_close_fp8(got, grouped_mm_fp8_silu_mul_reference, *args[:-1], dtype=dtype)


def test_opcheck(device):
    args = gemm_inputs([3, 0, 2], 1, 128, 256, device)
    tests = ("test_faketensor", "test_aot_dispatch_dynamic")  # test_schema multiplies float8
    torch.library.opcheck(grouped_mm_fp8_silu_mul, args, test_utils=tests)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_wrong_inputs(fn, device):
    args = gemm_inputs([3, 0, 2], 1, 128, 384, device)
    with pytest.raises(ValueError, match=r"grouped_mm_fp8_silu_mul: expected w .* multiple of 128"):
        fn(*args)
    with pytest.raises(ValueError, match=r"grouped_mm_fp8_silu_mul: expected x in torch\.float8"):
        fn(args[0].float(), *args[1:])
