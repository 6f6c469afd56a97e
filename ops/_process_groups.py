"""Process groups by the names that graphs call them."""

from typing import Any

import torch.distributed as dist

_c10d: Any = dist.distributed_c10d  # whose lookups by name have no public spelling


def process_group(name: str) -> Any:
    """The group of this name. RuntimeError or KeyError if this process knows none."""
    return _c10d._resolve_process_group(name)


def group_size(name: str) -> int:
    """How many ranks it has; in a form that Dynamo traces."""
    size: int = _c10d._get_group_size_by_name(name)
    return size


def world_group() -> Any:
    """All ranks of the job."""
    return dist.group.WORLD


def known_groups() -> list[Any]:
    """Every group that this process is in."""
    return list(_c10d._world.pg_map)
