"""The package list in pyproject.toml is written by hand: here it is held against the disk."""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def test_every_folder_of_code_is_a_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {setuptools["package-dir"].get(p, p.replace(".", "/")) for p in setuptools["packages"]}
    on_disk = {
        str(init.parent.relative_to(ROOT))
        for top in ("moe_compile", "ops", "passes")
        for init in (ROOT / top).rglob("__init__.py")
        if "moe_compile/" not in str(init.parent.relative_to(ROOT))  # the links, on Python >= 3.13
    }
    assert listed == on_disk


def test_links_point_at_the_folders():
    for name in ("ops", "passes"):
        assert (ROOT / "moe_compile" / name).resolve() == ROOT / name
