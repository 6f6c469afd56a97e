import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import moe
from moe_compile.ops.rotate import rotate, rotate_reference, rotate_triton

FUNCTIONS = [rotate, rotate_triton]
SHAPES = [  # B, Q, A, G, D, R
    (1, 1, 32, 4, 128, 128),
    (3, 1, 4, 4, 64, 64),
    (2, 4, 5, 1, 80, 80),
    (1, 8, 2, 2, 128, 64),  # partial rotary
    (2, 1, 3, 1, 80, 32),
    (1, 2, 1, 1, 2, 2),
    (0, 1, 4, 2, 64, 64),
    (1, 0, 4, 2, 64, 64),
]


def inputs(B, Q, A, G, D, R, device="cpu", dtype=torch.float32, batches=None):
    q, k = (torch.randn(B, Q, heads, D, device=device).to(dtype) for heads in (A, G))
    angles = torch.randn(B if batches is None else batches, Q, R, device=device)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def weights(D, device="cpu", dtype=torch.float32):
    return tuple(torch.randn(2, D, device=device).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, dtype, device):
    args = inputs(*shape, device, dtype)
    for ws in (), weights(shape[4], device, dtype):
        out = fn(*args, *ws)
        assert_close(out, rotate_reference, *args, *ws)
        assert all(x.transpose(1, 2).is_contiguous() for x in out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_rounds_where_pytorch_does(fn, dtype, device):
    args = inputs(2, 2, 3, 1, 64, 32, device, dtype)
    for out, expected in zip(fn(*args), rotate_reference(*args), strict=True):
        assert torch.equal(out, expected)


def test_reference_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16, dtype=torch.bfloat16)
    ws = weights(16, dtype=torch.bfloat16)
    normed = []
    for x, w in zip((q, k), ws, strict=True):
        norm = modeling.Qwen3MoeRMSNorm(16, eps=1e-3)
        norm.weight = torch.nn.Parameter(w, requires_grad=False)
        normed.append(norm(x).transpose(1, 2))
    expected = modeling.apply_rotary_pos_emb(*normed, cos, sin)
    for out, y in zip(rotate_reference(q, k, cos, sin, *ws, 1e-3), expected, strict=True):
        assert torch.equal(out, y)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_one_weight(fn, which, device):
    args = inputs(2, 1, 4, 2, 32, 32, device)
    ws = [None, None]
    ws[which] = weights(32, device)[which]
    assert_close(fn(*args, *ws, 0.5), rotate_reference, *args, *ws, 0.5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_of_a_program(heads, device):
    args = *inputs(1, 2, 5, 3, 32, 16, device), *weights(32, device)
    assert_close(rotate_triton(*args, heads=heads), rotate_reference, *args)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    """Views of a fused projection, and tables of angles that all sequences share."""
    B, Q, A, G, D = 2, 3, 4, 2, 32
    _, _, cos, sin = inputs(B, Q, A, G, D, D, device, batches=1)
    rows = torch.randn(B, Q, (A + 2 * G) * D, device=device)
    heads = rows.view(B, Q, A + 2 * G, D)
    q, k = heads[:, :, :A], heads[:, :, A : A + G]
    sin = sin.repeat(1, 1, 2)[..., :D]
    ws = weights(2 * D, device)
    args = q, k, cos, sin, *(w[::2] for w in ws)
    assert_close(fn(*args), rotate_reference, *args)
    by_feature = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, cos, sin))
    args = *by_feature, None, None
    assert_close(fn(*args), rotate_reference, *args)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_stays_in_its_head(fn, device):
    q, k, cos, sin = inputs(1, 1, 4, 2, 16, 16, device)
    q[0, 0, 2, 3] = torch.nan
    out_q, out_k = fn(q, k, cos, sin, *weights(16, device))
    assert out_q.isnan().any(-1).flatten().tolist() == [False, False, True, False]
    assert out_k.isfinite().all()


def test_opcheck():
    args = inputs(2, 2, 3, 1, 16, 8)
    torch.library.opcheck(moe.rotate.default, args)
    torch.library.opcheck(moe.rotate.default, (*args, *weights(16), 1e-5))


def test_wrong_inputs(device):
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 8, device)
    w = weights(16, device)[0]
    cases = [
        ((q[0], k, cos, sin), r"q \[B, Q, A, D\], got \[3, 4, 16\]"),
        ((q, k[0], cos, sin), r"k \[B, Q, G, D\], got \[3, 2, 16\]"),
        ((q, k[..., :8], cos, sin), r"k \[2, 3, G, 16\] for q, got \[2, 3, 2, 8\]"),
        ((q.double(), k, cos, sin), "q in float32, float16 or bfloat16, got torch.float64"),
        ((q, k.half(), cos, sin), "k in q's dtype torch.float32, got torch.float16"),
        ((q, k, cos.half(), sin), "cos in q's dtype torch.float32, got torch.float16"),
        ((q, k, cos, sin, None, w.half()), "k_weight in q's dtype torch.float32"),
        ((q, k, cos[0], sin), r"cos \[B or 1, Q, R\], got \[3, 8\]"),
        ((q, k, cos, sin[:, :1]), r"sin \[2 or 1, 3, R\], got \[2, 1, 8\]"),
        ((q, k, cos, sin[..., :6]), r"sin of cos' 8 features, got \[2, 3, 6\]"),
        ((q, k, cos[..., :7], sin), "an even number R of turned features, up to 16, got 7"),
        ((q, k, cos.repeat(1, 1, 4), sin), "up to 16, got 32"),
        ((q, k, cos, sin, w[:8]), r"q_weight \[16\], got \[8\]"),
    ]
    for args, message in cases:
        for fn in FUNCTIONS:
            with pytest.raises(ValueError, match=f"rotate: expected .*{message}"):
                fn(*args)
    with pytest.raises(ValueError, match="rotate: expected all tensors on one device"):
        moe.rotate(q, k, cos, sin.to("meta"))


def test_a_gradient_is_refused(device):
    q, k, cos, sin = inputs(1, 1, 2, 1, 16, 16, device)
    with pytest.raises(RuntimeError):
        rotate(q.requires_grad_(), k, cos, sin)[0].sum().backward()
