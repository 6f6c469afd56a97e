import pytest
import torch
from helpers import FLOATS, assert_close

from moe_compile.ops import moe
from moe_compile.ops._attend_blocks import Blocks, choose_blocks
from moe_compile.ops.attend import MOST_QUERIES, attend, attend_reference, attend_triton

FUNCTIONS = [attend, attend_triton]
SHAPES = [  # B, A, G, Q, S, D, F
    (1, 4, 4, 1, 1, 64, 64),
    (9, 4, 1, 1, 17, 80, 80),
    (1, 8, 1, 1, 640, 128, 128),
    (4, 2, 2, 1, 70, 192, 128),
    (1, 6, 2, 3, 40, 96, 16),
    (1, 20, 1, 4, 33, 16, 8),  # 80 rows: two blocks of them
    (0, 4, 2, 1, 17, 64, 64),
    (2, 4, 2, 1, 0, 64, 64),
]


def _times(dtype):
    """In float32 one thread adds up all products of a score, 512 of latents; torch does parts."""
    return 4 if dtype == torch.float32 else 2


def inputs(B, A, G, Q, S, D, F, device, dtype=torch.float32):
    q = torch.randn(B, A, Q, D, device=device).to(dtype)
    k = torch.randn(B, G, S, D, device=device).to(dtype)
    return q, k, torch.randn(B, G, S, F, device=device).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_matches_reference(fn, shape, dtype, device):
    args = inputs(*shape, device, dtype)
    out = fn(*args)
    assert_close(out, attend_reference, *args)
    assert out.transpose(1, 2).is_contiguous()


