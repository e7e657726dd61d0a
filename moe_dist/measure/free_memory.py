"""How much memory this process may still take."""

from __future__ import annotations

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


def _read_limit(group: Path) -> int | None:
    """Read what a control group leaves free; None where none limits this process."""
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        if most == "max":
            return None
        # Files that were read lately are held until memory is wanted.
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return max(0, int(most) - used + cached)
    except (OSError, ValueError, IndexError):
        return None
