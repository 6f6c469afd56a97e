"""The C++ kernels behind grouped_mm and combine on a CPU, and what stands in without a compiler."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import FLOATS, assert_close
from torch._inductor.codecache import CppCodeCache

from moe_compile.ops import _cpu
from moe_compile.ops.combine import combine, combine_reference
from moe_compile.ops.experts import experts
from moe_compile.ops.grouped_mm import grouped_mm, grouped_mm_reference
from moe_compile.ops.route import route
from moe_compile.ops.skinny_mm import skinny_mm

LAYOUTS = ["H contiguous", "G contiguous", "neither", "far apart"]
COUNTS_H_G = [
    ([1], 64, 64),
    ([0, 3, 0, 1], 1, 1),
    ([2, 0, 7, 13], 50, 70),  # part of a vector, part of a block, several panels
    ([0, 6, 5], 129, 200),
    ([9], 17, 3),
    ([2, 110, 0, 5], 40, 130),  # two passes over the rows, and torch.mm for one expert
    ([300, 1], 33, 64),
    ([0, 0], 32, 64),
    ([], 32, 64),
    ([1, 2], 0, 64),
    ([1, 2], 64, 0),
]


@pytest.fixture
def compiled():
    if _cpu._library() is None:
        pytest.skip("no C++ compiler")


def weights(E, H, G, layout, dtype):
    w = torch.randn(E, H, G).to(dtype)
    if layout == "H contiguous":
        return w.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "neither":
        return torch.stack((w, w), -1)[..., 0]
    if layout == "far apart":
        big = torch.empty(E, G + 2, H + 3, dtype=dtype).fill_(float("nan"))
        big[:, 1 : G + 1, 1 : H + 1] = w.transpose(1, 2)
        return big[:, 1 : G + 1, 1 : H + 1].transpose(1, 2)
    return w


def inputs(counts, H, G, layout, dtype, has_rows, has_bias, top_k=3):
    """What grouped_mm takes, with four rows of NaN that no expert owns."""
    R, E = sum(counts) + 4, len(counts)
    offsets = torch.tensor(counts, dtype=torch.int32).cumsum(0).int()
    x = torch.randn((R + top_k - 1) // top_k + 1 if has_rows else R, H + 5).to(dtype)[:, :H]
    x[-1 if has_rows else slice(R - 4, R)] = float("nan")
    rows = torch.randint((len(x) - 1) * top_k, (R,)).int() if has_rows else None
    if has_rows:
        rows[R - 4 :] = len(x) * top_k - 1
    bias = torch.randn(E, G).to(dtype) if has_bias else None
    return x, weights(E, H, G, layout, dtype), offsets, rows, top_k if has_rows else 1, bias


def check_grouped_mm(args):
    y = grouped_mm(*args)
    assert_close(y, grouped_mm_reference, *args)
    assert (y[-4:] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counts_H_G", COUNTS_H_G, ids=str)
def test_grouped_mm(counts_H_G, layout, dtype, compiled):
    for has_rows, has_bias in (False, False), (False, True), (True, False), (True, True):
        check_grouped_mm(inputs(*counts_H_G, layout, dtype, has_rows, has_bias))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_every_number_of_rows(layout, dtype, compiled):
    check_grouped_mm(inputs(range(30), 70, 72, layout, dtype, True, True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_infinite_and_nan_stay_where_they_are(layout, dtype, compiled):
    x, w, offsets, *_ = inputs([1, 2, 4], 70, 72, layout, dtype, False, False)
    w[0, 3, 5], w[1, 69, 71], w[2, 0, 0] = float("nan"), float("inf"), float("-inf")
    assert_close(grouped_mm(x, w, offsets), grouped_mm_reference, x, w, offsets)


def test_weights_of_experts_without_rows_are_not_read(compiled):
    x, w, offsets, *_ = inputs([2, 0, 1], 64, 64, "G contiguous", torch.float32, False, False)
    y = grouped_mm(x, w, offsets)
    w[1] = float("nan")
    assert torch.equal(grouped_mm(x, w, offsets), y)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_same_bits_from_any_number_of_threads(layout, dtype, compiled):
    args = inputs([1, 0, 5, 20, 9], 300, 330, layout, dtype, True, True)
    y, position = torch.randn(600, 300).to(dtype), torch.randperm(600).int().view(75, 8)
    mix = torch.rand(75, 8)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            outs = grouped_mm(*args), combine(y, position, mix), combine(y, position[:1], mix[:1])
            results.append(outs)
    finally:
        torch.set_num_threads(before)
    for outs in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs, results[0], strict=True))


def test_called_from_several_threads(compiled):
    args = inputs([3, 4, 9], 128, 128, "H contiguous", torch.float32, True, True)
    y = grouped_mm(*args)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(o, y) for o in pool.map(lambda _: grouped_mm(*args), range(40)))


def test_indices_out_of_range_are_errors(compiled):
    x, w, offsets, rows, top_k, _ = inputs([2, 2], 64, 64, "H contiguous", FLOATS[0], True, False)
    rows[1] = len(x) * top_k
    with pytest.raises(ValueError, match="expected ascending offsets up to 8 and rows in"):
        grouped_mm(x, w, offsets, rows, top_k)
    with pytest.raises(ValueError, match="expected ascending offsets"):
        grouped_mm(x, w, offsets.flip(0))
    with pytest.raises(ValueError, match="combine: expected positions below 2"):
        combine(torch.rand(2, 8), torch.tensor([[0, 2]], dtype=torch.int32), torch.rand(1, 2))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weights_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("T_K_H", [(1, 8, 1024), (5, 3, 41), (0, 2, 8), (2, 1, 1)], ids=str)
def test_combine(T_K_H, dtype, weights_dtype, out_dtype, compiled):
    T, K, H = T_K_H
    y = torch.randn(T * K + 1, H + 3).to(dtype)[:, :H]
    y[-1] = float("nan")
    position = torch.randperm(T * K).int().view(T, K)
    mix = torch.rand(T, K).to(weights_dtype)
    position[-1:, 0], mix[-1:, 0] = -1, float("nan")

    def reference(y, mix):
        if y.dtype == torch.float64:
            return combine_reference(y, position, mix)
        return combine_reference(y.float(), position, mix.float()).to(out_dtype)

    assert_close(combine(y, position, mix, out_dtype), reference, y, mix)


def test_without_a_compiler(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr(CppCodeCache, "load", refuse)
    _cpu._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="moe_compile"):
            for layout in LAYOUTS:
                for has_rows, has_bias in (False, False), (True, True):
                    args = inputs([2, 0, 7, 13], 50, 70, layout, FLOATS[2], has_rows, has_bias)
                    check_grouped_mm(args)
            y, position = torch.randn(6, 40), torch.tensor([[0, -1], [5, 2]], dtype=torch.int32)
            mix = torch.rand(2, 2)
            assert_close(combine(y, position, mix), combine_reference, y, position, mix)
    finally:
        _cpu._library.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().endswith("go through torch.mm: no C++ compiler found")


def plain_calls(dtype):
    """Calls that cpu_dispatch.cpp takes, by op, and one of each that it hands on to Python."""
    x, w = torch.randn(3, 70, dtype=dtype), torch.randn(96, 70, dtype=dtype).t()
    ids = torch.randint(-1, 5, (3, 2))
    mix = torch.rand(3, 2, dtype=dtype)
    up, down = torch.randn(4, 48, 70, dtype=dtype).mT, torch.randn(4, 70, 24, dtype=dtype).mT
    logits, bias = torch.randn(3, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    grouped = ("sigmoid", True, bias, 4, 2, "top2_sum", True, 1e-20, 2.5)
    return {
        skinny_mm: [
            (x, w),
            (x, w, torch.randn(96, dtype=dtype)),
            (torch.cat((x, x), 1)[:, ::2], w.repeat(1, 2)),
        ],
        experts: [
            (x, ids, mix, up, down),
            (
                x,
                ids.int(),
                mix,
                up,
                down,
                torch.randn(4, 48, dtype=dtype),
                torch.randn(4, 70, dtype=dtype),
            ),
            (x, ids.t().contiguous().t(), mix, up, down, None, None, True, 1.7, 7.0, 1.0),
        ],
        route: [
            (logits, 2),
            (logits, 3, *grouped),
            (logits.t().contiguous().t(), 2, "none", False),
        ],
    }


@pytest.mark.skipif(_cpu._library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dispatch_from_cpp_is_that_from_python(dtype):
    for op, calls in plain_calls(dtype).items():
        python = getattr(torch.ops.moe_compile, f"_{op._schema.name.partition('::')[2]}")
        for i, args in enumerate(calls):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                got = op(*args)
            names = {event.name for event in profile.events()}
            assert (python.default.name() in names) == (i == 2), names
            torch.testing.assert_close(got, python(*args), rtol=0, atol=0)
