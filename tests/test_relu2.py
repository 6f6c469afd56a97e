import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops.relu2 import relu2, relu2_reference, relu2_triton

SHAPES = [(1, 1), (7, 128), (3, 1030), (0, 128), (4, 0)]  # one, even, two blocks, none
FUNCTIONS = [relu2, relu2_triton]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    assert_close(fn(x), relu2_reference, x)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    for x in torch.randn(128, 7, device=device).t(), torch.randn(7, 200, device=device)[:, 10:138]:
        assert_close(fn(x), relu2_reference, x)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_stays(fn, device):
    x = torch.tensor([[float("nan"), float("-inf"), 2.0, -0.0]], device=device)
    assert_close(fn(x), relu2_reference, x)


def test_opcheck(device):
    torch.library.opcheck(relu2, (torch.randn(7, 128, device=device),))


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_wrong_shape(shape, device):
    with pytest.raises(ValueError, match=r"relu2: expected x \[R, F\], got \["):
        relu2(torch.randn(shape, device=device))


def test_wrong_dtype(device):
    with pytest.raises(ValueError, match=r"relu2: expected x in float32, .*, got torch.int64"):
        relu2(torch.ones(4, 4, dtype=torch.int64, device=device))
