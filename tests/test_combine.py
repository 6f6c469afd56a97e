import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import moe
from moe_compile.ops.combine import combine, combine_reference, combine_triton

FUNCTIONS = [combine, combine_triton]
SHAPES = [(1, 1, 1), (7, 2, 128), (3, 5, 300), (0, 2, 64), (4, 3, 0)]  # T, K, H


def inputs(T, K, H, device, dtype=torch.float32):
    """All rows owned, in shuffled order."""
    y = torch.randn(T * K, H, device=device).to(dtype)
    position = torch.randperm(T * K, device=device).int().view(T, K)
    return y, position, torch.rand(T, K, device=device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, dtype, device):
    y, position, weights = inputs(*shape, device, dtype)
    assert_close(fn(y, position, weights), combine_reference, y, position, weights)
    assert_close(
        fn(y, position, weights.to(dtype), torch.float32),
        combine_reference,
        y,
        position,
        weights.to(dtype),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 300), (0, 2, 64)], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_a_residual_is_added_to_what_was_rounded(fn, shape, dtype, device):
    args = *inputs(*shape, device), dtype
    residual = torch.randn(shape[2], shape[0], device=device).to(dtype).t()
    out = fn(*args, residual)
    assert out.is_contiguous()
    assert torch.equal(out, fn(*args) + residual)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nothing_of_no_owner_is_read(fn, device):
    y, position, weights = inputs(6, 3, 40, device)
    position[2, 1] = position[4] = -1
    y[~torch.isin(torch.arange(18, device=device), position)] = float("nan")
    weights[4] = float("nan")
    out = fn(y, position, weights)
    assert out.isfinite().all()
    assert (out[4] == 0).all()
    assert_close(out, combine_reference, y, position, weights)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_no_rows_at_all(fn, device):
    position = torch.full((3, 2), -1, dtype=torch.int32, device=device)
    out = fn(torch.empty(0, 8, device=device), position, torch.rand(3, 2, device=device))
    assert torch.equal(out, torch.zeros(3, 8, device=device))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    y, position, weights = inputs(6, 4, 40, device)
    y, position, weights = y.t().contiguous().t(), position[:, ::2], weights[:, ::2]
    assert_close(fn(y, position, weights), combine_reference, y, position, weights)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_bitwise_stable(fn, device):
    args = inputs(9, 4, 300, device, torch.bfloat16)
    first = fn(*args)
    assert all(torch.equal(first, fn(*args)) for _ in range(3))


@pytest.mark.gpu
def test_whole_layer_in_a_cuda_graph(device):
    """Captured with one routing, replayed with another: nothing may wait for the device."""
    T, E, K, H, F = 37, 10, 3, 64, 48
    x = torch.randn(T, H, device=device, dtype=torch.bfloat16)
    gate_up = torch.randn(E, 2 * F, H, device=device, dtype=torch.bfloat16).mT / 8
    down = torch.randn(E, H, F, device=device, dtype=torch.bfloat16).mT / 8

    def layer(logits):
        weights, ids = moe.route(logits, K)
        rows, offsets, position = moe.sort_tokens(ids, E)
        h = moe.silu_mul(moe.grouped_mm(x, gate_up, offsets, rows, K))
        return moe.combine(moe.grouped_mm(h, down, offsets), position, weights)

    logits = torch.randn(T, E, device=device)
    layer(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(logits)
    for other in torch.randn(T, E, device=device), torch.arange(E, device=device).expand(T, E):
        logits.copy_(other)
        graph.replay()
        assert torch.equal(out, layer(logits))


def test_opcheck(device):
    torch.library.opcheck(combine, inputs(5, 2, 16, device))
    torch.library.opcheck(combine, (*inputs(5, 2, 16, device), torch.bfloat16))
    residual = torch.ones(5, 16, device=device)
    torch.library.opcheck(combine, (*inputs(5, 2, 16, device), None, residual))


def wrong(**changes):
    y, position, weights = inputs(3, 2, 8, "cpu")
    return {"y": y, "position": position, "weights": weights, "dtype": None, **changes}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (wrong(y=torch.ones(6)), r"y \[R, H\], got \[6\]"),
        (wrong(y=torch.ones(6, 8, dtype=torch.int32)), "y in float32, .*, got torch.int32"),
        (wrong(position=torch.zeros(6)), r"position \[T, K\], got \[6\]"),
        (wrong(position=torch.zeros(3, 2)), "int32 position, got torch.float32"),
        (wrong(weights=torch.ones(2, 3)), r"weights of position's shape \[3, 2\], got \[2, 3\]"),
        (wrong(weights=torch.ones(3, 2).long()), "weights in float32, .*, got torch.int64"),
        (wrong(dtype=torch.int32), "dtype float32, .*, got torch.int32"),
        (wrong(weights=torch.ones(3, 2, device="meta")), "all tensors on one device, got"),
        (wrong(residual=torch.ones(3, 7)), r"residual \[3, 8\], got \[3, 7\]"),
        (wrong(residual=torch.ones(3, 8).half()), "residual in the result's torch.float32, got"),
    ],
)
def test_wrong_input(args, message):
    """By the fake too, which is what a compile runs first."""
    with pytest.raises(ValueError, match=f"combine: expected {message}"):
        combine_triton(*args.values())
    if "one device" not in message:
        with pytest.raises(ValueError, match=f"combine: expected {message}"):
            combine(*args.values())
        with pytest.raises(ValueError, match=f"combine: expected {message}"):
            combine(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args.values()))