def latents(B, A, G, Q, S, D, U, device, dtype=torch.float32):
    """Queries and keys in two parts, and no values: the keys are."""
    shapes = (B, A, Q, D), (B, G, S, D), (B, A, Q, U), (B, G, S, U)
    q, k, q_rot, k_rot = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return (q, k, None), {"q_rot": q_rot, "k_rot": k_rot}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 20, 1, 1, 40, 512, 64), (3, 4, 2, 3, 33, 48, 8), (0, 4, 1, 1, 9, 16, 16)], ids=str
)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_latents(fn, shape, dtype, device):
    args, how = latents(*shape, device, dtype)
    B, S = shape[0], shape[4]
    last = torch.tensor([S // 2, S, -1], device=device)[:B]
    for more in {}, {"last": last}, {"mask": torch.arange(S, device=device).view(1, 1, 1, S) > 4}:
        out = fn(*args, **how, **more)
        assert_close(out, attend_reference, *args, times=_times(dtype), **how, **more)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_latents_are_keys_and_values(splits, device):
    """And what lies beyond the last is not read."""
    (q, k, _), how = latents(1, 8, 1, 1, 150, 32, 16, device)
    k[:, :, 100:], how["k_rot"][:, :, 100:] = torch.nan, torch.inf
    last, blocks = torch.tensor([99], device=device), Blocks(16, 32, splits, 4, 2)
    whole = torch.cat([q, how["q_rot"]], -1), torch.cat([k, how["k_rot"]], -1), k
    out = attend_triton(q, k, None, last=last, blocks=blocks, **how)
    assert out.isfinite().all()
    assert_close(out, attend_reference, *whole, last=last)


def test_each_of_two_parts_and_no_values_alone(device):
    (q, k, _), how = latents(2, 4, 2, 1, 20, 16, 24, device)
    v = torch.randn(2, 2, 20, 8, device=device)
    for fn in FUNCTIONS:
        assert_close(fn(q, k, v, **how), attend_reference, q, k, v, **how)
        assert_close(fn(q, k, None), attend_reference, q, k, k)


def test_strided_latents(device):
    """Queries as a product for each head leaves them, caches that are slices of longer rows."""
    q = torch.randn(4, 2, 32, device=device).view(4, 2, 1, 32).permute(1, 0, 2, 3)
    q_rot = torch.randn(2, 1, 4, 20, device=device)[..., 4:].transpose(1, 2)
    k, k_rot = torch.randn(2, 1, 40, 48, device=device).split([32, 16], -1)
    how = {"q_rot": q_rot, "k_rot": k_rot}
    assert_close(attend_triton(q, k, None, **how), attend_reference, q, k, None, **how)


def test_reference_is_torch():
    q, k, v = inputs(2, 6, 2, 3, 20, 16, 8, "cpu", torch.float64)
    mask = torch.rand(2, 1, 3, 20) < 0.5
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attend_reference(q, k, v, mask, 0.3), expected)


MASK_SHAPES = [(2, 1, 1), (1, 4, 1), (2, 4, 2), (1, 1, 2), (1, 1, 1)]  # B, A, Q


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_masks(fn, shape, dtype, device):
    args = inputs(2, 4, 2, 2, 50, 32, 32, device)
    mask = torch.rand(*shape, 50, device=device) < 0.5
    mask[-1, -1, -1] = False  # queries that may attend to nothing
    if dtype != torch.bool:
        mask = torch.where(mask, torch.randn(mask.shape, device=device), -torch.inf).to(dtype)
    out = fn(*args, mask, 0.3)
    assert (out[-1, -1, -1] == 0).all()
    assert_close(out, attend_reference, *args, mask, 0.3)


SEEN = {"end": slice(0, 150), "window": slice(130, 290), "one": slice(299, 300), "none": slice(0)}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("splits", [1, 3, 10])
def test_closed_positions_are_not_read(splits, seen, kind, device):
    """What is in memory that nothing has been written to may be NaN."""
    q, k, v = inputs(1, 4, 2, 1, 300, 32, 32, device)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=device)
    mask[..., SEEN[seen]] = True
    mask[..., 145] = False
    k[:, :, ~mask[0, 0, 0]] = torch.nan
    v[:, :, ~mask[0, 0, 0]] = torch.inf
    if kind == "float":
        mask = torch.where(mask, 0.0, -torch.inf)
    blocks = Blocks(16, 32, splits, 4, 2)
    for out in attend_triton(q, k, v, mask, blocks=blocks), attend(q, k, v, mask):
        assert out.isfinite().all()
        assert (out == 0).all() == (seen == "none")
        assert_close(out, attend_reference, q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 2, 1, 1), (2, 4, 2, 1, 17), (3, 8, 1, 2, 640)], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_last(fn, shape, dtype, device):
    """One position for all, or one for each sequence; it may lie beyond the end."""
    args, B, S = inputs(*shape, 32, 16, device), shape[0], shape[4]
    for last in torch.tensor([S // 2]), torch.tensor([32, 10**6, 0])[:B], torch.tensor([S - 1] * B):
        end = last.to(device, dtype)
        out = fn(*args, last=end)
        assert_close(out, attend_reference, *args, last=end)
        mask = torch.arange(S, device=device) <= end.reshape(-1, 1, 1, 1)
        assert_close(out, attend_reference, *args, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [(32, 1), (32, 3), (32, 10), (64, 2), (16, 20)], ids=str)
def test_what_lies_beyond_last_is_not_read(blocks, dtype, device):
    """A negative last closes all: zeros, whatever the sequence holds."""
    ends = torch.tensor([0, 31, 32, 150, 299, -1, -(2**40)], device=device)
    q, k, v = inputs(len(ends), 2, 1, 1, 300, 32, 32, device, dtype)
    closed = torch.arange(300, device=device) > ends[:, None]
    k.mT.masked_fill_(closed[:, None, None], torch.nan)
    v.mT.masked_fill_(closed[:, None, None], torch.inf)
    how = Blocks(16, blocks[0], blocks[1], 4, 2)
    for out in attend_triton(q, k, v, last=ends, blocks=how), attend(q, k, v, last=ends):
        assert out.isfinite().all()
        assert ((out == 0).flatten(1).all(1) == (ends < 0)).all()
        assert_close(out, attend_reference, q, k, v, last=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 2, 1, 40), (2, 4, 2, 2, 40)], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_sinks(fn, shape, dtype, device):
    """Far below all scores, among them, above them; of all sequences or of each."""
    args, (B, A) = inputs(*shape, 16, 32, device, dtype), shape[:2]
    sinks = torch.tensor([-torch.inf, -30.0, 0.0, 1.0, 2.0, 30.0, -1.0, 3.0], device=device)[:A]
    last = torch.arange(B, device=device) * 30 - 1  # the first sequence has nothing but its sink
    of_each = torch.stack([sinks.roll(b) for b in range(B)]).to(dtype)
    for kwargs in {"sinks": sinks[None]}, {"sinks": of_each, "last": last}:
        assert_close(fn(*args, **kwargs), attend_reference, *args, **kwargs)
        if fn is attend_triton:
            for splits in 1, 2:
                how = Blocks(16, 32, splits, 4, 2)
                assert_close(fn(*args, **kwargs, blocks=how), attend_reference, *args, **kwargs)


def test_a_sink_is_one_more_score(device):
    """Of a position whose value is 0 and whose product with the query is the sink."""
    q, k, v = inputs(1, 2, 1, 1, 20, 16, 16, device, torch.float64)
    sinks = torch.tensor([[0.5, 2.0]], device=device, dtype=torch.float64)
    q[..., 0], k[..., 0] = sinks[..., None], 0.0
    first = torch.nn.functional.one_hot(torch.tensor(0), 16).to(k)
    longer = torch.cat([k, first.expand(1, 1, 1, 16)], 2), torch.cat([v, 0 * v[:, :, :1]], 2)
    out = attend_reference(q, k, v, scale=1.0, sinks=sinks)
    torch.testing.assert_close(out, attend_reference(q, *longer, scale=1.0))


def test_last_that_is_a_slice(device):
    args = inputs(3, 4, 2, 1, 40, 16, 16, device)
    last = torch.tensor([[3, 0], [39, 0], [17, 0]], device=device)[:, 0]
    assert_close(attend_triton(*args, last=last), attend_reference, *args, last=last)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_nan_that_is_attended_to_stays(fn, device):
    q, k, v = inputs(1, 2, 1, 1, 100, 16, 16, device)
    k[0, 0, 70] = torch.nan
    assert fn(q, k, v).isnan().all()


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "triton"])
def test_strided_input(fn, device):
    """Slices of a longer cache, one stored by positions, and a query from a fused projection."""
    q = torch.randn(2, 1, 3, 4, 32, device=device)[:, :, 1].transpose(1, 2)
    k = torch.randn(3, 2, 60, 32, device=device)[1:, :, 5:45]
    v = torch.randn(2, 40, 2, 32, device=device).transpose(1, 2)
    mask = torch.rand(2, 1, 1, 64, device=device)[..., :40] < 0.7
    assert_close(fn(q, k, v, mask), attend_reference, q, k, v, mask)
    q, k, mask = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, mask))
    wide = mask[..., :1].expand(2, 1, 1, 40)
    for m in mask, wide:
        assert_close(fn(q, k, v, m), attend_reference, q, k, v, m)


