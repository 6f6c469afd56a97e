"""What `cuda_graphs` hands to its graphs: a batch with its padding, and the eye on what has moved.

Letters: B rows in a batch.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pad = int | float  # or bool, which is an int


class Inputs:
    """The memory that graphs read their inputs from; a smaller batch size is its first rows."""

    def __init__(
        self, examples: list[Tensor], batch_sizes: Iterable[int], pad: Pad | Sequence[Pad]
    ) -> None:
        self.batch_sizes = sorted(set(batch_sizes))
        require(min(self.batch_sizes, default=0) >= 1, "batch_sizes from 1 on", self.batch_sizes)
        are_batches = all(isinstance(x, Tensor) and x.ndim and len(x) for x in examples)
        require(examples and are_batches, "an example of tensors [B, ...]", show(examples))
        self._pads = [pad] * len(examples) if isinstance(pad, Pad) else list(pad)
        require(len(self._pads) == len(examples), f"{len(examples)} pads", self._pads)
        self._filled = self.batch_sizes[-1]  # all rows from here on are padding
        with torch.inference_mode(False), torch.no_grad():  # so that calls in any mode may write
            self._buffers = [self._repeated(x) for x in examples]

    def _repeated(self, example: Tensor) -> Tensor:
        rows = torch.arange(self._filled, device=example.device) % len(example)
        return example[rows].contiguous()

    def rows(self, size: int) -> list[Tensor]:
        return [buffer[:size] for buffer in self._buffers]

    def load(self, inputs: Sequence[Tensor]) -> int:
        """Copy a batch in, pad the rest, and return the batch's size."""
        batch = self._check(inputs)
        for buffer, x, pad in zip(self._buffers, inputs, self._pads, strict=True):
            buffer[:batch].copy_(x, non_blocking=True)
            if batch < self._filled:
                buffer[batch : self._filled].fill_(pad)
        self._filled = batch
        return batch

    def _check(self, inputs: Sequence[Tensor]) -> int:
        are_tensors = all(isinstance(x, Tensor) for x in inputs)
        fits = are_tensors and len(inputs) == len(self._buffers)
        require(fits, f"{len(self._buffers)} tensors", show(inputs) if not fits else "")
        batch, largest = inputs[0].shape[0] if inputs[0].ndim else 0, self.batch_sizes[-1]
        require(1 <= batch <= largest, f"1 to {largest} rows", batch)
        for i, (like, x) in enumerate(zip(self._buffers, inputs, strict=True)):
            shape = (batch, *like.shape[1:])
            if x.shape != shape or x.dtype != like.dtype or x.device != like.device:
                want = f"{list(shape)} {like.dtype} on {like.device}"
                require(False, f"input {i} to be {want}", show(x))
        return batch


class Addresses:
    """Where parameters, buffers and fixed tensors lay when the graphs were recorded."""

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        # Each by the dict that holds it, since a parameter that is assigned anew is another tensor.
        self._slots: list[tuple[str, dict[str, Any], str]] = []
        for path, m in (named for root in modules for named in root.named_modules()):
            for held in (m._parameters, m._buffers):
                names = [name for name, tensor in held.items() if tensor is not None]
                self._slots += [(f"{path}.{name}".lstrip("."), held, name) for name in names]
        fixed: dict[str, Any] = {f"fixed tensor {i}": t for i, t in enumerate(tensors)}
        self._slots += [(name, fixed, name) for name in fixed]
        self._recorded = [held[name].data_ptr() for _, held, name in self._slots]

    def check(self) -> None:
        try:
            if [held[name].data_ptr() for _, held, name in self._slots] == self._recorded:
                return
        except (KeyError, AttributeError):  # deleted, or None
            pass
        for (path, held, name), recorded in zip(self._slots, self._recorded, strict=True):
            tensor = held.get(name)
            if tensor is None or tensor.data_ptr() != recorded:
                got = "no tensor" if tensor is None else "another address"
                raise RuntimeError(
                    f"cuda_graphs: expected {path} where it lay when the graphs were recorded, "
                    f"got {got}; make new graphs"
                )


def require(holds: Any, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"cuda_graphs: expected {expected}, got {got}")


def show(values: Any) -> str:
    """Tensors by what is checked of them, others by their types."""
    values = values if isinstance(values, (tuple, list)) else [values]
    shown = (
        f"{list(v.shape)} {v.dtype} on {v.device}" if isinstance(v, Tensor) else type(v).__name__
        for v in values
    )
    return ", ".join(shown) or "nothing"
