import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops.silu_mul import silu_mul, silu_mul_reference, silu_mul_triton

SHAPES = [(1, 2), (7, 128), (3, 2 * 1030), (0, 128), (4, 0)]  # one, even, two blocks, none
GPT_OSS = {"interleaved": True, "alpha": 1.702, "limit": 0.7, "up_shift": 1.0}
FUNCTIONS = [silu_mul, silu_mul_triton]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, GPT_OSS, {"limit": 0.5}], ids=["plain", "all", "limit"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, options, shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert_close(fn(x, **options), silu_mul_reference, x, **options)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    for x in torch.randn(128, 7, device=device).t(), torch.randn(7, 200, device=device)[:, 10:138]:
        assert_close(fn(x), silu_mul_reference, x)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_extreme_values(fn, device):
    x = torch.tensor([[1e4, -1e4, float("nan"), 3e38, 0.0, 2.0, 2.0, 2.0, 2.0, float("nan")]])
    for options in {}, {"limit": 7.0}:
        assert_close(fn(x.to(device), **options), silu_mul_reference, x.to(device), **options)


def test_opcheck(device):
    x = torch.randn(7, 128, device=device)
    torch.library.opcheck(silu_mul, (x,))
    torch.library.opcheck(silu_mul, (x,), GPT_OSS)


@pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 2, 2)])
def test_wrong_shape(shape, device):
    with pytest.raises(ValueError, match=r"silu_mul: expected x \[R, 2F\], got \["):
        silu_mul(torch.randn(shape, device=device))


def test_wrong_dtype(device):
    with pytest.raises(ValueError, match=r"silu_mul: expected x in float32, .*, got torch.int64"):
        silu_mul(torch.ones(4, 4, dtype=torch.int64, device=device))


def test_gradients_are_refused(device):
    x = torch.randn(4, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="silu_mul: expected inputs without gradients"):
        silu_mul(x)
    with torch.no_grad():
        assert_close(silu_mul(x), silu_mul_reference, x)
