"""What moe_compile runs on."""

import torch

OLDEST_TORCH = (2, 11)


def require_torch(version: str = torch.__version__) -> None:
    """Raise ImportError where torch is too old, before anything of it is touched."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"moe_compile: expected torch {oldest} or newer, got {version}")
