"""What was measured on this machine, kept on disk beside Inductor's own caches."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir


def load(key: str) -> Any:
    """What was kept under this key, or None."""
    path = _path(key)
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return kept["value"] if kept.get("key") == key else None


def save(key: str, value: Any) -> None:
    """Keep a value of JSON; readers see all of it or nothing."""
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_suffix(f".{os.getpid()}")
    mine.write_text(json.dumps({"key": key, "value": value}))
    mine.replace(path)


def _path(key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(cache_dir()) / "moe_compile" / f"{name}.json"
