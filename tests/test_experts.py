import pytest
import torch
from helpers import assert_close

from moe_compile.ops._experts_columns_kernel import ColumnsBlocks
from moe_compile.ops._experts_kernel import FewBlocks, are_few, launch_few
from moe_compile.ops._grouped_mm_blocks import Blocks
from moe_compile.ops._grouped_mm_kernel import Gate
from moe_compile.ops.experts import experts, experts_reference, experts_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, K, E, H, F: one token, several, all on one expert of many, ragged sizes, none
SHAPES = [
    (1, 2, 4, 64, 48),
    (8, 2, 16, 96, 40),
    (3, 1, 1, 33, 7),
    (16, 4, 5, 130, 65),
    (0, 2, 4, 8, 8),
]


def inputs(shape, dtype, device, g_contiguous=False, biases=False):
    T, K, E, H, F = shape
    randn = lambda *s: torch.randn(s, device=device).to(dtype)  # noqa: E731
    ids = torch.rand(T, E, device=device).topk(K, dim=-1).indices
    weights = torch.rand(T, K, device=device)
    if g_contiguous:
        w = randn(E, H, 2 * F) / H**0.5, randn(E, F, H) / F**0.5
    else:
        w = (randn(E, 2 * F, H) / H**0.5).mT, (randn(E, H, F) / F**0.5).mT
    more = (randn(E, 2 * F), randn(E, H)) if biases else ()
    return (randn(T, H), ids, weights, *w, *more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    args = inputs(shape, dtype, device)
    assert_close(experts(*args), experts_reference, *args)


FEW = {"Qwen3": (2, 3, 32, 80, 48), "Mixtral": (1, 2, 8, 200, 120), "no token": (0, 2, 8, 8, 8)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shape", FEW)
def test_two_kernels_for_few_tokens(shape, biases, dtype, device):
    """With an id that is no expert, and the same expert twice."""
    x, ids, *rest = inputs(FEW[shape], dtype, device, biases=biases)
    ids[1:, 0] = -1
    ids[1:, -1] = ids[1:, -2]
    assert are_few(ids.numel(), rest[1], rest[2])
    assert_close(experts_triton(x, ids, *rest), experts_reference, x, ids, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_few_tokens_of_gpt_oss(interleaved, dtype, device):
    """Columns contiguous, of numbers that are no powers of two, biases and all attributes."""
    args = inputs((2, 3, 24, 90, 45), dtype, device, g_contiguous=True, biases=True)
    args[1][0, 1] = 24
    how = {"interleaved": interleaved, "alpha": 1.702, "limit": 1.5, "up_shift": 1.0}
    assert_close(experts_triton(*args, **how), experts_reference, *args, **how)


def test_few_tokens_of_weights_stored_apart(device):
    """Each kernel looks at its own weight; slices of larger weights have other strides."""
    x, ids, weights, up, down = inputs((2, 3, 24, 40, 32), torch.float32, device)
    wide = torch.randn(24, 42, 80, device=device)
    for pair in ((wide[:, 1:41, 8:72], down), (up, down.contiguous())):
        assert are_few(ids.numel(), *pair)
        args = x, ids, weights, *pair
        assert_close(experts_triton(*args), experts_reference, *args)
    assert not are_few(ids.numel(), wide[:, 1:41, ::2], down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [experts, experts_triton], ids=["op", "triton"])
@pytest.mark.parametrize("shape", [(2, 1, 8, 40, 24), (3, 2, 4, 40, 24)], ids=["few", "more"])
def test_a_residual_is_added_to_what_was_rounded(shape, fn, dtype, device):
    args = inputs(shape, dtype, device)
    how = {"limit": 1.5, "dtype": torch.bfloat16}
    residual = torch.randn(40, shape[0], device=device).bfloat16().t()
    out = fn(*args, **how, **{NAMES[fn]: residual})
    assert out.is_contiguous()
    assert torch.equal(out, fn(*args, **how) + residual)


NAMES = {experts: "residual", experts_triton: "residual_TO"}


@pytest.mark.parametrize("blocks", [FewBlocks(16, 4, 2, 1), FewBlocks(64, 1, 4, 3)], ids=str)
def test_any_blocks_give_the_same(blocks, device):
    x, ids, weights, *w = inputs((2, 3, 32, 40, 72), torch.float32, device)
    out = x.new_empty(2, 40)
    up = Blocks(1, 8, 32, 1, 2, 1)
    gate = Gate(True, 1.702, 1.5, 1.0)
    launch_few(x, ids, weights, *w, out, None, None, gate, up, blocks)
    how = {"interleaved": True, "alpha": 1.702, "limit": 1.5, "up_shift": 1.0}
    assert_close(out, experts_reference, x, ids, weights, *w, **how)


COLUMNS = [  # of which the last are wider than all features
    (ColumnsBlocks(8, 16, 2, 1), ColumnsBlocks(16, 16, 2, 1)),
    (ColumnsBlocks(64, 64, 4, 3), ColumnsBlocks(64, 64, 4, 3)),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("blocks", COLUMNS, ids=str)
def test_any_blocks_of_columns_give_the_same(blocks, interleaved, device):
    x, ids, weights, *w = inputs((2, 3, 24, 40, 33), torch.float32, device, g_contiguous=True)
    out = x.new_empty(2, 40)
    launch_few(x, ids, weights, *w, out, None, None, Gate(interleaved), *blocks)
    how = {"interleaved": interleaved}
    assert_close(out, experts_reference, x, ids, weights, *w, **how)


@pytest.mark.parametrize("g_contiguous", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_stages_on_a_gpu(g_contiguous, interleaved, device):
    args = inputs((5, 2, 4, 40, 24), torch.float32, device, g_contiguous)
    how = {"interleaved": interleaved}
    assert_close(experts_triton(*args, **how), experts_reference, *args, **how)


@pytest.mark.parametrize("g_contiguous", [False, True])
def test_tokens_without_experts_and_rows_of_nan(g_contiguous, device):
    """What no kernel wrote must not reach the sum."""
    x, ids, weights, *w = inputs((2, 3, 32, 40, 24), torch.float32, device, g_contiguous)
    ids[0], weights[0] = -1, float("nan")
    x[0] = float("nan")
    out = experts_triton(x, ids, weights, *w)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_g_contiguous_weights_with_biases(dtype, device):
    args = inputs((5, 2, 6, 80, 64), dtype, device, g_contiguous=True, biases=True)
    assert_close(experts(*args), experts_reference, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [32, 45])
def test_gpt_oss_activation(F, dtype, device):
    args = inputs((4, 2, 6, 80, F), dtype, device, biases=True)
    attributes = {"interleaved": True, "alpha": 1.702, "limit": 1.5, "up_shift": 1.0}
    assert_close(experts(*args, **attributes), experts_reference, *args, **attributes)


def test_large_and_nan_gates(device):
    """exp must neither overflow into NaN for far gates nor swallow a NaN."""
    w_up = torch.zeros(1, 1, 32, device=device)
    w_up[0, 0, :16] = torch.linspace(-300, 300, 16)
    w_up[0, 0, 16:] = 1
    w_down = torch.eye(16, device=device)[None]
    ids, weights = (
        torch.zeros(2, 1, dtype=torch.long, device=device),
        torch.ones(2, 1, device=device),
    )
    x = torch.tensor([[1.0], [float("nan")]], device=device)
    out = experts(x, ids, weights, w_up, w_down)
    expected = torch.nn.functional.silu(w_up[0, 0, :16])
    torch.testing.assert_close(out[0], expected, rtol=1e-6, atol=1e-30)
    assert out[1].isnan().all()


def test_ids_that_are_no_expert_add_zero(device):
    x, ids, weights, w_up, w_down = inputs((6, 2, 4, 64, 48), torch.float32, device)
    ids = torch.tensor([[0, -1], [4, 3], [-7, 99], [2, 2], [1, 4], [-1, -1]], device=device)
    weights = weights.masked_fill((ids < 0) | (ids > 3), float("nan"))
    out = experts(x, ids, weights, w_up, w_down)
    assert not out.isnan().any()
    assert (out[2] == 0).all()
    assert (out[5] == 0).all()
    clean = weights.nan_to_num()
    assert_close(out, experts_reference, x, ids, clean, w_up, w_down)


def test_float32_out_of_bfloat16(device):
    args = inputs((4, 2, 6, 64, 32), torch.bfloat16, device)
    out = experts(*args, dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_close(out, experts_reference, *args, dtype=torch.float32)


def test_same_bits_at_any_number_of_threads():
    args = inputs((8, 2, 16, 96, 40), torch.bfloat16, "cpu")
    threads = torch.get_num_threads()
    outs = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        outs.append(experts(*args))
    torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_opcheck(device):
    args = inputs((4, 2, 6, 64, 32), torch.float32, device)
    torch.library.opcheck(experts, args)
    torch.library.opcheck(experts, args, {"limit": 2.0, "dtype": torch.bfloat16})
    torch.library.opcheck(experts, args, {"residual": torch.ones(4, 64, device=device)})


def test_wrong_inputs(device):
    x, ids, weights, w_up, w_down = inputs((4, 2, 6, 64, 32), torch.float32, device)
    wrong = [
        ((x[0], ids, weights, w_up, w_down), r"experts: expected x \[T, H\], got \[64\]"),
        ((x, ids[:3], weights, w_up, w_down), r"expected as many ids as tokens, got \[3, 2\]"),
        ((x, ids, weights[:, :1], w_up, w_down), "expected weights of ids' shape"),
        ((x[:, :9], ids, weights, w_up, w_down), r"expected w_up \[E, H, 2F\] with x's H"),
        ((x, ids, weights, w_up[:5], w_down), "expected w_down with w_up's E"),
        ((x, ids, weights, w_up[..., :60], w_down), "expected w_down .* with half of w_up's last"),
        ((x.bfloat16(), ids, weights, w_up, w_down), "expected w_up in x's dtype"),
        ((x, ids.float(), weights, w_up, w_down), "expected ids int32 or int64"),
        ((x.double(), ids, weights, w_up, w_down), "expected x in float32, float16 or bfloat16"),
    ]
    for args, message in wrong:
        with pytest.raises(ValueError, match=message):
            experts(*args)
    for residual, message in (x[:3], r"residual \[4, 64\]"), (x.half(), "residual in the result's"):
        with pytest.raises(ValueError, match=f"experts: expected {message}"):
            experts(x, ids, weights, w_up, w_down, residual=residual)
