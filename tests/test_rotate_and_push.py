from functools import partial

import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import moe
from moe_compile.ops.rotate_and_push import (
    rotate_and_push,
    rotate_and_push_reference,
    rotate_and_push_triton,
)

FUNCTIONS = [rotate_and_push, rotate_and_push_triton]
SHAPES = [  # B, A, G, S, D, F, R
    (1, 6, 2, 9, 128, 128, 128),
    (2, 3, 1, 7, 80, 40, 32),
    (3, 10, 2, 1, 64, 64, 64),
    (0, 2, 1, 5, 64, 64, 64),
]


def inputs(B, A, G, S, D, F, R, device="cpu", dtype=torch.float32):
    def numbers(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    angles = torch.randn(1, 1, R, device=device)
    heads = numbers(B, 1, A, D), numbers(B, 1, G, D), numbers(B, 1, G, F)
    caches = numbers(B, G, S, D), numbers(B, G, S, F)
    return *heads, angles.cos().to(dtype), angles.sin().to(dtype), *caches


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
    weights = torch.randn(2, shape[4], device=device).to(dtype)
    for given in args, (*args, *weights, 1e-3):
        out = functional(fn)(*given)
        assert_close(out, functional(rotate_and_push_reference), *given)
        assert out[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("block", [16, 64, 128])
def test_caches_moved_in_several_blocks(block, device):
    """The last block is full, or holds one position, or fewer than it could."""
    for S in 8, 9, 10:
        args = inputs(1, 2, 1, S, 16, 12, 8, device)
        out = functional(partial(rotate_and_push_triton, block=block))(*args)
        assert_close(out, functional(rotate_and_push_reference), *args)
        assert torch.equal(out[1][:, :, :-1], args[5][:, :, 1:])
        assert torch.equal(out[2][:, :, :-1], args[6][:, :, 1:])


def test_a_window_as_large_as_the_machine(device):
    """On a GPU all programs run at once; a position read after it was written would show."""
    size = (4, 64, 8, 512, 128, 128, 128) if device == "cuda" else (2, 2, 2, 5, 16, 16, 16)
    args = inputs(*size, device)
    expected = functional(rotate_and_push_reference)(*args)
    for _ in range(20 if device == "cuda" else 1):
        out = functional(rotate_and_push_triton)(*args)
        assert torch.equal(out[1][:, :, :-1], expected[1][:, :, :-1])
        assert torch.equal(out[2], expected[2])


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_only_the_cache_is_written(fn, device):
    q, k, v, cos, sin, _, v_cache = inputs(2, 4, 2, 5, 16, 8, 16, device)
    wide = torch.arange(7.0, device=device)[:, None].expand(2, 2, 7, 16).contiguous()
    fn(q, k, v, cos, sin, wide[:, :, 1:6], v_cache)  # a cache may be a part of a longer one
    assert wide[..., :5, 0].unique().tolist() == [0, 2, 3, 4, 5]
    assert (wide[:, :, 6] == 6).all()
    assert torch.equal(v_cache[:, :, -1], v[:, 0])


def test_opcheck():
    torch.library.opcheck(moe.rotate_and_push.default, inputs(2, 2, 1, 5, 16, 8, 8))


def test_wrong_inputs(device):
    right = inputs(2, 4, 2, 9, 16, 8, 16, device)
    two = [torch.cat([x, x], 1) for x in right[:2]]
    cases = [
        (2, right[2][:, :, :1], r"v \[2, 1, 2, F\] for k, got \[2, 1, 1, 8\]"),
        (1, right[1][0], r"k \[B, Q, G, D\], got \[1, 2, 16\]"),
        (5, right[5][:, :1], r"k_cache \[2, 2, 9, 16\], got \[2, 1, 9, 16\]"),
        (5, right[5][:, :, :0], "at least one position, got 0"),
        (6, right[6][:, :, :8], r"v_cache \[2, 2, 9, 8\], got \[2, 2, 8, 8\]"),
        (6, right[6].half(), "v_cache in q's dtype torch.float32, got torch.float16"),
        (6, right[6].mT.contiguous().mT, "v_cache with features beside each other"),
    ]
    for index, x, message in cases:
        args = [*right[:index], x, *right[index + 1 :]]
        for fn in FUNCTIONS:
            with pytest.raises(ValueError, match=f"rotate_and_push: expected {message}"):
                fn(*args)
    with pytest.raises(ValueError, match="rotate_and_push: expected one token, got 2"):
        rotate_and_push(*two, right[2], *(x.expand(1, 2, 16) for x in right[3:5]), *right[5:])
