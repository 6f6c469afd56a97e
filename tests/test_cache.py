"""The compile cache never serves what other passes, kernels or options made."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_compile.pipeline import source_hash

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys, torch
import moe_compile
from moe_compile.pipeline import Pipeline

assert moe_compile.__file__.startswith(sys.argv[1]), moe_compile.__file__
runs, original = [], Pipeline.__call__
Pipeline.__call__ = lambda self, gm: (runs.append(1), original(self, gm))[1]

def fn(x, w, ids, p):
    flat = ids.reshape(-1)
    y = torch.bmm(w[flat], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)
    return (y * p.reshape(-1, 1)).view(-1, 2, 8).sum(1)

torch.manual_seed(0)
inputs = torch.randn(3, 8), torch.randn(4, 8, 8), torch.randint(0, 4, (3, 2)), torch.rand(3, 2)
for options in eval(sys.argv[2]):
    torch._dynamo.reset()
    runs.clear()
    with torch.no_grad():
        compiled = torch.compile(fn, backend="moe_compile", options=options or None)
        torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    print("RAN" if runs else "CACHED")
"""


@pytest.fixture
def house(tmp_path):
    """A copy of the sources whose files may be edited, with a compile cache of its own."""
    for name in ("moe_compile", "ops", "passes"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    return tmp_path


def compile_in(house: Path, options: str) -> list[str]:
    """Compile once for each options in a fresh process: RAN if the passes ran, CACHED if not."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(house),
        "TORCHINDUCTOR_CACHE_DIR": str(house / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(house), options],
        env=environment,
        cwd=house,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_other_options_and_edited_sources_are_misses(house):
    unhashable = "{'extra_passes': [lambda graph: None]}"
    strict = "{'require': {'find_experts': 0}}"
    same, other = "{}", "{'disable': ['find_experts']}"
    sequence = f"[{same}, {same}, {other}, {other}, {unhashable}, {unhashable}, {strict}, {strict}]"
    ran = ["RAN", "CACHED", "RAN", "CACHED", "RAN", "RAN", "RAN", "RAN"]
    assert compile_in(house, sequence) == ran
    with (house / "passes" / "find_experts.py").open("a") as file:
        file.write("# edited\n")
    assert compile_in(house, f"[{same}, {same}]") == ["RAN", "CACHED"]


@pytest.mark.parametrize("folder", ["moe_compile", "ops", "passes"])
def test_every_source_file_counts(house, folder):
    before = source_hash(house / "moe_compile")
    for path in sorted((house / folder).glob("[a-z_]*.*")):
        if path.suffix in (".py", ".cpp"):
            path.write_text(path.read_text() + " ")
            after = source_hash(house / "moe_compile")
            assert after != before, path
            before = after
