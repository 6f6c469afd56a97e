"""silu(gate) * up becomes the end of the product of gate and up, where that is faster."""

import pytest
import torch
from expecttest import assert_expected_inline
from float8 import gemm_inputs
from helpers import graph_on_gpu

from moe_compile.ops import moe
from moe_compile.passes.fuse_epilogue import LEAST_ROWS_FP8, fuse_epilogue
from moe_compile.testing import assert_documented, capture, render, run_passes

H, F = 64, 128


def layer(x, w, offsets):
    return moe.silu_mul(moe.grouped_mm(x, w, offsets))


def inputs(along_h=True, dtype=torch.bfloat16):
    w = torch.randn(3, 2 * F, H).to(dtype).mT
    offsets = torch.tensor([1, 1, 4], dtype=torch.int32)
    return torch.randn(4, H).to(dtype), w if along_h else w.contiguous(), offsets


def declined(gm):
    (outcome,) = run_passes(gm, fuse_epilogue)
    assert not outcome.rewrites
    return [e.detail for e in outcome.declined]


def test_docstring():
    assert_documented(fuse_epilogue, graph_on_gpu(layer, *inputs()))


def test_all_that_both_say_goes_along_and_twice_is_once():
    def gpt_oss(x, w, offsets, rows, bias):
        h = moe.grouped_mm(x, w, offsets, rows, 2, bias)
        return moe.silu_mul(h, True, 1.702, limit=7.0, up_shift=1.0)

    rows, bias = torch.arange(8, dtype=torch.int32), torch.randn(3, 2 * F).bfloat16()
    gm = graph_on_gpu(gpt_oss, *inputs(along_h=False), rows, bias)
    (outcome,) = run_passes(gm, fuse_epilogue)
    assert [e.detail for e in outcome.rewrites] == ["grouped_mm_silu_mul, 128 columns"]
    assert_expected_inline(
        render(gm.graph).splitlines()[-2],
        """grouped_mm_silu_mul: bf16[8, 128] = moe_compile.grouped_mm_silu_mul(arg0_1, arg1_1, arg2_1, arg3_1, 2, arg4_1, interleaved=True, alpha=1.702, limit=7.0, up_shift=1.0)""",  # noqa: E501
    )
    assert declined(gm) == []


def layer_fp8(x, x_scale, w, w_scale, offsets, **how):
    h = moe.grouped_mm_fp8(x, x_scale, w, w_scale, offsets)
    how = {"round_silu": True, "round_product": True, "offsets": offsets, **how}
    return moe.silu_mul_quant(h, **how)


def test_float8():
    def fn(x, x_scale, w, w_scale, offsets):
        how = {"limit": 10.0, "power_of_two": True, "column_major": True, "amax_eps": 0.5}
        return layer_fp8(x, x_scale, w, w_scale, offsets, **how)

    gm = graph_on_gpu(fn, *gemm_inputs([LEAST_ROWS_FP8, 0], 0, 128, 2 * F, "cpu"))
    assert run_passes(gm, fuse_epilogue)[0].rewrites
    assert_expected_inline(
        render(gm.graph),
        """\
arg0_1: f8e4m3[2048, 128]
arg1_1: f32[2048, 1]
arg2_1: f8e4m3[2, 128, 256]
arg3_1: f32[2, 1, 2]
arg4_1: i32[2]
grouped_mm_fp8_silu_mul: bf16[2048, 128] = moe_compile.grouped_mm_fp8_silu_mul(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, alpha=1.0, limit=10.0, up_shift=0.0, round_silu=True)
quant_fp8 = moe_compile.quant_fp8(grouped_mm_fp8_silu_mul, group=128, power_of_two=True, column_major=True, amax_floor=1e-10, scale_floor=0.0, scale_by_reciprocal=False, quant_by_reciprocal=False, amax_eps=0.5, offsets=arg4_1)
getitem: f8e4m3[2048, 128] = quant_fp8[0]
getitem_1: f32[2048, 1] = quant_fp8[1]
return [getitem, getitem_1]""",  # noqa: E501
    )
    assert declined(gm) == []


def reads_the_product(x, w, offsets):
    h = moe.grouped_mm(x, w, offsets)
    return moe.silu_mul(h), h.sum(1)


def test_near_misses():
    others_read = "the product of gate and up is read by others, too"
    assert declined(graph_on_gpu(reads_the_product, *inputs())) == [others_read]
    not_along_h = "halves of a weight that is not stored along H"
    assert declined(graph_on_gpu(layer, *inputs(along_h=False))) == [not_along_h]
    dense = graph_on_gpu(moe.silu_mul, inputs()[0])
    assert declined(dense) == []


NEAR_MISSES_FP8 = {
    "the activation is not rounded before it is quantised": {"round_product": False},
    "an activation that the product's epilogue does not know": {"round_sigmoid": True},
}


@pytest.mark.parametrize("reason", NEAR_MISSES_FP8)
def test_near_misses_in_float8(reason):
    def fn(x, x_scale, w, w_scale, offsets):
        return layer_fp8(x, x_scale, w, w_scale, offsets, **NEAR_MISSES_FP8[reason])

    args = gemm_inputs([LEAST_ROWS_FP8, 0], 0, 128, 2 * F, "cpu")
    assert declined(graph_on_gpu(fn, *args)) == [reason]


def test_blocks_that_hold_gate_and_up():
    def fn(x, x_scale, w, w_scale, offsets):
        return layer_fp8(x, x_scale, w, w_scale, offsets)

    args = gemm_inputs([LEAST_ROWS_FP8, 0], 0, 128, 384, "cpu")
    reason = "blocks of scales that hold both gate and up: 384 columns"
    assert declined(graph_on_gpu(fn, *args)) == [reason]


def test_few_rows_of_float8():
    def fn(x, x_scale, w, w_scale, offsets):
        return layer_fp8(x, x_scale, w, w_scale, offsets)

    args = gemm_inputs([3, 4], 0, 128, 2 * F, "cpu")
    assert declined(graph_on_gpu(fn, *args)) == ["7 rows: gains from 2048 known ones on"]


def test_a_cpu_is_left_alone():
    gm = capture(layer, *inputs())
    if gm.graph.find_nodes(op="placeholder")[0].meta["val"].device.type == "cpu":
        assert declined(gm) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 300, 5000])
def test_bit_by_bit(tokens, dtype, device):
    E, H, F = 8, 512, 384
    x = torch.randn(tokens, H, device=device).to(dtype)
    w = torch.randn(E, 2 * F, H, device=device).to(dtype).mT
    offsets = torch.rand(E, device=device).mul(tokens + 1).int().sort().values
    for weight, interleaved in ((w, False), (w, True), (w.contiguous(), True)):
        fused = moe.grouped_mm_silu_mul(x, weight, offsets, interleaved=interleaved, limit=7.0)
        h = moe.grouped_mm(x, weight, offsets)
        assert torch.equal(fused, moe.silu_mul(h, interleaved, limit=7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[1], [2000, 100, 0, 3000], [9000]], ids=str)
def test_float8_bit_by_bit(sizes, device):
    args = gemm_inputs(sizes, 5, 512, 1024, device)
    offsets, how = args[-1], {"round_silu": True}
    q, scale = moe.quant_fp8(moe.grouped_mm_fp8_silu_mul(*args, **how), offsets=offsets)
    q_want, scale_want = layer_fp8(*args)
    end = int(offsets[-1])
    assert torch.equal(scale[:end], scale_want[:end])
    assert torch.equal(q[:end].view(torch.uint8), q_want[:end].view(torch.uint8))
