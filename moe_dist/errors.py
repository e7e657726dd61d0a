"""Errors that a user can act on: each says what is wrong and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_WORDS = ("No space left on device", "Disk quota exceeded")


class MoeDistError(Exception):
    """Base of all errors that moe-dist raises for its user.

    Instances survive pickling, so that a Ray worker's error reaches the driver whole.

    Args:
        message: what is wrong, in one sentence.
        remedy: what the user can do about it.
    """

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  Remedy: {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(MoeDistError):
    """The recipe or its overrides are wrong; carries every fault at once.

    Args:
        faults: one line for each fault: dotted path, what is wrong, remedy.
        source: the recipe's name, for the heading.
    """

    def __init__(self, faults: Sequence[str], *, source: str = "configuration") -> None:
        noun = "fault" if len(faults) == 1 else "faults"
        lines = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"{source}: {len(faults)} {noun}\n{lines}")
        self.faults = tuple(faults)


class MissingInputError(MoeDistError):
    """A method or router needs something that it was not given."""


class DataError(MoeDistError):
    """A data set cannot be read, or does not hold what the task needs."""


class NotAtHandError(DataError):
    """Data or a model may well exist, but this machine has them not now and cannot get them."""


class ConversionError(MoeDistError):
    """A model cannot be scored, split or converted as asked."""


class CheckpointError(MoeDistError):
    """A checkpoint or model directory is damaged, incomplete or unsafe."""


class StorageError(MoeDistError):
    """A bucket, or another store that a URI names, cannot be read or written."""


class TrainingError(MoeDistError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss became NaN or infinite; the message names step, samples and terms."""


class ClusterError(MoeDistError):
    """The Ray cluster cannot do what the recipe asks."""


class TrackingError(MoeDistError):
    """The MLflow server or store cannot be used."""


def is_full_disk(fault: BaseException | str) -> bool:
    """Say whether something failed because a disk is full or a quota is used up.

    Libraries such as safetensors leave only the system's words, since they wrap its error.
    """
    if isinstance(fault, OSError) and fault.errno in _FULL_DISK:
        return True
    text = str(fault)
    return any(words in text for words in _FULL_DISK_WORDS)


def _rebuild(
    kind: type[MoeDistError], args: tuple[Any, ...], state: dict[str, Any]
) -> MoeDistError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
