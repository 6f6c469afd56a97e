"""What a user may ask for, and the words in which the rest is refused. No compile in this file."""

import pytest
import torch

from moe_compile import Options
from moe_compile._versions import require_torch
from moe_compile.options import parse_options

MODES = ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_inductors(mode):
    assert parse_options(mode, None)[1] == torch._inductor.list_mode_options(mode)


@pytest.mark.parametrize("mode", [None, "default"])
def test_default_mode_patches_nothing(mode):
    assert parse_options(mode, None) == (Options(), {})


def test_mode_among_options():
    ours, patches = parse_options(None, {"mode": "reduce-overhead", "exactness": "bitwise"})
    assert ours.exactness == "bitwise"
    assert patches == {"triton.cudagraphs": True}


def test_inductors_own_keys_pass_with_either_spelling():
    _, patches = parse_options(
        "reduce-overhead", {"triton.cudagraphs": False, "max-autotune": True}
    )
    assert patches == {"triton.cudagraphs": False, "max_autotune": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exactnes": "bitwise"},
            r"moe_compile: expected options among collectives, constant_budget_mb, disable, "
            r"exactness, extra_passes, mode, require or Inductor's own, "
            r"got 'exactnes' \(close to exactness",
        ),
        (
            {"exactness": "exact"},
            "expected exactness among bitwise, reassociating, lossy, got exact",
        ),
        (
            {"require": {"find_expert": 1}},
            "expected pass names among .*find_experts.*, got find_expert",
        ),
        ({"disable": ["fuse"]}, "expected pass names among .*, got fuse"),
        ({"extra_passes": ["fuse"]}, "expected extra_passes of functions .*, got fuse"),
        ({"mode": "fastest"}, "expected mode among default, .*reduce-overhead.*, got 'fastest'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(None, options)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.0a0+git1234", "3.0.0"])
def test_torch_new_enough(version):
    require_torch(version)


@pytest.mark.parametrize("version", ["2.10.1+cu130", "1.13.0"])
def test_torch_too_old(version):
    with pytest.raises(ImportError, match=r"moe_compile: expected torch 2.11 or newer, got"):
        require_torch(version)
