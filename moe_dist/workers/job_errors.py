"""How a job's error travels from a worker to the user: whole, once, and with a remedy."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import moe_dist.errors
from moe_dist.errors import MoeDistError, TrainingError, is_full_disk
from moe_dist.redaction import hide_secrets

STOPPED_NAME = "stopped.json"
ROOM_NAME = "room"
_ROOM_BYTES = 1 << 16
# Ray's errors, by name, since this module knows no Ray.
_DEATHS = ("ActorDiedError", "ActorUnavailableError", "OutOfMemoryError", "NodeDiedError")


def keep_room(records: Path) -> None:
    """Put aside the space that a last word takes, for when the disk is full."""
    # Zeros would take no space on a file system that compresses.
    with suppress(OSError):
        (records / ROOM_NAME).write_bytes(os.urandom(_ROOM_BYTES))


def note_stop(records: Path, error: MoeDistError) -> None:
    """Leave word that the job must not be tried again, and why.

    On a full disk it takes the place of what `keep_room` put aside.

    Args:
        records: the job's directory, which all ranks and the driver share.
        error: the reason.
    """
    note = {
        "kind": type(error).__name__,
        "args": [hide_secrets(str(part)) for part in error.args],
        "state": {
            key: hide_secrets(value) if isinstance(value, str) else value
            for key, value in vars(error).items()
            if isinstance(value, str | int | float)
        },
    }
    try:
        write_first(records / STOPPED_NAME, note)
    except OSError:
        (records / ROOM_NAME).unlink(missing_ok=True)
        # If there is still no space, the error comes back through Ray, after its retries.
        with suppress(OSError):
            write_first(records / STOPPED_NAME, note)


def write_first(path: Path, note: Mapping[str, Any]) -> None:
    """Write a file whole, unless another rank was first: the first to fail tells the reason."""
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(note), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_stop(records: Path) -> MoeDistError | None:
    """Read the error that `note_stop` left.

    Args:
        records: the job's directory.

    Returns:
        The error of the rank that failed first; None if no rank left one.
    """
    path = records / STOPPED_NAME
    if not path.exists():
        return None
    note = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(moe_dist.errors, note["kind"], TrainingError)
    error: MoeDistError = kind.__new__(kind)
    error.args = tuple(note["args"])
    vars(error).update(note["state"])
    return error


def user_error(fault: BaseException) -> MoeDistError | None:
    """Name the errors that another attempt cannot mend.

    Args:
        fault: what the job raised.

    Returns:
        The error for the user; None for a RuntimeError or OSError, which may be the echo of
        another worker's death and is worth another attempt.
    """
    if isinstance(fault, MoeDistError):
        return fault
    if is_full_disk(fault):
        return TrainingError(
            f"the disk is full: {first_line(fault)}",
            remedy="Free space, or give another output_dir; the same command then continues.",
        )
    if isinstance(fault, RuntimeError | OSError):
        return None
    trace = "".join(traceback.format_exception(fault))
    return TrainingError(
        f"a worker failed: {type(fault).__name__}: {fault}",
        remedy=f"This looks like a fault of moe-dist; please report it with this trace:\n{trace}",
    )


def explain(fault: BaseException, max_failures: int, reasons: Sequence[str] = ()) -> MoeDistError:
    """Turn Ray Train's error into one that says what to do.

    Args:
        fault: the `TrainingFailedError`.
        max_failures: how many deaths were to be survived.
        reasons: what the ranks found out about each failure, the last one last.

    Returns:
        The job's own error if it is among the causes.
    """
    failures: Mapping[int, BaseException] = getattr(fault, "worker_failures", {})
    causes = [_cause(failure) for failure in failures.values()]
    for cause in causes:
        error = user_error(cause)
        if error is not None and (isinstance(cause, MoeDistError) or is_full_disk(cause)):
            return error
    lines = [f"rank {rank}: {last_line(failure)}" for rank, failure in failures.items()]
    reason = reasons[-1] if reasons else "; ".join(lines) or last_line(fault)
    return TrainingError(
        f"the workers failed more than {max_failures} times (parallel.max_failures): {reason}",
        remedy=(
            "The same command continues from the newest checkpoint. If workers were killed, look "
            "for memory that ran out; their logs lie under /tmp/ray/session_latest/logs."
        ),
    )


def _cause(fault: BaseException) -> BaseException:
    """Unwrap what Ray put around a worker's exception."""
    inner = getattr(fault, "cause", None) or getattr(fault, "health_check_failure", None)
    return _cause(inner) if isinstance(inner, BaseException) else fault


def first_line(fault: BaseException) -> str:
    """Return the first line of an error's text, or its kind if it has none."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__


def died(failure: BaseException) -> str:
    """Say how a worker's process died, to follow its name; empty for an error it raised."""
    if type(failure).__name__ == "WorkerHealthCheckTimeoutError":
        return "does not answer Ray"
    cause = _cause(failure)
    if type(cause).__name__ not in _DEATHS:
        return ""
    out_of_memory = "OUT_OF_MEMORY" in str(cause)
    return "was ended by Ray, as its node ran out of memory" if out_of_memory else "died"


def last_line(fault: BaseException) -> str:
    """Return the kind and the last line of an error, without what Ray put around it.

    Of our own errors it is the first line, since the remedy ends them.
    """
    cause = _cause(fault)
    if isinstance(cause, MoeDistError):
        return first_line(cause)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1].strip()}" if lines else repr(fault)
