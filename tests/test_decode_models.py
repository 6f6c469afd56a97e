"""The models that bench_decode.py times: what a step reads, and to which group a kernel belongs."""

import pytest
from _decode_models import GROUPS, MODELS, group_bytes, group_kernels, random_model, table
from bench_decode import by_group

pytest.importorskip("transformers")


def bytes_of(name, layers, batch=1, positions=640):
    return group_bytes(random_model(MODELS[name](layers), "meta"), batch, positions)


def test_bytes_of_qwen3():
    read = bytes_of("qwen3", 48)
    assert read["experts"] == pytest.approx(48 * 8 * 3 * 768 * 2048 * 2)
    assert read["dense"] == 48 * 2048 * (2 * 4096 + 2 * 512 + 128) * 2
    assert read["attention"] == 48 * 640 * 2 * 4 * 128 * 2
    assert read["head"] == 151936 * 2048 * 2
    assert read["routing"] == 0
    assert set(read) == set(GROUPS)


def test_bytes_of_deepseek_v3():
    """Its cache holds the latent form; the shared expert is a dense product."""
    one, two = (bytes_of("deepseek_v3", layers) for layers in (1, 2))
    assert one["experts"] == 0
    assert one["attention"] == 640 * (512 + 64) * 2
    assert two["experts"] == pytest.approx(8 * 3 * 2048 * 7168 * 2)
    shared_and_router = 3 * 2048 * 7168 + 32 * 7168
    attention = 7168 * (1536 + 576 + 16384) + 1536 * 24576 + 512 * 32768
    assert two["dense"] - one["dense"] == 2 * (shared_and_router + attention)


def test_bytes_of_gpt_oss():
    read = bytes_of("gpt_oss", 2, batch=2)
    expert = 2880 * 2880 * 3 + 2880 * 3  # with biases
    assert read["experts"] == pytest.approx(2 * 128 * (1 - (1 - 4 / 128) ** 2) * expert * 2)
    assert read["attention"] == 2 * (640 + 128) * 2 * 8 * 64 * 2 + 2 * 64 * 2


def test_groups_of_kernels():
    ran = [
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", 1.0),
        ("skinny_mm_kernel", 2.0),
        ("_rotate_kernel", 3.0),
        ("_attend_kernel", 4.0),
        ("route_kernel", 5.0),
        ("grouped_mm_kernel", 6.0),
        ("down_combine_kernel", 7.0),
        ("nvjet_tst_64x8_64x16_2x4_h_bz_TNT", 8.0),
        ("Memcpy DtoD (Device -> Device)", 9.0),
    ]
    found = {"rest": (2, 10.0), "dense": (1, 2.0), "attention": (2, 7.0), "routing": (1, 5.0)}
    found |= {"experts": (2, 13.0), "head": (1, 8.0)}
    assert group_kernels(ran) == found
    rows = by_group(ran, bytes_of("qwen3", 1), 4e12)
    assert [r["group"] for r in rows] == list(GROUPS)
    assert rows[0] == {"group": "experts", "kernels": 2, "us": 13.0, "MB": 75.5, "floor us": 18.9}
    assert "experts           2     13.0      18.9" in table(rows)


def test_classes():
    assert [type(random_model(make(1), "meta")).__name__ for make in MODELS.values()] == [
        "Qwen3MoeForCausalLM",
        "DeepseekV3ForCausalLM",
        "GptOssForCausalLM",
    ]
