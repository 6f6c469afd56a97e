from functools import partial

import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import moe
from moe_compile.ops.rotate_and_store import (
    rotate_and_store,
    rotate_and_store_reference,
    rotate_and_store_triton,
)

FUNCTIONS = [rotate_and_store, rotate_and_store_triton]
SHAPES = [  # B, Q, A, G, S, D, F, R
    (1, 1, 6, 2, 9, 128, 128, 128),
    (2, 2, 3, 1, 7, 80, 40, 32),
    (3, 1, 2, 2, 5, 64, 64, 64),
    (0, 1, 2, 1, 5, 64, 64, 64),
]


def inputs(B, Q, A, G, S, D, F, R, device="cpu", dtype=torch.float32):
    def numbers(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    angles = torch.randn(1, Q, R, device=device)
    position = torch.randperm(S, device=device)[:Q]
    heads = numbers(B, Q, A, D), numbers(B, Q, G, D), numbers(B, Q, G, F)
    caches = numbers(B, G, S, D), numbers(B, G, S, F)
    return *heads, angles.cos().to(dtype), angles.sin().to(dtype), *caches, position


def functional(fn):
    """q' and both caches, of copies of them."""

    def call(*args):
        caches = [x.clone() for x in args[5:7]]
        return fn(*args[:5], *caches, *args[7:]), *caches

    return call


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, dtype, device):
    args = inputs(*shape, device, dtype)
    weights = torch.randn(2, shape[5], device=device).to(dtype)
    for given in args, (*args, *weights, 1e-3):
        out = functional(fn)(*given)
        assert_close(out, functional(rotate_and_store_reference), *given)
        assert out[0].transpose(1, 2).is_contiguous()


def test_several_heads_in_a_program(device):
    """As for many tokens: blocks of four heads, of which the last hold fewer."""
    args = inputs(2, 2, 6, 3, 5, 16, 24, 8, device)
    out = functional(partial(rotate_and_store_triton, heads=4))(*args)
    assert_close(out, functional(rotate_and_store_reference), *args)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_only_the_positions_are_written(fn, device):
    q, k, v, cos, sin, _, v_cache, position = inputs(2, 2, 4, 2, 9, 16, 8, 16, device)
    wide = torch.zeros(2, 2, 11, 16, device=device)  # a cache may be a part of a longer one
    fn(q, k, v, cos, sin, wide[:, :, 1:10], v_cache, position - 9)
    assert wide.any(3).sum(2).tolist() == [[2, 2], [2, 2]]
    assert wide[:, :, position + 1].all(3).all()
    assert torch.equal(v_cache[:, :, position], v.transpose(1, 2))


def test_outside_of_the_cache(device):
    args = inputs(1, 2, 2, 1, 4, 16, 16, 16, device)
    before = [x.clone() for x in args[5:7]]
    position = torch.tensor([4, -5], device=device)
    rotate_and_store_triton(*args[:7], position)
    assert all(map(torch.equal, before, args[5:7]))


def test_opcheck():
    torch.library.opcheck(moe.rotate_and_store.default, inputs(2, 2, 2, 1, 5, 16, 8, 8))


def test_wrong_inputs(device):
    right = inputs(2, 3, 4, 2, 9, 16, 8, 16, device)
    cases = [
        (2, right[2][:, :2], r"v \[2, 3, 2, F\] for k, got \[2, 2, 2, 8\]"),
        (1, right[1][0], r"k \[B, Q, G, D\], got \[3, 2, 16\]"),
        (5, right[5][:, :1], r"k_cache \[2, 2, 9, 16\], got \[2, 1, 9, 16\]"),
        (6, right[6][:, :, :8], r"v_cache \[2, 2, 9, 8\], got \[2, 2, 8, 8\]"),
        (6, right[6].half(), "v_cache in q's dtype torch.float32, got torch.float16"),
        (6, right[6].mT.contiguous().mT, "v_cache with features beside each other"),
        (7, right[7][:2], r"position \[3\], got \[2\]"),
        (7, right[7].int(), "int64 position, got torch.int32"),
    ]
    for index, x, message in cases:
        args = [*right[:index], x, *right[index + 1 :]]
        for fn in FUNCTIONS:
            with pytest.raises(ValueError, match=f"rotate_and_store: expected {message}"):
                fn(*args)
