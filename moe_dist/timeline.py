"""When each part of a start-up was done, over all processes of a run; off unless asked for."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

VARIABLE = "MOE_DIST_TIMELINE"


def mark(event: str) -> None:
    """Note that something has just been done, if `MOE_DIST_TIMELINE` names a file.

    Args:
        event: what was done; other processes may note the same.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    line = {"event": event, "time": time.time(), "rank": os.environ.get("RANK", "")}
    with Path(path).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def read_marks(path: Path) -> list[tuple[str, float]]:
    """Read when each event first happened, on rank 0 or in the driver, in seconds since 1970."""
    first: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        mark_ = json.loads(line)
        if mark_["rank"] in ("", "0"):
            first.setdefault(mark_["event"], mark_["time"])
    return sorted(first.items(), key=lambda item: item[1])
