import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops.gelu_mul import gelu_mul, gelu_mul_reference, gelu_mul_triton

SHAPES = [(1, 2), (7, 128), (3, 2 * 1030), (0, 128), (4, 0)]  # one, even, two blocks, none
FUNCTIONS = [gelu_mul, gelu_mul_triton]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, approximate, shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert_close(fn(x, approximate), gelu_mul_reference, x, approximate)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    for x in torch.randn(128, 7, device=device).t(), torch.randn(7, 200, device=device)[:, 10:138]:
        assert_close(fn(x), gelu_mul_reference, x)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_extreme_values(fn, approximate, device):
    x = torch.tensor([[1e4, -1e4, float("nan"), 0.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    assert_close(fn(x, approximate), gelu_mul_reference, x, approximate)


def test_opcheck(device):
    x = torch.randn(7, 128, device=device)
    torch.library.opcheck(gelu_mul, (x,))
    torch.library.opcheck(gelu_mul, (x, "tanh"))


@pytest.mark.parametrize("shape", [(4, 3), (4,), (2, 2, 2)])
def test_wrong_shape(shape, device):
    with pytest.raises(ValueError, match=r"gelu_mul: expected x \[R, 2F\], got \["):
        gelu_mul(torch.randn(shape, device=device))


def test_wrong_dtype(device):
    with pytest.raises(ValueError, match=r"gelu_mul: expected x in float32, .*, got torch.int64"):
        gelu_mul(torch.ones(4, 4, dtype=torch.int64, device=device))


def test_wrong_approximate(device):
    with pytest.raises(ValueError, match="gelu_mul: expected approximate none or tanh, got erf"):
        gelu_mul(torch.randn(4, 4, device=device), "erf")
