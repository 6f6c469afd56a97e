"""The stages of an MoE layer as ops: `from moe_compile.ops import moe` for all of them.

`moe` is `torch.ops.moe_compile`.
"""

if __name__ != "moe_compile.ops":  # a second import would register every op twice
    raise ImportError(f"{__name__!r} is moe_compile.ops: import it by that name")

import torch

from moe_compile.ops import all_reduce_add_rms_norm as _all_reduce_add_rms_norm  # noqa: F401
from moe_compile.ops import attend as _attend  # noqa: F401
from moe_compile.ops import combine as _combine  # noqa: F401
from moe_compile.ops import experts as _experts  # noqa: F401
from moe_compile.ops import experts_fp8 as _experts_fp8  # noqa: F401
from moe_compile.ops import gelu_mul as _gelu_mul  # noqa: F401
from moe_compile.ops import grouped_mm as _grouped_mm  # noqa: F401
from moe_compile.ops import grouped_mm_fp8 as _grouped_mm_fp8  # noqa: F401
from moe_compile.ops import grouped_mm_fp8_silu_mul as _grouped_mm_fp8_silu_mul  # noqa: F401
from moe_compile.ops import grouped_mm_silu_mul as _grouped_mm_silu_mul  # noqa: F401
from moe_compile.ops import linear_fp8 as _linear_fp8  # noqa: F401
from moe_compile.ops import mark_placement as _mark_placement  # noqa: F401
from moe_compile.ops import quant_fp8 as _quant_fp8  # noqa: F401
from moe_compile.ops import relu2 as _relu2  # noqa: F401
from moe_compile.ops import rms_norm_mms as _rms_norm_mms  # noqa: F401
from moe_compile.ops import rotate as _rotate  # noqa: F401
from moe_compile.ops import rotate_and_push as _rotate_and_push  # noqa: F401
from moe_compile.ops import rotate_and_store as _rotate_and_store  # noqa: F401
from moe_compile.ops import route as _route  # noqa: F401
from moe_compile.ops import shard as _shard  # noqa: F401
from moe_compile.ops import silu_mul as _silu_mul  # noqa: F401
from moe_compile.ops import silu_mul_quant as _silu_mul_quant  # noqa: F401
from moe_compile.ops import skinny_mm as _skinny_mm  # noqa: F401
from moe_compile.ops import skinny_mms as _skinny_mms  # noqa: F401
from moe_compile.ops import skinny_mms_fp8 as _skinny_mms_fp8  # noqa: F401
from moe_compile.ops import sort_tokens as _sort_tokens  # noqa: F401

moe = torch.ops.moe_compile
