"""Log runs from many processes at once to one sqlite store, and count what arrives.

Each process opens the store by itself and logs chains with one stage, as trials of a sweep do. Then
every point is read back and compared with what was written, and the report on 100 of the runs is
timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_dist.errors import MoeDistError
from moe_dist.tracking import RunReader

from ..report.page import render_page
from ..report.selection import select_runs
from .sizes import below_one

EXPERIMENT = "benchmark"
STAGE = "distill"
METRICS = ("train/loss/total", "dev/accuracy")
GOAL_REPORT_S = 5.0
GOAL_REPORT_MB = 5.0
MAX_REPORTED = 100


@dataclass(frozen=True)
class TrackingBenchmark:
    """What to log.

    Args:
        num_runs: of all processes together.
        num_processes: that log at once.
        num_steps: lines of each run's metric log; each has two points.
        directory: where store and runs go, to be kept; temporary if None.
        timeout_s: how long all of it may take.
    """

    num_runs: int = 200
    num_processes: int = 8
    num_steps: int = 50
    directory: Path | None = None
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class TrackingResult:
    """What arrived.

    Args:
        num_runs: finished runs with a finished stage.
        num_points: points that were written.
        num_lost: of these, those that the store lacks or has twice.
        complaints: warnings and errors of the processes.
        seconds: for logging, the start of the processes included.
        report_s: for the report on `num_reported` runs, once the program is loaded.
        report_mb: its size.
        num_reported: runs on it.
    """

    num_runs: int
    num_points: int
    num_lost: int
    complaints: tuple[str, ...]
    seconds: float
    report_s: float
    report_mb: float
    num_reported: int


def run(settings: TrackingBenchmark) -> TrackingResult:
    """Log, read back and report; a MoeDistError if a size is below 1 or a process does not end."""
    faults = below_one(settings, "num_runs", "num_processes", "num_steps")
    if faults:
        raise MoeDistError("; ".join(faults), remedy="give a larger one.")
    target = settings.directory
    with (
        tempfile.TemporaryDirectory(prefix="moe-dist-tracking-")
        if target is None
        else nullcontext(str(target))
    ) as scratch:
        return _run_in(Path(scratch).absolute(), settings)


def _run_in(root: Path, settings: TrackingBenchmark) -> TrackingResult:
    root.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{root}/mlflow.db"
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            _command(root, uri, settings, first),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for first in range(settings.num_processes)
    ]
    complaints: list[str] = []
    try:
        for process in processes:
            left_s = max(1.0, begin + settings.timeout_s - time.monotonic())
            _, errors = process.communicate(timeout=left_s)
            complaints += [line for line in errors.splitlines() if line.strip()]
            if process.returncode != 0:
                complaints.append(f"a process ended with {process.returncode}")
    except subprocess.TimeoutExpired:
        raise MoeDistError(
            f"the processes did not end within {settings.timeout_s:.0f} s",
            remedy="log fewer runs.",
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    seconds = time.monotonic() - begin
    num_runs, num_lost = _count(uri, settings)
    report_s, report_mb, num_reported = _report(uri, settings)
    return TrackingResult(
        num_runs=num_runs,
        num_points=2 * settings.num_steps * settings.num_runs,
        num_lost=num_lost,
        complaints=tuple(complaints),
        seconds=seconds,
        report_s=report_s,
        report_mb=report_mb,
        num_reported=num_reported,
    )


def _command(root: Path, uri: str, settings: TrackingBenchmark, first: int) -> list[str]:
    numbers = list(range(first, settings.num_runs, settings.num_processes))
    task = {"root": str(root), "uri": uri, "numbers": numbers, "num_steps": settings.num_steps}
    # A wheel keeps this package under another name.
    return [sys.executable, "-m", f"{__package__}.tracking_process", json.dumps(task)]


def expected(number: int, step: int) -> tuple[float, float]:
    """Give loss and dev metric of one step of one run."""
    return number + 1.0 / step, 0.5 + 0.4 * step / (step + number + 1)


def _count(uri: str, settings: TrackingBenchmark) -> tuple[int, int]:
    reader = RunReader(uri, EXPERIMENT)
    finished = {run.name: run for run in reader.search("attributes.status = 'FINISHED'")}
    parents = {name: run for name, run in finished.items() if not run.parent_id}
    children = reader.children(parents.values())
    written = [
        (stage, METRICS) for stages in children.values() for stage in stages if stage.name == STAGE
    ]
    histories = reader.histories(written)
    num_lost, num_whole = 0, 0
    for number in range(settings.num_runs):
        parent = parents.get(f"run-{number:03d}")
        below = [] if parent is None else children[parent.run_id]
        stages = [stage for stage in below if stage.name == STAGE]
        num_whole += len(stages) == 1 and stages[0].status == "FINISHED"
        for index, metric in enumerate(METRICS):
            wanted = [
                (step, expected(number, step)[index]) for step in range(1, settings.num_steps + 1)
            ]
            found = histories[stages[0].run_id].get(metric, []) if len(stages) == 1 else []
            num_lost += len(set(wanted) - set(found)) + len(found) - len(set(found))
    return num_whole, num_lost


def _report(uri: str, settings: TrackingBenchmark) -> tuple[float, float, int]:
    names = [f"run-{number:03d}" for number in range(min(settings.num_runs, MAX_REPORTED))]
    begin = time.monotonic()
    page = render_page(select_runs(names, uri=uri, experiment=EXPERIMENT))
    return time.monotonic() - begin, len(page.encode()) / 1e6, len(names)


def to_table(result: TrackingResult) -> Table:
    """Lay the result out for the console."""
    table = Table(title="concurrent processes, one sqlite store")
    table.add_column("what")
    table.add_column("found", justify="right")
    table.add_column("goal", justify="right")
    table.add_row("runs whole", str(result.num_runs), "all")
    table.add_row("points written", str(result.num_points), "")
    table.add_row("points lost or doubled", str(result.num_lost), "0")
    table.add_row("warnings and errors", str(len(result.complaints)), "0")
    table.add_row("logging, s", f"{result.seconds:.1f}", "")
    table.add_row(
        f"report on {result.num_reported} runs, s",
        f"{result.report_s:.1f}",
        f"under {GOAL_REPORT_S:.0f}",
    )
    table.add_row("its size, MB", f"{result.report_mb:.2f}", f"under {GOAL_REPORT_MB:.0f}")
    return table


def main(settings: TrackingBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark tracking` calls."""
    result = run(settings or TrackingBenchmark())
    console = Console()
    console.print(to_table(result))
    for complaint in result.complaints[:10]:
        console.print(complaint, markup=False)
