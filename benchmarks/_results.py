"""Where numbers go: a CSV for each benchmark, machine and day, with what repeating it takes."""

import csv
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
Rows = list[dict[str, str]]  # of a CSV
LAYERS = {"mixtral": "Mixtral", "qwen3": "Qwen3-30B-A3B", "dsv3_ep8": "DeepSeek-V3, 32 experts"}
DTYPES = {"bf16": "bfloat16", "fp8": "float8"}


def write(rows: Sequence[Mapping[str, Any]], stem: str, folder: Path = FOLDER, **more: Any) -> Path:
    """Write <folder>/<machine>_<date>_<stem>.csv; `more` are columns equal in all rows."""
    today = datetime.date.today().isoformat()
    about = {"machine": machine(), "date": today, **versions(), "command": command(), **more}
    folder.mkdir(parents=True, exist_ok=True)
    short = machine().split()[-1].lower() if torch.cuda.is_available() else "cpu"
    path = folder / f"{short}_{today}_{stem}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    return path


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path}: expected rows, got none")
    return rows


def newest(folder: Path, kinds: Iterable[str]) -> list[Path]:
    """The last CSV of each kind that has one, by the date in its name."""
    found = [sorted(folder.glob(f"*_{kind}.csv"), key=_date) for kind in kinds]
    return [paths[-1] for paths in found if paths]


def _date(path: Path) -> str:
    return path.stem.split("_")[1]


def about(rows: Rows) -> str:
    """Which machine, with what, and when, as the CSV says."""
    row = rows[0]
    parts = [row.get("machine", "")]
    parts += [f"{name} {row[name.lower()]}" for name in ("torch", "Triton") if name.lower() in row]
    return ", ".join(part for part in (*parts, row.get("date", "")) if part)


def machine() -> str:
    """The GPU's name, or the CPU's with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name} with {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    names = ("torch", "triton", "transformers")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def command() -> str:
    """The command line without paths of the machine: where results go, what they stand beside."""
    words = list(sys.argv)
    for option in {"--out", "--peers"} & set(words):
        del words[words.index(option) : words.index(option) + 2]
    return " ".join(["python", f"benchmarks/{Path(words[0]).name}", *words[1:]])
