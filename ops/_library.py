"""How an op is defined: one schema, one CPU impl, one CUDA impl, one fake.

`torch.library.Library` costs 2.3 us a call where `custom_op` costs 7.5 (torch 2.11 and 2.13, CPU),
and decode makes some 300 such calls a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Impl = Callable[..., Any]

_LIBRARY = torch.library.Library("moe_compile", "DEF")  # the ops live as long as this object

# A node that a pass inserts has no eager strides to keep: without this tag Inductor may hand the op
# any layout. With it, arguments come in the stride order of their fake tensors.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def define(schema: str, *, cpu: Impl, cuda: Impl, fake: Impl, cpp: bool = False) -> Any:
    """Register `moe_compile::<schema>` and return its overload, which is what callers call.

    cpp: once the C++ kernels are compiled, cpu_dispatch.cpp takes the op's CPU calls, and hands
    those it does not know to `moe_compile::_<schema>`, which is `cpu`.
    """
    name = schema.partition("(")[0]
    if cpp:
        _LIBRARY.define(f"_{schema}")
        _LIBRARY.impl(f"_{name}", _without_gradients(name, cpu), "CPU")
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, _without_gradients(name, cpu), "CPU")
    _LIBRARY.impl(name, _without_gradients(name, _on_its_device(cuda)), "CUDA")
    fake = _without_gradients(name, fake)
    torch.library.register_fake(f"moe_compile::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.moe_compile, name).default


def _on_its_device(impl: Impl) -> Impl:
    """`impl` with the device of its first tensor current, which is where Triton launches."""

    def call(*args: Any, **kwargs: Any) -> Any:
        device = args[0].device.index
        if device == torch.cuda.current_device():
            return impl(*args, **kwargs)
        with torch.cuda.device(device):
            return impl(*args, **kwargs)

    return call


def _without_gradients(name: str, impl: Impl) -> Impl:
    """`impl`, or an error where autograd, which has no kernel of ours, would record nothing.

    Here and not in an Autograd kernel: that would cost a second way through Python, in decode with
    cold caches 50 us a call.
    """
    is_grad_enabled = torch.is_grad_enabled

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled() and any(map(_wants_gradient, (*args, *kwargs.values()))):
            raise RuntimeError(
                f"{name}: expected inputs without gradients (this op has no backward; "
                "use torch.no_grad() or torch.inference_mode()), got requires_grad=True"
            )
        return impl(*args, **kwargs)

    return call


def _wants_gradient(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_wants_gradient, argument))
    return isinstance(argument, Tensor) and argument.requires_grad
