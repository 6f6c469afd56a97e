"""Input checks that every op shares. The op and its fake call the same ones, so that a wrong
input fails when compiling, with the words it would fail with at run time."""

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(holds: Any, op: str, expected: str, got: object) -> None:
    """Raise ValueError "<op>: expected <expected>, got <got>" unless `holds`."""
    if holds is True:  # not symbolic: torch's own check costs 1 us, and decode makes thousands
        return
    shown = list(got) if isinstance(got, torch.Size) else got
    torch._check_value(holds, lambda: f"{op}: expected {expected}, got {shown}")


def check_dims(op: str, name: str, x: Tensor, dims: str) -> None:
    """`x` has as many dims as `dims`, written as in "[T, K]", names."""
    if x.ndim != dims.count(",") + 1:
        check(False, op, f"{name} {dims}", x.shape)


def check_float(op: str, name: str, x: Tensor) -> None:
    """`x` is float32, float16 or bfloat16 (float64 is allowed to references only)."""
    if x.dtype not in FLOATS:
        check(False, op, f"{name} in float32, float16 or bfloat16", x.dtype)


def check_float_dtype(op: str, dtype: torch.dtype | None) -> None:
    """The dtype asked for, if any, is one that the op can return."""
    check(dtype is None or dtype in FLOATS, op, "dtype float32, float16 or bfloat16", dtype)


def check_int32(op: str, name: str, x: Tensor) -> None:
    """`x` holds indices as the ops hand them to each other."""
    if x.dtype != torch.int32:
        check(False, op, f"int32 {name}", x.dtype)


def check_residual(
    op: str, residual: Tensor | None, shape: Any, dtype: torch.dtype, x: Tensor
) -> None:
    """What is to be added to the result, if anything, is like it, and where x is."""
    if residual is None:
        return
    check(residual.shape == shape, op, f"residual {list(shape)}", residual.shape)
    check(residual.dtype == dtype, op, f"residual in the result's {dtype}", residual.dtype)
    check_same_device(op, x=x, residual=residual)


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors given are on one device."""
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
        check(False, op, "all tensors on one device", devices)
