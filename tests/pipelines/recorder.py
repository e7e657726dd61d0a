"""A console that tells a test what a chain did."""

from __future__ import annotations

from pipelines.console import Console


class Recorder(Console):
    """A quiet console that remembers what stages ran, were skipped or resumed, and what it said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ran: list[str] = []
        self.resumed: list[str] = []
        self.skipped: list[str] = []
        self.warned: list[str] = []
        self.noted: list[str] = []

    def stage_started(self, stage: str, *, resumed: bool) -> None:
        self.ran.append(stage)
        self.resumed += [stage] if resumed else []

    def stage_skipped(self, stage: str, seconds: float) -> None:
        self.skipped.append(stage)

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def note(self, message: str) -> None:
        self.noted.append(message)
