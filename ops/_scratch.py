"""Launches of each kernel to measure, on tensors of their own, by kind and sizes.

Enough of them that each finds its weights in memory and not in L2. Rows are routed uniformly: with
other routings other blocks may be faster, but the host does not know them either. Caches are full.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_compile.ops import _grouped_mm_fp8_kernel, _grouped_mm_kernel, _skinny_mm_kernel
from moe_compile.ops._experts_columns_kernel import launch_down_columns, launch_up_columns
from moe_compile.ops._experts_kernel import launch_down
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops._tuned import Kind, Sizes
from moe_compile.ops.attend import attend_triton

Call = Callable[[Any], Any]  # of blocks; returns what the kernel wrote
FP8 = torch.float8_e4m3fn
_MOST_CALLS = 256


def how_many(size: int, device: torch.device) -> int:
    """Calls that read so many bytes each, for twice what L2 holds."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_CALLS, max(1, -(-2 * l2 // max(1, size))))


def values(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Small random numbers; the caller's random numbers stay theirs."""
    generator = torch.Generator(device).manual_seed(0)
    if dtype == FP8:  # every number from 0 to 1
        bits = torch.empty(shape, dtype=torch.uint8, device=device)
        return bits.random_(0, 0x38, generator=generator).view(FP8)
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-0.05, 0.05, generator=generator)


def skinny_mm_inputs(
    kind: Kind, sizes: Sizes, device: torch.device
) -> list[tuple[Tensor, list[Tensor]]]:
    """x and the weights of each call."""
    (rows, dtype, k_contiguous), (K, *Ns) = kind, sizes
    count = how_many(K * sum(Ns) * dtype.itemsize, device)
    shapes = [(count, N, K) if k_contiguous else (count, K, N) for N in Ns]
    weights = [values(device, dtype, *shape) for shape in shapes]
    x = values(device, dtype, rows, K)
    return [(x, [w[i].t() if k_contiguous else w[i] for w in weights]) for i in range(count)]


