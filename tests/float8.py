"""What tests of the float8 ops need."""

import torch
from test_grouped_mm import CASES

QUANT_SHAPES = [(1, 128), (7, 768), (3, 200), (0, 128), (4, 0), (2, 64)]
ROUNDINGS = [
    {},
    {"power_of_two": True},
    {"scale_by_reciprocal": True},
    {"quant_by_reciprocal": True},
    {"group": 64, "amax_floor": 0.0, "scale_floor": 1e-3},
]
GEMM_CASES = {**CASES, "several blocks": ([3, 0, 2], 1, 320, 272)}  # of 128, the last short


def number(q):
    """Where each float8 stands in their order: neighbours differ by 1."""
    bits = q.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def assert_quantized(got, want):
    """The scales agree to float32's last places; values to one float8, and nearly all exactly."""
    (q, scale), (q_want, scale_want) = got, want
    assert q.shape == q_want.shape
    assert scale.shape == scale_want.shape
    assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    torch.testing.assert_close(scale, scale_want, rtol=1e-6, atol=0)
    steps = (number(q) - number(q_want)).abs()
    assert steps.numel() == 0 or steps.max() <= 1
    assert steps.numel() < 100 or (steps > 0).float().mean() < 0.01


def dequantized(q, scale, group=128):
    return q.float() * scale.repeat_interleave(group, 1)[:, : q.shape[1]]


def scales(device, *shape):
    """Far apart, so that a scale applied at the wrong place is seen."""
    return torch.exp(2 * torch.randn(*shape, device=device))


def gemm_inputs(sizes, num_unowned, H, G, device, group=128):
    E, N = len(sizes), sum(sizes) + num_unowned
    x = (torch.randn(N, H, device=device) * 4).to(torch.float8_e4m3fn)
    w = (torch.randn(E, G, H, device=device) * 4).to(torch.float8_e4m3fn).transpose(1, 2)
    x_scale = scales(device, N, (H + group - 1) // group)
    w_scale = scales(device, E, (G + 127) // 128, (H + 127) // 128).transpose(1, 2)
    return x, x_scale, w, w_scale, torch.tensor(sizes, device=device).cumsum(0).int()


def assert_close_fp8(got, reference, *args, **kwargs):
    """As helpers.assert_close: at most twice the error of the reference in the same dtype.

    In float32 that would ask for more than tensor cores keep of a sum of float8: 2 ** -11 there.
    """
    exact = reference(*args, **{**kwargs, "dtype": torch.float64})
    eager = reference(*args, **{**kwargs, "dtype": got.dtype})
    assert got.shape == eager.shape
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 2**-11
    err, allowed = (got.double() - exact).abs(), (eager.double() - exact).abs()
    assert err.max() <= 2 * allowed.max() + eps * exact.abs().max()
    assert err.pow(2).mean() <= (2 * allowed.pow(2).mean().sqrt() + eps * rms(exact)) ** 2


def rms(x):
    return x.pow(2).mean().sqrt()
