"""What was measured on this machine, kept on disk beside Inductor's own caches.

A folder for each family of measurements, a file for each key in it: processes that measure at once
write different files, or the same one twice, and none loses what another found.
"""

import hashlib
import json
import logging
import secrets
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir

log = logging.getLogger("moe_compile")


def load(family: str) -> dict[str, Any]:
    """What was kept in this family, by key; a file that says something else is left out."""
    found = {}
    for path in sorted(_folder(family).glob("*.json")):
        try:
            kept = json.loads(path.read_text())
            if kept["family"] == family:
                found[kept["key"]] = kept["value"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("ignored %s: %s: %s", path, type(error).__name__, error)
    return found


def save(family: str, key: str, value: Any) -> None:
    """Keep a value of JSON; readers see all of it or nothing. Only logs where nothing can be."""
    path = _folder(family) / f"{_hash(key)}.json"
    mine = path.with_suffix(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps({"family": family, "key": key, "value": value}))
        mine.replace(path)
    except OSError as error:
        log.warning("kept nothing at %s: %s", path, error)


def _folder(family: str) -> Path:
    return Path(cache_dir()) / "moe_compile" / _hash(family)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