def skinny_mm(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    def call(x: Tensor, ws: list[Tensor]) -> Call:
        return lambda blocks: _skinny_mm_kernel.launch(x, ws, [None] * len(ws), blocks)

    return [call(x, ws) for x, ws in skinny_mm_inputs(kind, sizes, device)]


def attend(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    """Of one key head a sequence, which lies in memory as several of fewer sequences."""
    (repeats, Q, D, F, U, dtype, masked), (heads, S) = kind, sizes
    count = how_many(heads * S * (D + F + U) * dtype.itemsize, device)
    q, q_rot = (values(device, dtype, heads, repeats, Q, features) for features in (D, U))
    k, v, k_rot = (values(device, dtype, count, heads, 1, S, features) for features in (D, F, U))
    mask, last = None, None
    if masked == "last":
        last = torch.full((heads,), S - 1, device=device)
    elif masked is not None:
        mask_dtype, is_shared = masked
        shape = (heads, 1, 1, S) if is_shared else (heads, repeats, Q, S)
        mask = torch.full(shape, mask_dtype == torch.bool, dtype=mask_dtype, device=device)

    def call(k: Tensor, v: Tensor, k_rot: Tensor) -> Call:
        rot: dict[str, Any] = {"q_rot": q_rot, "k_rot": k_rot} if U else {}
        given = (q, k, v if F else None, mask)
        return lambda blocks: attend_triton(*given, last=last, blocks=blocks, **rot)

    return [call(*one) for one in zip(k, v, k_rot, strict=True)]


def _each_an_expert(R: int, K: int, count: int, device: torch.device) -> list[Tensor]:
    """ids [R / K, K] of each call: no two rows share an expert."""
    ids = torch.arange(R * count, dtype=torch.int32, device=device)
    return list(ids.view(count, R // K, K))


def experts_up(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, interleaved, K), (R, H, G) = kind, sizes
    count = how_many(R * H * G * dtype.itemsize, device)
    x, w = values(device, dtype, R // K, H), values(device, dtype, R * count, G, H).mT
    y, gate = x.new_empty(R, G // 2), Gate(interleaved)

    def call(ids: Tensor) -> Call:
        def launch(blocks: Any) -> Tensor:
            given = (x, w, y, ids, None, K, None, gate, blocks)
            _grouped_mm_kernel.launch(*given, direct=True)
            return y

        return launch

    return [call(ids) for ids in _each_an_expert(R, K, count, device)]


def experts_up_columns(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, interleaved, K), (R, H, G) = kind, sizes
    count = how_many(R * H * G * dtype.itemsize, device)
    x, w = values(device, dtype, R // K, H), values(device, dtype, R * count, H, G)
    h, gate = x.new_empty(R, G // 2), Gate(interleaved)

    def call(ids: Tensor) -> Call:
        def launch(blocks: Any) -> Tensor:
            launch_up_columns(x, ids, w, None, h, gate, blocks)
            return h

        return launch

    return [call(ids) for ids in _each_an_expert(R, K, count, device)]


def experts_up_fp8(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, group, K), (R, H, G) = kind, sizes
    count = how_many(R * H * G, device)
    x, w = _fp8(device, R // K, H, group), _fp8_weights(device, R * count, H, G)
    y = torch.empty(R, G // 2, dtype=dtype, device=device)

    def call(ids: Tensor) -> Call:
        def launch(blocks: Any) -> Tensor:
            given = (*x, *w, y, ids, None, K, None, Gate(), blocks)
            _grouped_mm_fp8_kernel.launch(*given, direct=True)
            return y

        return launch

    return [call(ids) for ids in _each_an_expert(R, K, count, device)]


def experts_down(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, fp8, K), (T, F, C) = kind, sizes
    count = how_many(T * K * F * C * (1 if fp8 else dtype.itemsize), device)
    h, weights = values(device, dtype, T * K, F), torch.ones(T, K, device=device)
    E = T * K * count
    scales: Tensor | None = None
    if fp8:
        w, scales = _fp8_weights(device, E, F, C)
    else:
        w = values(device, dtype, E, C, F).mT
    out = torch.empty(T, C, dtype=dtype, device=device)

    def call(ids: Tensor) -> Call:
        def launch(blocks: Any) -> Tensor:
            launch_down(h, ids, weights, w, scales, None, None, out, blocks, (1e-10, False))
            return out

        return launch

    return [call(ids) for ids in _each_an_expert(T * K, K, count, device)]


def experts_down_columns(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, K), (T, F, C) = kind, sizes
    count = how_many(T * K * F * C * dtype.itemsize, device)
    h, weights = values(device, dtype, T * K, F), torch.ones(T, K, device=device)
    w, out = values(device, dtype, T * K * count, F, C), h.new_empty(T, C)

    def call(ids: Tensor) -> Call:
        def launch(blocks: Any) -> Tensor:
            launch_down_columns(h, ids, weights, w, None, None, out, blocks)
            return out

        return launch

    return [call(ids) for ids in _each_an_expert(T * K, K, count, device)]


def grouped_mm(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, h_contiguous, gating, top_k), (R, E, H, G) = kind, sizes
    count = how_many(min(R, E) * H * G * dtype.itemsize, device)
    w = values(device, dtype, E, G, H).mT if h_contiguous else values(device, dtype, E, H, G)
    x = values(device, dtype, -(-R // max(1, top_k)), H)
    gate = None if gating == 0 else Gate(interleaved=gating == 2)
    y = x.new_empty(R, G if gate is None else G // 2)

    def call(offsets: Tensor, rows: Tensor | None) -> Call:
        def launch(blocks: Any) -> Tensor:
            _grouped_mm_kernel.launch(x, w, y, offsets, rows, max(1, top_k), None, gate, blocks)
            return y

        return launch

    return [call(*routing) for routing in _routings(R, E, top_k > 0, count, device)]


def grouped_mm_fp8(kind: Kind, sizes: Sizes, device: torch.device) -> list[Call]:
    (dtype, group, gated, top_k, dense), (R, E, H, G) = kind, sizes
    count = how_many(min(R, E) * H * G, device)
    ws = [_fp8_weights(device, E, H, G) for _ in range(count if dense else 1)]
    x = _fp8(device, -(-R // max(1, top_k)), H, group)
    gate = Gate() if gated else None
    y = torch.empty(R, G // 2 if gated else G, dtype=dtype, device=device)

    def call(w: tuple[Tensor, Tensor], offsets: Tensor | None, rows: Tensor | None) -> Call:
        def launch(blocks: Any) -> Tensor:
            given = (*x, *w, y, offsets, rows)
            _grouped_mm_fp8_kernel.launch(*given, max(1, top_k), None, gate, blocks)
            return y

        return launch

    if dense:
        return [call(w, None, None) for w in ws]
    return [call(ws[0], *routing) for routing in _routings(R, E, top_k > 0, count, device)]


def _fp8(device: torch.device, rows: int, columns: int, group: int) -> tuple[Tensor, Tensor]:
    scales = torch.ones(rows, -(-columns // group), device=device)
    return values(device, FP8, rows, columns), scales


def _fp8_weights(device: torch.device, E: int, H: int, G: int) -> tuple[Tensor, Tensor]:
    scales = torch.full((E, -(-G // 128), -(-H // 128)), 0.05, device=device)
    return values(device, FP8, E, G, H).mT, scales.mT


def _routings(
    R: int, E: int, has_rows: bool, count: int, device: torch.device
) -> list[tuple[Tensor, Tensor | None]]:
    """Offsets, and rows in the order of their experts, for each call."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(E, (R,), device=device, generator=generator)
        offsets = torch.bincount(ids, minlength=E).cumsum(0).to(torch.int32)
        found.append((offsets, ids.argsort(stable=True).to(torch.int32) if has_rows else None))
    return found
