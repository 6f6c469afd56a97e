"""Let a kernel's launch overlap the end of the one before it: programmatic dependent launch.

On Hopper and newer a kernel launched so may start while its predecessor still runs, and says itself
where it needs what that wrote. The rules that make it safe, in streams and in CUDA graphs:

- every program waits, first of all or after reading what no kernel in flight writes, and before it
  returns. So when a kernel is done, all before it are;
- only then it lets the next kernel start: whoever reads before waiting sees at least all that came
  before the predecessor.

Source: CUDA Programming Guide, Programmatic Dependent Launch and Synchronization.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor import config as inductor_config

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptrs, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Have lines of memory brought to L2, which keeps them right whoever writes them later."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [ptrs.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def _has_pdl(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def overlap(x: Tensor) -> dict[str, Any]:
    """Arguments for the launch of a kernel that begins with `wait_for_previous`.

    None where Inductor launches its own kernels so: it proves what they may read early from what
    it knows of the kernels before, and it does not know that ours let others start.
    """
    theirs = inductor_config.triton.enable_pdl
    if x.is_cuda and torch.version.cuda and not theirs and _has_pdl(x.device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
