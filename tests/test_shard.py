"""The own part of a value, on each rank."""

import pytest
import torch
from ranks import Mesh
from torch.library import opcheck

from moe_compile.ops import moe
from moe_compile.ops.shard import shard_reference
from moe_compile.parallel import shard
from moe_compile.testing import capture

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture(params=range(4), ids=lambda rank: f"rank {rank}")
def mesh(request):
    mesh = Mesh(request.param)
    mesh.rank = request.param
    yield mesh
    mesh.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_matches_reference(mesh, dim, dtype):
    x = torch.randint(0, 2, (8, 4)).to(dtype)
    assert torch.equal(shard(x, dim), shard_reference(x, dim, 4, mesh.rank))
    assert torch.equal(shard(x, dim, mesh.column), shard_reference(x, dim, 2, mesh.rank // 2))
    assert torch.equal(shard(x.t(), dim), shard_reference(x.t(), dim, 4, mesh.rank))
    assert shard(x[:0], 0).shape == (0, 4)


def test_is_memory_of_its_own(mesh):
    x = torch.ones(4, 2)
    shard(x).zero_()
    assert x.all()


def test_opcheck(mesh):
    opcheck(moe.shard.default, (torch.randn(8, 4), 0, 4, mesh.all.group_name))
    opcheck(moe.shard.default, (torch.randn(8, 4), -1, 2, mesh.row.group_name))


def test_refused(mesh):
    x = torch.randn(6, 3)
    with pytest.raises(
        ValueError, match=r"shard: expected x.shape\[0\] as a multiple of 4 ranks, got 6"
    ):
        shard(x)
    with pytest.raises(ValueError, match=r"shard: expected dim within the 2 of x, got 5"):
        shard(x, 5)
    with pytest.raises(Exception, match=r"shard: expected x.shape\[0\] as a multiple of 4 ranks"):
        capture(shard, x)
