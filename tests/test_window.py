"""The mask of a window that slides, where positions are numbered, is the last position filled."""

import pytest
import torch
from helpers import graph_on_gpu

from moe_compile.passes.read_cache import read_cache
from moe_compile.testing import render, run_passes

aten = torch.ops.aten
W = 6


def count(device, n=W):
    how = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
    return torch.ops.prims.iota(n, **how)


def sliding(n, S=W, shift=0, window=W):
    """As transformers 5.17 writes it, with the count of tokens n as a tensor of none or one dim."""
    first = aten.clamp_min(aten.add.Tensor(aten.sub.Tensor(n, W), 1 + shift), 0)
    positions = aten.add.Tensor(count(n.device, S), first).reshape(1, 1, 1, S)
    here = aten.add.Tensor(count(n.device, 1), n).reshape(1, 1, 1, 1)
    always = aten.full([], True, dtype=torch.bool, device=n.device)
    recent = aten.gt.Tensor(positions, aten.sub.Tensor(here, window))
    some = aten.bitwise_and.Tensor(always, recent)
    return aten.bitwise_and.Tensor(some, aten.le.Tensor(positions, here))


def attention(mask_of):
    def fn(n, q, k, v):
        mask = mask_of(n).reshape(1, -1, 1, k.shape[2])
        zero, closed = (aten.full([], x, dtype=q.dtype, device=q.device) for x in (0.0, -torch.inf))
        added = aten.where(mask, zero, closed)
        return aten._scaled_dot_product_efficient_attention(q, k, v, added, False)[0]

    return fn


def graph_of(mask_of, S=W):
    inputs = [torch.randn(1, 2, size, 8) for size in (1, S, S)]
    gm = graph_on_gpu(attention(mask_of), torch.tensor(3), *inputs)
    (outcome,) = run_passes(gm, read_cache)
    assert len(outcome.rewrites) == 1
    (line,) = (line for line in render(gm.graph).splitlines() if "= moe_compile.attend(" in line)
    return gm, inputs, line.partition("attend(arg1_1, arg2_1, arg3_1")[2]


def reference(mask_of, n, q, k, v):
    mask = mask_of(n).reshape(1, 1, 1, k.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize(
    ("mask_of", "S", "how"),
    [
        (sliding, W, ", last=reshape)"),
        (lambda n: sliding(n, 4), 4, ", last=reshape)"),  # a cache shorter than the window
        (lambda n: sliding(n, shift=-1, window=W + 2), W, ", last=reshape)"),
        (lambda n: aten.lt.Tensor(count(n.device), aten.add.Tensor(n, 2)), W, ", last=reshape)"),
        (lambda n: aten.gt.Tensor(aten.add.Tensor(count(n.device), n), aten.sub.Tensor(n, 1)), W,
         ")"),
    ],
)  # fmt: skip
def test_the_last_position(mask_of, S, how):
    gm, inputs, found = graph_of(mask_of, S)
    assert found == how
    for n in range(20):
        (out,) = gm(torch.tensor(n), *inputs)
        torch.testing.assert_close(out, reference(mask_of, torch.tensor(n), *inputs))


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda n: sliding(n, shift=1),  # of a full cache one more than is there
        lambda n: sliding(n, window=W - 1),
        lambda n: aten.bitwise_or.Tensor(sliding(n), sliding(n)),
        lambda n: aten.bitwise_not(sliding(n)),
        lambda n: aten.le.Tensor(aten.mul.Tensor(count(n.device), 2), n),
        lambda n: aten.le.Tensor(aten.add.Tensor(count(n.device), aten.mul.Tensor(n, 2)), n),
        lambda n: aten.bitwise_and.Tensor(
            aten.le.Tensor(count(n.device), n),
            aten.le.Tensor(count(n.device), aten.add.Tensor(n, 1)),
        ),
    ],
)
def test_other_masks_stay(mask_of):
    found = graph_of(mask_of)[2]
    assert "last" not in found
    assert found != ")"


def test_two_dims_of_positions_stay():
    """Which are along heads and positions, and not along positions alone."""

    def mask_of(n):
        heads = aten.le.Tensor(count(n.device, 2), n).reshape(1, 2, 1, 1)
        return aten.bitwise_and.Tensor(heads, aten.le.Tensor(count(n.device, 2), n))

    assert "last" not in graph_of(mask_of, 2)[2]
