"""Who may import whom: ops nothing of ours, passes only ops, moe_compile both."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY = {"ops": {"ops"}, "passes": {"passes", "ops"}}


def imports(path: Path) -> set[str]:
    """The second word of every moe_compile.x imported in a file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its layer"
            names += [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names]
    return {n.split(".")[1] for n in names if n.startswith("moe_compile.")}


@pytest.mark.parametrize("folder", MAY)
def test_imports(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert imports(path) <= MAY[folder], path


@pytest.mark.parametrize("folder", MAY)
def test_every_module_has_a_test(folder):
    stems = {p.stem for p in (ROOT / folder).glob("[a-z]*.py")}
    tests = {p.stem.removeprefix("test_") for p in Path(__file__).parent.glob("test_*.py")}
    assert stems <= tests, stems - tests
