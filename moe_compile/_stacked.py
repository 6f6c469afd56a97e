"""Weights of experts [E, ., .] as a model's code reads them: what it may do with them, in float8.

Letters: R rows, E experts, H features in, G features out, B weights of a bmm, M rows of each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_compile.fp8 import quantize_weight, refuse
from moe_compile.ops import moe

aten = torch.ops.aten
TAKES = "torch._grouped_mm(x, w, offs=offsets), or torch.bmm with w[ids]"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class View:
    """The same weights with their last dims swapped, in another dtype, or one for each id."""

    of: "Stacked"
    swaps: bool = False
    dtype: torch.dtype | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """A product of rows and weights that sums over this dim, -1 or -2, of the weights."""

    of: "Stacked"
    summed: int


class Stacked(Tensor):
    """What stands in for a parameter [E, ., .] and takes only what experts need of it."""

    swapped: bool  # the code sees the last two dims of what is stored the other way round
    path: str  # of the parameter in the model

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def _like(cls: Any, w: Tensor, swapped: bool, dtype: torch.dtype) -> Any:
        w = w.mT if swapped else w
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, w.shape, strides=w.stride(), dtype=dtype, device=w.device
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.path}: {list(self.shape)}, {self.dtype})"

    def viewed(self, view: View) -> "Stacked":
        raise NotImplementedError

    def product(self, summed: int, func: Any, args: Any, kwargs: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _STEPS:  # in inference mode functions come before they are taken apart
            out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        step = _STEPS[func](*args, **kwargs) if func in _STEPS else None
        if isinstance(step, View):
            return step.of.viewed(step)
        if isinstance(step, Product):
            return step.of.product(step.summed, func, args, kwargs)
        names = [a.path for a in args if isinstance(a, Stacked)]
        refuse(f"{', '.join(names)} in {TAKES}", f"{func} (keep={names} leaves them as they are)")
        return None


def _transpose(w: Any, a: int, b: int) -> View | None:
    return View(w, swaps=True) if w.ndim == 3 and {a % 3, b % 3} == {1, 2} else None


def _permute(w: Any, dims: list[int]) -> View | None:
    return View(w, swaps=True) if [d % 3 for d in dims] == [0, 2, 1] else None


def _to(w: Any, *, dtype: torch.dtype | None = None, **rest: Any) -> View | None:
    plain = dtype in _FLOATS and not any(v for k, v in rest.items() if k != "memory_format")
    return View(w, dtype=dtype) if plain else None


def _gather(w: Any, indices: list[Any]) -> View | None:
    ids = indices[0]
    known = isinstance(w, Stacked) and len(indices) == 1 and not isinstance(ids, Stacked)
    if known and ids.ndim == 1 and ids.dtype in (torch.int32, torch.int64):
        return View(w, ids=ids)
    return None


def _grouped(
    x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Product | None:
    known = isinstance(w, Stacked) and not isinstance(x, Stacked) and x.ndim == 2
    return Product(w, -2) if known and offs is not None and bias is None else None


def _batched(a: Any, b: Any) -> Product | None:
    if isinstance(a, Stacked) and isinstance(b, Stacked):
        return None
    return Product(a, -1) if isinstance(a, Stacked) else Product(b, -2)


_STEPS: dict[Any, Callable[..., View | Product | None]] = {
    aten.detach.default: View,
    aten.alias.default: View,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten._to_copy.default: _to,
    aten.index.Tensor: _gather,
    aten._grouped_mm.default: _grouped,
    aten.bmm.default: _batched,
}


class Float8Weight(Stacked):
    """e4m3 [E, G, H] and the scales of its blocks; rows are quantised when they meet it."""

    q: Tensor
    scale: Tensor

    def __new__(
        cls, q: Tensor, scale: Tensor, swapped: bool, dtype: torch.dtype, path: str
    ) -> "Float8Weight":
        return cls._like(cls, q, swapped, dtype)  # type: ignore[no-any-return]

    def __init__(
        self, q: Tensor, scale: Tensor, swapped: bool, dtype: torch.dtype, path: str
    ) -> None:
        self.q, self.scale, self.swapped, self.path = q, scale, swapped, path

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "scale"], (self.swapped, self.dtype, self.path)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: Any, *_: object) -> "Float8Weight":
        return Float8Weight(inner["q"], inner["scale"], *how)

    def viewed(self, view: View) -> "Float8Weight":
        q, scale = (x if view.ids is None else x[view.ids] for x in (self.q, self.scale))
        dtype = view.dtype or self.dtype
        return Float8Weight(q, scale, self.swapped != view.swaps, dtype, self.path)

    def product(self, summed: int, func: Any, args: Any, kwargs: Any) -> Tensor:
        if (summed == -2) != self.swapped:
            refuse(f"{self.path} summed over the dim that example_inputs showed", "the other")
        if func is aten._grouped_mm.default:
            named = dict(zip(("x", "w", "offs", "bias", "out_dtype"), args, strict=False)) | kwargs
            return self._times(named["x"], named["offs"], named.get("out_dtype"))
        a, b = args
        x_BMH = a if summed == -2 else b.transpose(1, 2)
        B, M, H = x_BMH.shape
        ends = torch.arange(1, B + 1, dtype=torch.int32, device=x_BMH.device)
        y = self._times(x_BMH.reshape(B * M, H), ends if M == 1 else ends * M)
        y_BMG = y.view(B, M, y.shape[-1])
        return y_BMG if summed == -2 else y_BMG.transpose(1, 2)

    def _times(self, x_RH: Tensor, ends: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Row by row with the weight whose rows they are."""
        q, scale = moe.quant_fp8(x_RH)
        w, w_scale = self.q.transpose(1, 2), self.scale.transpose(1, 2)
        dtype = dtype or x_RH.dtype
        y: Tensor = moe.grouped_mm_fp8(q, scale, w, w_scale, ends.int(), None, 1, None, dtype)
        return y


class SeenWeight(Stacked):
    """A weight as it is, and a note of the dims, -1 or -2, that products sum it over."""

    w: Tensor
    summed: set[int]

    def __new__(cls, w: Tensor, path: str, summed: set[int], swapped: bool = False) -> "SeenWeight":
        return cls._like(cls, w, False, w.dtype)  # type: ignore[no-any-return]

    def __init__(self, w: Tensor, path: str, summed: set[int], swapped: bool = False) -> None:
        self.w, self.path, self.summed, self.swapped = w, path, summed, swapped

    def viewed(self, view: View) -> "SeenWeight":
        w = self.w.mT if view.swaps else self.w
        w = w if view.ids is None else w[view.ids]
        return SeenWeight(
            w.to(view.dtype or w.dtype), self.path, self.summed, self.swapped != view.swaps
        )

    def product(self, summed: int, func: Any, args: Any, kwargs: Any) -> Tensor:
        self.summed.add(-3 - summed if self.swapped else summed)
        y: Tensor = func(*(a.w if isinstance(a, SeenWeight) else a for a in args), **kwargs)
        return y


class Float8(nn.Module):
    """A parametrization: e4m3 and scales are stored, a `Float8Weight` is what the model reads."""

    def __init__(self, path: str, dtype: torch.dtype, swapped: bool) -> None:
        super().__init__()
        self.path, self.dtype, self.swapped = path, dtype, swapped

    def forward(self, q: Tensor, scale: Tensor) -> Tensor:
        return Float8Weight(q, scale, self.swapped, self.dtype, self.path)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_weight(w.mT if self.swapped else w)
