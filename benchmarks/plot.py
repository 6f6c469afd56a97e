"""Draw results: python benchmarks/plot.py [CSV ...] [--out docs/images]

Each CSV of benchmarks/results becomes one picture, by what its name ends in: layer,
activation_quant, decode or parallel. Without any named, the newest of each kind. Needs matplotlib
(pip install -e '.[plots]') and no GPU.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _results import DTYPES, FOLDER, LAYERS, Rows, about, newest, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

IMAGES = FOLDER.parents[1] / "docs" / "images"
# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
STYLE = {
    "font.size": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # small, and text stays text
    "svg.hashsalt": "moe_compile",  # the same file each time
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    for path in args.csv or newest(FOLDER, KINDS):
        print(draw(path, args.out))


def draw(path: Path, out: Path) -> Path:
    """One picture of one CSV."""
    kinds = [kind for kind in KINDS if path.stem.endswith(f"_{kind}")]
    if not kinds:
        raise SystemExit(f"{path}: expected a name that ends in one of {', '.join(KINDS)}")
    rows = read(path)
    with matplotlib.rc_context(STYLE):
        figure = KINDS[kinds[0]](rows)
        figure.suptitle(about(rows), fontsize=8)
        out.mkdir(parents=True, exist_ok=True)
        image = out / f"{kinds[0]}.svg"
        figure.savefig(image, metadata={"Date": None}, facecolor="white")
        plt.close(figure)
    return image


def draw_layers(rows: Rows) -> Figure:
    """Percent of the roof over tokens, and microseconds beside the peer, for each dtype."""
    rows = [r for r in rows if r["routing"] == "uniform"] or rows
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in rows)]
    figure, axes = _subplots(2, len(dtypes), 5.2)
    for column, dtype in enumerate(dtypes):
        roof, us = axes[0][column], axes[1][column]
        for i, name in enumerate(_unique(r["layer"] for r in rows)):
            some = [r for r in rows if (r["dtype"], r["layer"]) == (dtype, name)]
            some.sort(key=lambda r: int(r["tokens"]))
            _line(roof, some, "percent of roof", i, LAYERS.get(name, name))
            _line(us, some, "us", i, LAYERS.get(name, name))
            _line(us, some, "peer us", i, None, linestyle="--", markerfacecolor="white")
        roof.set(title=DTYPES[dtype], ylabel="roof reached [%]", ylim=(0, 105))
        us.set(ylabel="one layer [us]", yscale="log")
        us.plot([], [], **DASHES, label="fastest peer (another day)")
        us.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        us.yaxis.set_major_formatter("{x:g}")
        us.yaxis.set_minor_formatter(NullFormatter())
        for ax in (roof, us):
            _tokens(ax, _unique(int(r["tokens"]) for r in rows))
    _legend(figure, axes[1][0])
    return figure


def draw_activation_quant(rows: Rows) -> Figure:
    """GB/s over bytes, with the roof of a kernel that reads and writes as much."""
    figure, [[ax]] = _subplots(1, 1, 2.8)

    def size(r: dict[str, str]) -> float:  # bf16 gate and up; float8 and a scale for each 128
        return int(r["rows"]) * int(r["I"]) * (5 + 4 / 128)

    rows = sorted(rows, key=size)
    for i, peer in enumerate(_unique(r["peer"] for r in rows)):
        some = [r for r in rows if r["peer"] == peer]
        ax.plot(*_points(some, size, "GB/s"), **_look(i), label=peer)
    roof = [r for r in rows if r["peer"] == rows[0]["peer"]]
    ax.plot(*_points(roof, size, "roof GB/s"), **DASHES, label="roof")
    ax.set(xlabel="bytes read and written", ylabel="GB/s", xscale="log", ylim=(0, None))
    ax.legend(loc="upper left")
    return figure


def draw_decode(rows: Rows) -> Figure:
    """Bars of milliseconds a step, and across them the time of reading what a step must."""
    batches = _unique(int(r["batch"]) for r in rows)
    variants = _unique(r["variant"] for r in rows)
    figure, axes = _subplots(1, len(batches), 1.5 + 0.35 * len(variants))
    for ax, batch in zip(axes[0], batches, strict=True):
        for r in (r for r in rows if int(r["batch"]) == batch):
            place, ms, floor = variants.index(r["variant"]), float(r["ms"]), float(r["floor ms"])
            ours = r["variant"].startswith("moe_compile")
            ax.barh(place, ms, 0.7, color=COLOURS[0] if ours else "#999999")
            ax.text(ms, place, f" {ms:.2f}", va="center", fontsize=7)
            ax.plot([floor] * 2, [place - 0.45, place + 0.45], **DASHES)
        ax.plot([], [], **DASHES, label="reading what a step must, once")
        most = max(float(r["ms"]) for r in rows if int(r["batch"]) == batch)
        ax.set(title=f"batch {batch}", xlabel="one decode step [ms]", xlim=(0, 1.2 * most))
        ax.set_yticks(range(len(variants)), variants if ax is axes[0][0] else [""] * len(variants))
        ax.grid(axis="y", visible=False)
        ax.invert_yaxis()
    _legend(figure, axes[0][0])
    return figure


KINDS: dict[str, Callable[[Rows], Figure]] = {
    "layer": draw_layers,
    "activation_quant": draw_activation_quant,
    "decode": draw_decode,
    "parallel": draw_decode,
}


def _subplots(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(7, height), squeeze=False, layout="constrained"
    )
    return figure, axes.tolist()


def _legend(figure: Figure, ax: Axes) -> None:
    """Below all axes, what one of them has."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1}


def _line(ax: Axes, rows: Rows, y: str, i: int, label: str | None, **more: Any) -> None:
    ax.plot(*_points(rows, lambda r: int(r["tokens"]), y), **_look(i), label=label, **more)


def _points(rows: Rows, x: Callable[[dict[str, str]], float], y: str) -> list[list[float]]:
    """x and y of the rows that have a y."""
    there = [r for r in rows if r.get(y)]
    return [[x(r) for r in there], [float(r[y]) for r in there]]


def _tokens(ax: Axes, tokens: Sequence[int]) -> None:
    ax.set(xlabel="tokens", xscale="log")
    ax.set_xticks(tokens, [str(T) for T in tokens])
    ax.minorticks_off()


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    main()