@pytest.mark.parametrize("heads", [1, 4, 64, 5000])
@pytest.mark.parametrize("positions", [1, 640, 2**17])
def test_blocks_fill_the_machine(heads, positions):
    blocks = choose_blocks(heads, 8, positions, 256, torch.bfloat16)
    num_blocks = -(-positions // blocks.positions)
    assert 1 <= blocks.splits <= min(num_blocks, 128)
    assert blocks.splits == 1 or heads * (blocks.splits - 1) < 264
    assert heads * blocks.splits >= min(132, heads * num_blocks, heads * 128)


@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("positions", [1, 640, 4096, 2**17])
def test_blocks_of_latents(heads, positions):
    """Of 128 query heads a sequence."""
    blocks = choose_blocks(heads, 128, positions, 576, torch.bfloat16, 512)
    programs = heads * 128 // blocks.rows * blocks.splits
    assert programs >= min(64, heads * 8 * -(-positions // 32))
    assert blocks.splits == 1 or programs <= 132
    small = choose_blocks(heads, 128, positions, 576, torch.bfloat16, 512, 99 * 1024)
    for b, most in (blocks, 227 * 1024), (small, 99 * 1024):
        queries = b.rows if b.rows == 64 else 0  # which Hopper takes from shared memory
        assert (queries + b.stages * b.positions) * 576 * 2 < most


CASES = [((2, 4, 2, 1, 70, 32, 32), None), ((2, 4, 2, 2, 40, 16, 8), (2, 1, 1, 40))]


@pytest.mark.parametrize(("shape", "mask"), CASES)
def test_opcheck(shape, mask, device):
    mask = None if mask is None else torch.rand(mask, device=device) < 0.5
    torch.library.opcheck(attend, (*inputs(*shape, device), mask, 0.5))
    if mask is None:
        last = torch.tensor([3, 60], device=device)
        sinks = torch.randn(1, 4, device=device)
        torch.library.opcheck(attend, inputs(*shape, device), {"last": last, "sinks": sinks})
        torch.library.opcheck(attend, *latents(2, 4, 1, 1, 40, 32, 16, device))


REAL = [  # B, A, G, Q, S, D, F
    *[(B, 32, 4, 1, 640, 128, 128) for B in (1, 8, 64)],  # Qwen3-30B-A3B
    *[(B, 32, 8, 1, 4096, 128, 128) for B in (1, 16)],  # Mixtral
    (1, 64, 8, 1, 32768, 64, 64),  # gpt-oss
    (2, 128, 128, 1, 1000, 192, 128),  # DeepSeek-V3
    (1, 32, 4, 8, 640, 128, 128),
    (3, 12, 3, 2, 333, 80, 96),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_sizes(shape, dtype, device):
    args, (B, S) = inputs(*shape, device, dtype), (shape[0], shape[4])
    assert_close(attend(*args), attend_reference, *args)
    length = torch.randint(1, S + 1, (B, 1, 1, 1), device=device)
    mask = torch.arange(S, device=device) < length
    for m in mask, torch.where(mask, 0.0, -torch.inf).to(dtype):
        assert_close(attend(*args, m), attend_reference, *args, m)
    last = length.reshape(B) - 1
    assert_close(attend(*args, last=last), attend_reference, *args, last=last)
    sinks = torch.randn(1, shape[1], device=device).to(dtype)
    for m in mask, None:
        how = {"mask": m, "last": last if m is None else None, "sinks": sinks}
        assert_close(attend(*args, **how), attend_reference, *args, times=_times(dtype), **how)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("S", [640, 4096])
@pytest.mark.parametrize("B", [1, 2, 16])
def test_latents_of_real_sizes(B, S, dtype, device):
    """DeepSeek-V3."""
    args, how = latents(B, 128, 1, 1, S, 512, 64, device, dtype)
    last = torch.randint(0, S, (B,), device=device)
    mask = torch.arange(S, device=device) <= last.view(B, 1, 1, 1)
    tenth = {"last": torch.tensor([S // 10], device=device), "scale": 0.1}
    for more in {}, {"last": last}, tenth, {"mask": mask}:
        out = attend(*args, **how, **more)
        assert_close(out, attend_reference, *args, times=_times(dtype), **how, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_latents_in_all_blocks(rows, device):
    args, how = latents(2, 128, 1, 1, 1000, 512, 64, device, torch.bfloat16)
    how["last"] = torch.tensor([700, 3], device=device)
    for splits, stages in (1, 2), (4, 2), (8, 3):
        blocks = Blocks(rows, 32, splits, 8, stages)
        out = attend_triton(*args, blocks=blocks, **how)
        assert_close(out, attend_reference, *args, **how)


@pytest.mark.gpu
def test_in_a_cuda_graph(device):
    """Captured with one length of the cache, replayed with others."""
    args = inputs(2, 8, 2, 1, 700, 128, 128, device, torch.bfloat16)
    mask = torch.zeros(2, 1, 1, 700, dtype=torch.bool, device=device)
    attend(*args, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*args, mask)
    for length in 0, 1, 33, 500, 700:
        mask.copy_(torch.arange(700, device=device) < length)
        graph.replay()
        assert torch.equal(out, attend(*args, mask))
        assert_close(out, attend_reference, *args, mask)
    last = torch.zeros(1, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*args, last=last)
    for position in -1, 0, 32, 499, 699:
        last.fill_(position)
        graph.replay()
        assert_close(out, attend_reference, *args, last=last)


def wrong(**changes):
    q, k, v = inputs(2, 4, 2, 1, 10, 16, 8, "cpu")
    none = dict.fromkeys(("mask", "scale", "last", "sinks", "q_rot", "k_rot"))
    return {"q": q, "k": k, "v": v, **none, **changes}


def rotary(q=(2, 4, 1, 8), k=(2, 2, 10, 8)):
    return wrong(q_rot=torch.ones(q), k_rot=torch.ones(k))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (wrong(q=torch.ones(4, 16)), r"q \[B, A, Q, D\], got \[4, 16\]"),
        (wrong(k=torch.ones(4, 16)), r"k \[B, G, S, D\], got \[4, 16\]"),
        (wrong(v=torch.ones(4, 16)), r"v \[B, G, S, F\], got \[4, 16\]"),
        (wrong(q=torch.ones(2, 4, 1, 16).int()), "q in float32, .*, got torch.int32"),
        (wrong(k=torch.ones(2, 2, 10, 16).half()), "k in q's dtype torch.float32, got .*16"),
        (wrong(v=torch.ones(2, 2, 10, 8).half()), "v in q's dtype torch.float32, got .*16"),
        (wrong(q=torch.ones(2, 4, 9, 16)), f"up to {MOST_QUERIES} queries, got 9"),
        (wrong(v=torch.ones(2, 2, 10, 257)), "up to 256 features, got 257"),
        (wrong(k=torch.ones(2, 2, 10, 8)), r"k \[2, 2, 10, 16\] for q and v, got \[2, 2, 10, 8\]"),
        (wrong(v=torch.ones(2, 2, 9, 8)), r"k \[2, 2, 9, 16\] for q and v, got"),
        (wrong(q=torch.ones(1, 4, 1, 16)), r"k \[1, 2, 10, 16\] for q and v, got"),
        (wrong(q=torch.ones(2, 3, 1, 16)), "query heads in multiples of v's 2 heads, got 3"),
        (wrong(mask=torch.ones(10)), r"mask \[B or 1, A or 1, Q or 1, S\], got \[10\]"),
        (wrong(mask=torch.ones(1, 1, 1, 10).int()), "mask in bool, .*, got torch.int32"),
        (wrong(mask=torch.ones(2, 2, 1, 10)), r"mask \[2 or 1, 4 or 1, 1 or 1, 10\], got"),
        (wrong(mask=torch.ones(2, 1, 1, 1)), r"mask \[2 or 1, 4 or 1, 1 or 1, 10\], got"),
        (wrong(last=torch.ones(2)), "last in int64 or int32, got torch.float32"),
        (wrong(last=torch.tensor(3)), r"last \[B or 1\], got \[\]"),
        (wrong(last=torch.ones(3).int()), r"last \[2 or 1\], got \[3\]"),
        (
            wrong(last=torch.ones(2).int(), mask=torch.ones(1, 1, 1, 10)),
            "a mask or last, not both, got both",
        ),
        (wrong(sinks=torch.ones(4)), r"sinks \[B or 1, A\], got \[4\]"),
        (wrong(sinks=torch.ones(1, 2)), r"sinks \[2 or 1, 4\], got \[1, 2\]"),
        (wrong(sinks=torch.ones(1, 4).int()), "sinks in float32, .*, got torch.int32"),
        (wrong(q_rot=torch.ones(2, 4, 1, 8)), "q_rot and k_rot, or neither, got one"),
        (wrong(k_rot=torch.ones(2, 2, 10, 8)), "q_rot and k_rot, or neither, got one"),
        (rotary(q=(2, 4, 1, 16)), "16 features of k_rot, as of q_rot, got 8"),
        (rotary(q=(2, 4, 2, 8)), r"q_rot \[2, 4, 1, U\], got \[2, 4, 2, 8\]"),
        (rotary(k=(2, 4, 10, 8)), r"k_rot \[2, 2, 10, U\], got \[2, 4, 10, 8\]"),
        (rotary(k=(10, 8)), r"k_rot \[B, A or G, Q or S, U\], got \[10, 8\]"),
        (rotary(q=(2, 4, 1, 257), k=(2, 2, 10, 257)), "up to 256 features, got 257"),
        (
            wrong(q_rot=torch.ones(2, 4, 1, 8).half(), k_rot=torch.ones(2, 2, 10, 8)),
            "q_rot in q's dtype torch.float32, got torch.float16",
        ),
        (
            wrong(q=torch.ones(2, 4, 1, 513), k=torch.ones(2, 2, 10, 513), v=None),
            "up to 512 features, got 513",
        ),
        (wrong(k=torch.ones(2, 2, 10, 8), v=None), r"k \[2, 2, 10, 16\] for q, got"),
        (wrong(last=torch.ones(2, device="meta").int()), "all tensors on one device, got"),
        (wrong(mask=torch.ones(1, 1, 1, 10, device="meta")), "all tensors on one device, got"),
    ],
)
def test_wrong_input(args, message):
    """By the fake too, which is what a compile runs first."""
    with pytest.raises(ValueError, match=f"attend: expected {message}"):
        attend_triton(*args.values())
    if "one device" not in message:
        with pytest.raises(ValueError, match=f"attend: expected {message}"):
            moe.attend(*args.values())
        with pytest.raises(ValueError, match=f"attend: expected {message}"):
            attend(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args.values()))
