"""A torch.compile backend for Mixture-of-Experts inference.

model = torch.compile(model, backend="moe_compile", mode="reduce-overhead")
"""

from moe_compile._versions import require_torch

require_torch()

from moe_compile import parallel  # noqa: E402
from moe_compile._explain import explain  # noqa: E402
from moe_compile.backend import moe_compile as backend  # noqa: E402
from moe_compile.constants import refresh  # noqa: E402
from moe_compile.cuda_graphs import cuda_graphs  # noqa: E402
from moe_compile.huggingface import prepare, register_experts  # noqa: E402
from moe_compile.options import Options  # noqa: E402
from moe_compile.quantization import quantize  # noqa: E402
from moe_compile.report import Report  # noqa: E402
from moe_compile.warmup import warmup  # noqa: E402

__all__ = [
    "Options",
    "Report",
    "backend",
    "cuda_graphs",
    "explain",
    "parallel",
    "prepare",
    "quantize",
    "refresh",
    "register_experts",
    "warmup",
]
