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

# One H200, us without and with: silu_mul_quant of 8 rows of 2048 1.44 and 1.07; of 8192 rows (84
# MB) 22.8 and 22.6, of 65,536 (671 MB) 158.5 and 165.6; experts of one token, Qwen3-30B-A3B (76 MB)
# 23.0 and 23.7, Mixtral (704 MB) 166 and 204. A decode step of 6 layers of Qwen3: 559 and 524.
MOST_BYTES = 2**26

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def _has_pdl(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def overlap(x: Tensor, size: int = 0) -> dict[str, Any]:
    """Arguments for the launch of a kernel that begins with `wait_for_previous`.

    size: bytes that the kernel moves. Long ones end better alone: programs that wait take the place
    of those that still read.
    None where Inductor launches its own kernels so: it proves what they may read early from what
    it knows of the kernels before, and it does not know that ours let others start.
    """
    if not x.is_cuda or not torch.version.cuda or size > MOST_BYTES:
        return {"PDL": False}
    if not inductor_config.triton.enable_pdl and _has_pdl(x.device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
