"""Where numbers go: a CSV for each benchmark, machine and day, with what repeating it takes."""

import csv
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


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
