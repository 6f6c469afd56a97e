"""Pictures and tables from results, with numbers made up."""

import itertools
import sys

import _results
import pytest
import tables

LAYER = {
    "us": 80.0, "low us": 79.0, "high us": 81.5, "read floor us": 60.0, "product floor us": 7.0,
    "percent of roof": 75.0, "read roof GB/s": 4500,
}  # fmt: skip


def layers():
    cells = itertools.product(
        ("mixtral", "qwen3"), ("bf16", "fp8"), ("uniform", "zipf"), (1, 64, 256)
    )
    rows = []
    for layer, dtype, routing, tokens in cells:
        with_peer = routing == "uniform" and layer == "mixtral"
        peer = {"peer": "P 1.0", "peer us": 100.0, "ratio": 1.25} if with_peer else {}
        key = {"layer": layer, "dtype": dtype, "routing": routing, "tokens": tokens}
        rows.append({**key, **LAYER, **({"peer": "", "peer us": "", "ratio": ""} | peer)})
    return rows


def decode():
    ms = {"ms low": 4.9, "ms high": 5.2, "floor ms": 1.5}
    names = ("inductor", "moe_compile")
    return [
        {"variant": v, "batch": b, "ms": 10.0 - 5 * i, **ms}
        for b, (i, v) in itertools.product((1, 16), enumerate(names))
    ]


def groups():
    cells = itertools.product((1, 16), ("inductor", "moe_compile"), ("experts", "rest"))
    return [
        {"variant": v, "batch": b, "group": g, "kernels": 96, "us": 812.4, "MB": 2718.0,
         "floor us": 598.5}
        for b, v, g in cells
    ]  # fmt: skip


def activation_quant():
    peers = ("moe_compile", "torch.compile")
    return [
        {"rows": R, "I": 768, "roof us": 2.0, "roof GB/s": 4000, "peer": peer, "us": 2.5,
         "percent of roof": 80.0, "GB/s": 3200}
        for R, peer in itertools.product((8, 64), peers)
    ]  # fmt: skip


@pytest.fixture
def made_up(tmp_path, request):
    """A CSV of each kind; those that are no pictures for tables alone."""
    kinds = {"layer": layers(), "decode": decode(), "activation_quant": activation_quant()}
    if request.node.name == "test_tables":
        models = ("", "_deepseek_v3", "_gpt_oss")
        kinds |= {f"decode{name}": decode() for name in models}
        kinds |= {f"decode_groups{name}": groups() for name in models}
    return [_results.write(rows, kind, tmp_path) for kind, rows in kinds.items()]


def test_plots(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    for path in made_up:
        image = plot.draw(path, tmp_path / "images")
        assert _results.machine() in image.read_text()
    with pytest.raises(SystemExit, match="expected a name that ends in"):
        plot.draw(tmp_path / "other.csv", tmp_path)


def test_newest(made_up, tmp_path):
    (tmp_path / "h200_2020-01-01_layer.csv").write_text("layer\n")
    (tmp_path / "h200_2020-01-01_parallel.csv").write_text("layer\n")
    kinds = ["layer", "parallel", "nothing"]
    old = tmp_path / "h200_2020-01-01_parallel.csv"
    assert _results.newest(tmp_path, kinds) == [made_up[0], old]


def test_tables(made_up, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n} -->\nTO FILL\n<!-- /{n} -->\n" for n in tables.TABLES))
    words = ["tables.py", *map(str, made_up), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    tables.main()
    text = page.read_text()
    assert "TO FILL" not in text
    assert text.count("| Mixtral, float8 | 256 |") == 1
    assert "faster than the fastest peer in 4 of 4." in text
    assert (
        "| Mixtral, bfloat16 | 1 | 80.0 (79.0 to 81.5) | 60.0 | 75 % | P 1.0 | 100 | 1.25 |" in text
    )
    assert "| Qwen3-30B-A3B, float8 | 64 | 80.0 (75 %) | 80.0 (75 %) |" in text
    assert "| 16 | moe_compile | 5.00 (4.90 to 5.20) | 1.50 | 2.00 |" in text
    assert "| 16 | rest | 812 (96) | 598 | 812 (96) | 598 |" in text
    assert "| 8 | 768 | 2.50 | 2.50 | 2.00 | 80 % |" in text
    tables.main()
    assert page.read_text() == text
    with pytest.raises(SystemExit, match="expected one place for layer, got 0"):
        tables.replaced("", "layer", "")
