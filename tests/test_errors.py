"""What all parts ask of an error."""

from __future__ import annotations

import errno
import os

import pytest

from moe_dist.errors import CheckpointError, is_full_disk


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(errno.ENOSPC, "any words"), True),
        (OSError(errno.EDQUOT, "any words"), True),
        (RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"), True),
        (CheckpointError(f"cannot be written: {os.strerror(errno.EDQUOT)}"), True),
        (f"ERROR: could not install: [Errno 28] {os.strerror(errno.ENOSPC)}", True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("no space"), False),
        ("", False),
    ],
)
def test_a_full_disk_is_recognised(fault: BaseException | str, expected: bool) -> None:
    assert is_full_disk(fault) is expected
