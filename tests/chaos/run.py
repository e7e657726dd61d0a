"""A run of the chain that can be hurt: its driver, its marks and what it left on disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from moe_dist.distributed.checkpoint import list_checkpoints, verify_checkpoint
from moe_dist.errors import CheckpointError
from tests.chaos.marks import DIRECTORY_VARIABLE, Mark, MarkBoard, Reached
from tests.chaos.testbeds import Testbed
from tests.chaos.trace import Attempt, read_trace
from tests.hosts.ray_cluster import ROOT

WAIT_S = 400.0
POLL_S = 0.1


class RunLost(Exception):
    """A run that ended, or hung, where it should have gone on."""


class Run:
    """One chain whose distillation is hurt.

    Args:
        testbed: where it runs.
        recipe: its settings; name, directories and tracking are set here.
        prepared: a run's directory in which the stages before the distillation have finished.
        records: where marks, traces and logs lie; a new directory.
        output_dir: where the run writes; a new directory.
        name: of the run and its MLflow experiment.
        marks: where its workers stop.
    """

    def __init__(
        self,
        testbed: Testbed,
        recipe: dict[str, Any],
        prepared: Path,
        *,
        records: Path,
        output_dir: Path,
        name: str,
        marks: Sequence[Mark] = (),
    ) -> None:
        self.testbed = testbed
        self.name = name
        self.records = records
        self.directory = output_dir / str(recipe["name"])
        self.stage_directory = self.directory / "distill"
        self.board = MarkBoard(records)
        self.board.plan(marks)
        shutil.copytree(prepared, self.directory)
        tracking = {"uri": testbed.tracking_uri, "experiment": name, "log_models": False}
        self._recipe = records / "recipe.yaml"
        settings = recipe | {"output_dir": str(output_dir), "tracking": tracking}
        self._recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        self._driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Give the command; the same one each time."""
        environment = self.testbed.environment() | {DIRECTORY_VARIABLE: str(self.records)}
        cluster = getattr(self.testbed, "cluster", None)
        if cluster is not None:
            environment["RAY_ADDRESS"] = cluster.address
        command = ["-m", "tests.chaos.command", "distill", str(self._recipe), "--debug"]
        with (self.records / "driver.log").open("ab") as log:
            self._driver = subprocess.Popen(
                self.testbed.command(*command),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, mark: Mark) -> Reached:
        """Wait until a worker stands at a mark.

        Raises:
            RunLost: if the run ends before, or nobody comes.
        """
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            reached = self.board.reached(mark)
            if reached is not None:
                return reached
            if self.returncode() is not None:
                raise RunLost(f"ended with {self.returncode()} before {mark}:\n{self.log_tail()}")
            self.testbed.tend()
            time.sleep(POLL_S)
        raise RunLost(f"nobody came to {mark} in {WAIT_S:.0f} s:\n{self.log_tail()}")

    def wait_for_end(self, timeout_s: float = WAIT_S) -> int:
        """Wait for the driver's end.

        Returns:
            Its exit code.

        Raises:
            RunLost: if it does not end.
        """
        until = time.monotonic() + timeout_s
        while (code := self.returncode()) is None and time.monotonic() < until:
            self.testbed.tend()
            time.sleep(POLL_S)
        if code is None:
            raise RunLost(f"did not end in {timeout_s:.0f} s:\n{self.log_tail()}")
        return code

    def returncode(self) -> int | None:
        """Return the driver's exit code; None while it runs."""
        assert self._driver is not None, "the run was not started"
        return self._driver.poll()

    def kill_driver(self) -> None:
        """Kill the driver and nothing else."""
        assert self._driver is not None, "the run was not started"
        with suppress(ProcessLookupError):
            os.kill(self._driver.pid, signal.SIGKILL)
        self._driver.wait()

    def trace(self) -> list[Attempt]:
        """Return what its workers did."""
        return read_trace(self.records)

    def newest_checkpoint(self) -> int:
        """Return the step of the newest good checkpoint; 0 if there is none."""
        for path in list_checkpoints(self.stage_directory / "checkpoints"):
            with suppress(CheckpointError):
                verify_checkpoint(path)
                return int(path.name.rpartition("-")[2])
        return 0

    def log_tail(self, num_bytes: int = 3000) -> str:
        """Return the end of what the driver printed."""
        text = (self.records / "driver.log").read_text(encoding="utf-8", errors="replace")
        return text[-num_bytes:]
