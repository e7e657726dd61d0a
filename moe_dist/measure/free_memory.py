"""How much memory this process may still take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
"""Where a container's own limit stands; the host's memory says nothing of it."""


def free_memory(device: torch.device) -> int:
    """Give the bytes that are free for a model on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    limit = _read_limit(CGROUP)
    return free if limit is None else min(free, limit)


@dataclass(frozen=True)
class _Names:
    """What the files of a version of control groups are called, and the entry of cached pages."""

    most: str
    used: str
    stat: str
    cached: str


_VERSIONS = (
    _Names("memory.max", "memory.current", "memory.stat", "inactive_file "),
    # Version 1, whose counters are apart; without a limit it names a number beyond all memory.
    _Names(
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file ",
    ),
)


def _read_limit(group: Path) -> int | None:
    """Read what control groups leave free; None where none limits this process."""
    found = (_read_version(group, names) for names in _VERSIONS)
    return min((free for free in found if free is not None), default=None)


def _read_version(group: Path, names: _Names) -> int | None:
    try:
        most = (group / names.most).read_text().strip()
        used = int((group / names.used).read_text())
        lines = (group / names.stat).read_text().splitlines()
        if most == "max":
            return None
        # Files that were read lately are held until memory is wanted.
        cached = sum(int(line.split()[1]) for line in lines if line.startswith(names.cached))
        return max(0, int(most) - used + cached)
    except (OSError, ValueError, IndexError):
        return None
