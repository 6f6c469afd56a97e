"""Marks leave the graph; what is returned is still memory of its own."""

import pytest
import torch
from ranks import Mesh

from moe_compile.parallel import mark_partial, mark_replicated
from moe_compile.passes.drop_marks import drop_marks
from moe_compile.testing import assert_documented, capture, render, run_passes


@pytest.fixture(autouse=True)
def mesh():
    mesh = Mesh()
    yield mesh
    mesh.close()


def test_documented():
    assert_documented(drop_marks, capture(lambda x: mark_replicated(x).sin(), torch.randn(4, 8)))


def test_a_mark_that_is_returned_is_a_copy():
    gm = capture(lambda x: mark_partial(x), torch.randn(4, 8))
    run_passes(gm, drop_marks)
    x = torch.randn(4, 8)
    (got,) = gm(x)
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()


def test_twice_is_once():
    gm = capture(lambda x: mark_partial(mark_replicated(x)).sin(), torch.randn(4, 8))
    run_passes(gm, drop_marks)
    text = render(gm.graph)
    assert "mark" not in text
    (outcome,) = run_passes(gm, drop_marks)
    assert not outcome.rewrites
    assert render(gm.graph) == text
