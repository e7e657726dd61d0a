"""Time the way from `moe-dist compress` to the first training step, and say where it goes.

The command runs as its own process, as a user would start it, on a fresh output directory; it is
stopped after the first step. Every process notes its marks in one file (`moe_dist.timeline`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_dist.errors import MoeDistError
from moe_dist.timeline import VARIABLE, read_marks

GOAL_S = 25.0
LAST_EVENT = "first step"
DEMO = Path(__file__).parent.parent / "recipes" / "demo.yaml"
_POLL_S = 0.1
_STOP_S = 60.0


@dataclass(frozen=True)
class StartupBenchmark:
    """What to start.

    Args:
        recipe: the recipe; its first stage must train.
        overrides: further settings, `key=value`.
        num_repeats: starts that count, after one that fills the caches of data and tokens.
        timeout_s: how long one start may take.
    """

    recipe: Path = DEMO
    overrides: tuple[str, ...] = ()
    num_repeats: int = 2
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Startup:
    """One start.

    Args:
        parts: what was done, with the seconds since the part before it.
        total_s: from the start of the process to the end of the first step.
    """

    parts: tuple[tuple[str, float], ...]
    total_s: float


def run(settings: StartupBenchmark | None = None) -> list[Startup]:
    """Start the command several times; a MoeDistError if a start fails or takes too long."""
    settings = StartupBenchmark() if settings is None else settings
    return [_start_once(settings) for _ in range(settings.num_repeats + 1)][1:]


def to_table(startups: Sequence[Startup]) -> Table:
    """Lay the parts out for the console."""
    table = Table(title="from `moe-dist compress` to the end of the first training step")
    table.add_column("until")
    for number in range(1, len(startups) + 1):
        table.add_column(f"start {number}, s", justify="right")
    for index, (event, _) in enumerate(startups[0].parts):
        table.add_row(event, *(f"{startup.parts[index][1]:.1f}" for startup in startups))
    table.add_row("total", *(f"{startup.total_s:.1f}" for startup in startups))
    return table


def main(settings: StartupBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark startup` calls."""
    startups = run(settings)
    console = Console(highlight=False)
    console.print(to_table(startups))
    slowest = max(startup.total_s for startup in startups)
    verdict = "reached" if slowest <= GOAL_S else "missed"
    console.print(f"slowest {slowest:.1f} s; the goal of {GOAL_S:g} s is {verdict}")


def _start_once(settings: StartupBenchmark) -> Startup:
    with tempfile.TemporaryDirectory(prefix="moe-dist-") as name:
        directory = Path(name)
        timeline = directory / "timeline.jsonl"
        timeline.touch()
        started = time.time()
        with (directory / "output.txt").open("w+", encoding="utf-8") as output:
            process = subprocess.Popen(
                _command(settings, directory),
                env=os.environ | {VARIABLE: str(timeline)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                marks = _wait_for_step(process, timeline, started + settings.timeout_s)
            finally:
                _stop(process)
            if marks is None:
                output.seek(0)
                raise MoeDistError(
                    f"`compress` took no step: {output.read()[-2000:]}",
                    remedy="run the recipe with `moe-dist compress` and see why it stops",
                )
    times = [started, *(at for _, at in marks)]
    parts = zip((event for event, _ in marks), times[1:], times[:-1], strict=True)
    return Startup(tuple((event, at - before) for event, at, before in parts), times[-1] - started)


def _command(settings: StartupBenchmark, directory: Path) -> list[str]:
    settings_here = [
        f"output_dir={directory / 'outputs'}",
        f"tracking.uri=sqlite:///{directory / 'mlflow.db'}",
        *settings.overrides,
    ]
    command = [sys.executable, "-m", "pipelines", "compress", str(settings.recipe), "--quiet"]
    return command + [part for one in settings_here for part in ("--set", one)]


def _wait_for_step(
    process: subprocess.Popen[bytes], timeline: Path, deadline: float
) -> list[tuple[str, float]] | None:
    while process.poll() is None and time.time() < deadline:
        marks = read_marks(timeline)
        if marks and marks[-1][0] == LAST_EVENT:
            return marks
        time.sleep(_POLL_S)
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it as `kill` does; it takes Ray down with it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
