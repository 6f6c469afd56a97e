"""Marks: nothing uncompiled, an op in the graph, gone after the passes."""

import pytest
import torch
from ranks import Mesh
from torch.library import opcheck

from moe_compile.ops import moe
from moe_compile.ops.mark_placement import KINDS, mark_placement_reference
from moe_compile.parallel import mark_partial, mark_replicated, mark_shard
from moe_compile.testing import capture, run_passes


@pytest.fixture(autouse=True)
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def test_nothing_uncompiled():
    x = torch.randn(4, 3)
    assert mark_replicated(x) is x
    assert mark_partial(x) is x
    assert mark_shard(x, 1) is x


@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, mesh):
    x = torch.randn(4, 3)
    name = mesh.all.group_name
    marked = moe.mark_placement(x, kind, 1, name)
    assert torch.equal(marked, mark_placement_reference(x, kind, 1, name))
    opcheck(moe.mark_placement.default, (x, kind, 1, name))


def test_every_way_to_name_a_group(mesh):
    from torch.distributed.device_mesh import init_device_mesh

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    groups = [None, mesh.row, mesh.row.group_name, grid["tp"], (grid, "ep"), (grid, 1)]
    gm = capture(lambda x: [mark_replicated(x, group).sin() for group in groups], torch.randn(4, 3))
    names = [n.args[3] for n in gm.graph.nodes if "mark" in n.name]
    ep, tp = grid.get_group("ep").group_name, grid.get_group("tp").group_name
    row = mesh.row.group_name
    assert names == [mesh.all.group_name, row, row, tp, ep, tp]


def test_gone_after_the_passes():
    gm = capture(lambda x: mark_shard(x, 1).sin(), torch.randn(4, 3))
    run_passes(gm)
    assert not [n for n in gm.graph.nodes if "mark" in n.name]


def test_refused():
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="mark_placement: expected dim within the 2 of x, got 2"):
        mark_shard(x, 2)
    with pytest.raises(ValueError, match="mark_placement: expected kind among replicated, partial"):
        moe.mark_placement(x, "whole", 0, "0")
