"""Where the results of a run lie: in a directory of this machine, or mirrored from a URI."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.errors import ConfigError
from moe_dist.made_directories import MadeDirectories

from .fingerprints import path_digest

MINIMUM_FREE_MIB = 256
_REMEDY = "choose another place with `--set output_dir=DIRECTORY`."


class ResultFiles:
    """Results in a local or shared directory: what a stage writes is where it belongs.

    `MirroredFiles` does the same for a URI; there the verbs below do something.

    Args:
        root: the run's directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made = MadeDirectories()

    def prepare(self, source: str) -> None:
        """Make the directory, and check that it takes files.

        Args:
            source: the recipe's name, for an error.

        Raises:
            ConfigError: if it cannot be written or the disk is almost full.
        """
        try:
            self._made.make(self.root)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as probe:
                probe.write(b"\0" * (1 << 16))
                probe.flush()
                os.fsync(probe.fileno())
            free_mib = shutil.disk_usage(self.root).free / (1 << 20)
        except OSError as error:
            self.remove_if_empty()
            fault = (
                f"output_dir: cannot write in {self.root} ({error.strerror or error}); {_REMEDY}"
            )
            raise ConfigError([fault], source=source) from error
        if free_mib < MINIMUM_FREE_MIB:
            self.remove_if_empty()
            fault = (
                f"output_dir: only {free_mib:.0f} MiB are free where {self.root} lies, and a run "
                f"needs at least {MINIMUM_FREE_MIB} MiB; free some space, or {_REMEDY}"
            )
            raise ConfigError([fault], source=source)

    def remove_if_empty(self) -> None:
        """Take away again what `prepare` made, where nothing was written into it."""
        self._made.remove_if_empty()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the files ready for as long as a chain runs."""
        yield

    def address(self, path: Path) -> str:
        """Return the path or URI where workers find a file or directory, in the run or not."""
        return str(path)

    def shown(self, path: Path) -> str:
        """Say where a file lies, without credentials: a path or a URI."""
        return str(path)

    def fetch(self, path: Path) -> Path:
        """Make sure that a file or directory of the run is on this machine; returns the path."""
        return path

    def digest(self, path: Path) -> str:
        """Identify an output of a stage; see `path_digest`."""
        return path_digest(path)

    def digest_if_whole(self, path: Path) -> str | None:
        """Identify an output; None where it has gone or is damaged."""
        try:
            return self.digest(path)
        except (OSError, LookupError, ValueError, TypeError):  # Its manifest may be damaged.
            return None

    def refresh(self, log: Path, records: Path) -> None:
        """Bring up to date a job's metric log and the directory of its records."""

    def follow(self, path: Path) -> None:
        """Bring a file of lines up to date that a worker writes."""

    def received(self, directory: Path) -> None:
        """Take note of what workers wrote into a stage's directory."""

    def publish(self, directory: Path) -> None:
        """Make what this process wrote into a directory lasting; the stage's result comes last."""

    def moved(self, source: Path, target: Path) -> None:
        """Follow a directory that was given another name."""

    def removed(self, directory: Path) -> None:
        """Follow a directory, or a file, that was removed."""
