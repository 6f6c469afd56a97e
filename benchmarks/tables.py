"""Write the tables of docs/performance.md anew: python benchmarks/tables.py [CSV ...]

Each stands there between <!-- name --> and <!-- /name -->, and comes from the newest CSV of its
kind in benchmarks/results, or from those named. A kind without a CSV keeps what is there.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _results import DTYPES, FOLDER, LAYERS, Rows, about, newest, read

PAGE = FOLDER.parents[1] / "docs" / "performance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    text = args.page.read_text()
    for name, (kind, make) in TABLES.items():
        paths = [p for p in args.csv if p.stem.endswith(f"_{kind}")] or newest(FOLDER, [kind])
        if paths:
            text = replaced(text, name, make(read(paths[-1])))
    args.page.write_text(text)


def replaced(text: str, name: str, table: str) -> str:
    between = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    text, count = between.subn(lambda m: m[1] + table + m[2], text)
    if count != 1:
        raise SystemExit(f"expected one place for {name}, got {count}")
    return text


def layer(rows: Rows) -> str:
    """Decode with uniform routing, beside the roof and the fastest peer."""
    some = [r for r in rows if r["routing"] == "uniform" and int(r["tokens"]) <= 64]
    ratios = [float(r["ratio"]) for r in some if r["ratio"]]
    roofs = sorted(float(r["read roof GB/s"]) / 1e3 for r in some)
    won = f"faster than the fastest peer in {sum(x > 1 for x in ratios)} of {len(ratios)}"
    notes = f"{about(rows)}; read roofs {roofs[0]:.2f} to {roofs[-1]:.2f} TB/s; {won}."
    return f"{notes}\n\n{_layers(some)}"


def prefill(rows: Rows) -> str:
    """The same of many tokens, where the run had such."""
    some = [r for r in rows if r["routing"] == "uniform" and int(r["tokens"]) > 64]
    return _layers(some) if some else "Not measured yet."


def _layers(rows: Rows) -> str:
    body = []
    for r in rows:
        us = f"{_short(r['us'])} ({_short(r['low us'])} to {_short(r['high us'])})"
        floor = _short(max(r["read floor us"], r["product floor us"], key=float))
        peer = (r["peer"], _short(r["peer us"]), f"{float(r['ratio']):.2f}") if r["peer"] else ()
        cells = (_name(r), r["tokens"], us, floor, f"{float(r['percent of roof']):.0f} %")
        body.append((*cells, *(peer or ("-",) * 3)))
    titles = ("layer", "tokens", "us", "floor us", "of the roof", "fastest peer", "its us", "ratio")
    return _table(titles, body)


def skewed(rows: Rows) -> str:
    """The same layers in other routings: microseconds and percent of the roof."""
    kinds = list(dict.fromkeys(r["routing"] for r in rows))
    found = {(r["layer"], r["dtype"], r["tokens"], r["routing"]): r for r in rows}
    body = []
    for r in (r for r in rows if r["routing"] == kinds[0] and int(r["tokens"]) <= 64):
        cells = [found.get((r["layer"], r["dtype"], r["tokens"], kind)) for kind in kinds]
        times = [
            f"{_short(c['us'])} ({float(c['percent of roof']):.0f} %)" if c else "-" for c in cells
        ]
        body.append((_name(r), r["tokens"], *times))
    return _table(("layer", "tokens", *kinds), body)


def decode(rows: Rows) -> str:
    """Milliseconds a step, and how many times faster than the first variant of the batch."""
    first = {r["batch"]: float(r["ms"]) for r in reversed(rows)}
    body = []
    for r in rows:
        ms = f"{float(r['ms']):.2f} ({float(r['ms low']):.2f} to {float(r['ms high']):.2f})"
        ratio = f"{first[r['batch']] / float(r['ms']):.2f}"
        body.append((r["batch"], r["variant"], ms, f"{float(r['floor ms']):.2f}", ratio))
    titles = ("batch", "variant", "ms (lowest to highest)", "floor ms", "ratio")
    return f"{about(rows)}.\n\n{_table(titles, body, 2)}"


def decode_groups(rows: Rows) -> str:
    """Kernels and microseconds of each group of a step beside what its bytes take, by variant."""
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    found = {(r["batch"], r["group"], r["variant"]): r for r in rows}
    body = []
    for batch, group in dict.fromkeys((r["batch"], r["group"]) for r in rows):
        cells = [found.get((batch, group, variant)) for variant in variants]
        body.append((batch, group, *(text for c in cells for text in _time_and_floor(c))))
    columns = [text for v in variants for text in (f"{v}, us (kernels)", "floor us")]
    titles = ("batch", "group", *columns)
    return f"{about(rows)}.\n\n{_table(titles, body, 2)}"


def _time_and_floor(cell: dict[str, str] | None) -> tuple[str, str]:
    """A variant's: float8 reads less."""
    if cell is None:
        return "-", "-"
    return f"{float(cell['us']):.0f} ({cell['kernels']})", f"{float(cell['floor us']):.0f}"


def activation_quant(rows: Rows) -> str:
    """Microseconds of each way beside the roof's."""
    peers = list(dict.fromkeys(r["peer"] for r in rows))
    found = {(r["rows"], r["I"], r["peer"]): r for r in rows}
    body = []
    for r in (r for r in rows if r["peer"] == peers[0]):
        cells = [found.get((r["rows"], r["I"], peer)) for peer in peers]
        times = [_short(c["us"]) if c else "-" for c in cells]
        percent = f"{float(r['percent of roof']):.0f} %"
        body.append((r["rows"], r["I"], *times, _short(r["roof us"]), percent))
    titles = ("rows", "I", *(f"{peer} us" for peer in peers), "roof us", f"{peers[0]} of the roof")
    return f"{about(rows)}.\n\n{_table(titles, body, 0)}"


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {  # name: kind of CSV, what makes it
    "layer": ("layer", layer),
    "prefill": ("layer", prefill),
    "skewed": ("layer", skewed),
    "decode": ("decode", decode),
    "decode_deepseek_v3": ("decode_deepseek_v3", decode),
    "decode_gpt_oss": ("decode_gpt_oss", decode),
    "decode_groups": ("decode_groups", decode_groups),
    "decode_groups_deepseek_v3": ("decode_groups_deepseek_v3", decode_groups),
    "decode_groups_gpt_oss": ("decode_groups_gpt_oss", decode_groups),
    "activation_quant": ("activation_quant", activation_quant),
}


def _name(r: dict[str, str]) -> str:
    return f"{LAYERS.get(r['layer'], r['layer'])}, {DTYPES[r['dtype']]}"


def _short(us: str) -> str:
    """Three digits, or as many as the whole number has."""
    number = float(us)
    return (
        f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def _table(titles: Sequence[str], body: Sequence[Sequence[Any]], words: int = 1) -> str:
    """Markdown; from column `words` on to the right."""
    marks = [
        "---" if i < words or title.endswith("peer") else "--:" for i, title in enumerate(titles)
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (titles, marks, *body))


if __name__ == "__main__":
    main()
