"""Where a machine keeps copies of what a store holds; nothing there is of value."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moe_dist.errors import StorageError


def scratch_root() -> Path:
    """Make this user's scratch directory; StorageError if it is another user's.

    It is `MOE_DIST_SCRATCH`, else `moe-dist-<user id>` among the temporary files.
    """
    given = os.environ.get("MOE_DIST_SCRATCH")
    name = f"moe-dist-{os.getuid()}"
    root = Path(given).absolute() if given else Path(tempfile.gettempdir()).absolute() / name
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if root.stat().st_uid != os.getuid():
        raise StorageError(
            f"{root} belongs to another user", remedy="set MOE_DIST_SCRATCH to a directory of yours"
        )
    return root
