"""An object that stays in this process, whatever Ray Tune does with what refers to it."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class DriverOnly(Generic[T]):
    """Holds an object that Tune must neither copy nor send: Tune pickles whatever it is given.

    Args:
        held: the object; None in a copy elsewhere, which nobody asks.
    """

    def __init__(self, held: T | None) -> None:
        self._held = held

    def __call__(self) -> T:
        """Give the object."""
        assert self._held is not None, "only the driver proposes and records"
        return self._held

    def __deepcopy__(self, memo: object) -> DriverOnly[T]:
        """Stay the same one."""
        return self

    def __reduce__(self) -> tuple[type[DriverOnly[T]], tuple[None]]:
        """Leave the object behind."""
        return DriverOnly, (None,)
