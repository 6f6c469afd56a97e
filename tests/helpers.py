"""What several tests need."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def graph_on_gpu(fn: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """The graph of `fn` on a GPU, for passes that do nothing elsewhere; no GPU is needed."""
    mode = FakeTensorMode()
    with mode:
        like = {"device": "cuda"}
        fakes = [torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, **like) for a in args]

    def outputs(*inputs: Tensor) -> list[Tensor]:
        out = fn(*inputs)
        return list(out) if isinstance(out, tuple) else [out]

    with torch.no_grad(), mode:  # the mode, for tensors that `fn` makes
        return make_fx(outputs)(*fakes)


def assert_close(
    actual: Tensor | Sequence[Tensor],
    reference: Callable[..., Any],
    *args: Any,
    times: float = 2,
    **kwargs: Any,
) -> None:
    """`actual` errs at most `times` as much as `reference` in the same dtypes does.

    Both errors are against `reference` in float64 on the very same (rounded) inputs, by maximum and
    by RMS, each with one unit in the last place of the exact values' maximum and RMS to spare. A
    tensor that is not floating must be equal. Where the exact value is NaN or infinite, so must be
    the actual one. Several results are compared each with its own.
    """
    exact = reference(*map(_double, args), **{k: _double(v) for k, v in kwargs.items()})
    eager = reference(*args, **kwargs)
    if isinstance(actual, Tensor):
        actual, exact, eager = [actual], [exact], [eager]
    for a, x, e in zip(actual, exact, eager, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert a.device == e.device
        if a.is_floating_point():
            _assert_errors(a, x, e, times)
        else:
            assert torch.equal(a, e)


def _double(x: Any) -> Any:
    """float64 for a tensor of floats and for a dtype to compute in; anything else as it is."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return torch.float64 if isinstance(x, torch.dtype) else x


def _assert_errors(actual: Tensor, exact: Tensor, eager: Tensor, times: float) -> None:
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual[~finite].double(), exact[~finite].double(), rtol=0, atol=0, equal_nan=True
    )
    actual, exact, eager = actual[finite], exact[finite], eager[finite]
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    for name, size in ("max", _max), ("rms", _rms):
        got = size(actual.double() - exact)
        allowed = times * size(eager.double() - exact) + eps * size(exact)
        assert got <= allowed, f"{name} error {got:.3e}, allowed {allowed:.3e}"


def _max(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
