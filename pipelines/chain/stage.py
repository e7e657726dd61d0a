"""A stage: one directory, one fingerprint, one MLflow run; skipped, resumed or run anew."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import MissingInputError, MoeDistError
from moe_dist.metric_log import METRIC_LOG
from moe_dist.tracking import flatten
from moe_dist.whole_files import write_json

from .fingerprints import stage_fingerprint
from .stage_recovery import (
    FINISHED,
    STARTED,
    discard_previous,
    holds_foreign_files,
    move_back,
    read_started,
    recover,
    set_aside,
)

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

    from ..console import Console
    from .files import ResultFiles
    from .workspace import Workspace


@dataclass(frozen=True)
class StageResult:
    """What a finished stage left behind.

    Attributes:
        stage: the stage's name.
        label: the comparison it belongs to; empty for the main student.
        directory: where its files lie.
        fingerprint: what it was made from.
        outputs: path of each output, by name.
        digests: digest of each output, by name.
        metrics: its figures.
        details: other plain values that later stages and the report read.
        seconds: working time, summed over resumed attempts.
        skipped: whether an earlier run had already finished it.
    """

    stage: str
    label: str
    directory: Path
    fingerprint: str
    outputs: Mapping[str, Path]
    digests: Mapping[str, str]
    metrics: Mapping[str, float]
    details: Mapping[str, Any]
    seconds: float
    skipped: bool = False


@dataclass(frozen=True)
class StageInputs:
    """What a stage is given besides the configuration.

    Attributes:
        workspace: directories, data and start model, shared by the stages of a chain.
        upstream: results of the stages before it, by name (`distill/dense` for a comparison's).
        label: the comparison it works for; empty for the main student.
    """

    workspace: Workspace
    upstream: Mapping[str, StageResult] = field(default_factory=dict)
    label: str = ""

    def result(self, stage: str) -> StageResult:
        """Return the result of an earlier stage; a MissingInputError if it has not been run."""
        key = stage_key(stage, self.label)
        if key in self.upstream:
            return self.upstream[key]
        if stage in self.upstream:
            return self.upstream[stage]
        raise MissingInputError(
            f"the stage {stage!r} has no finished result here.",
            remedy=f"run `moe-dist {stage} RECIPE` first, or `moe-dist compress RECIPE`.",
        )


@dataclass(frozen=True)
class StageOutcome:
    """What the work of a stage returns.

    Attributes:
        outputs: path of each output, inside the stage's directory.
        metrics: figures worth keeping.
        details: other plain values.
        plots: pictures for the tracking server.
    """

    outputs: Mapping[str, Path]
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    plots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StageWork:
    """What the work of a stage is handed.

    Attributes:
        directory: the stage's own directory; exists.
        console: where progress is shown.
        run: the tracking run of this stage.
        resumed: whether an earlier attempt with the same fingerprint left its files here.
    """

    directory: Path
    console: Console
    run: TrackedRun
    resumed: bool


def stage_key(stage: str, label: str = "") -> str:
    """Name a stage in reports and mappings: `distill`, or `distill/LABEL` for a comparison."""
    return f"{stage}/{label}" if label else stage


def execute(
    stage: str,
    *,
    settings: Mapping[str, Any],
    input_digests: Mapping[str, str],
    inputs: StageInputs,
    tracker: TrackedRun,
    work: Callable[[StageWork], StageOutcome],
    scratch: tuple[str, ...] = (),
) -> StageResult:
    """Run a stage unless a finished directory already carries its fingerprint.

    Args:
        stage: the stage's name.
        settings: the part of the configuration that the stage reads.
        input_digests: the digest of each input.
        inputs: what the stage was given.
        tracker: the chain's run, which opens one child run for the stage.
        work: does the work and names what it wrote.
        scratch: directories inside the stage's own that only a resumed attempt needs; they are
            removed once the stage has finished.

    Returns:
        The result, read back from a finished directory or fresh.
    """
    key = stage_key(stage, inputs.label)
    directory = inputs.workspace.stage_directory(stage, inputs.label)
    fingerprint = stage_fingerprint(stage, settings=settings, inputs=input_digests)
    console, files = inputs.workspace.console, inputs.workspace.files
    recover(directory, fingerprint, files)
    finished = read_result(directory)
    if finished is not None and finished.fingerprint == fingerprint:
        damaged = _damaged_outputs(finished, files)
        if not damaged:
            # The process may have been stopped after it finished the stage and before it cleared
            # it.
            _clear(directory, scratch, files)
            console.stage_skipped(key, finished.seconds)
            return finished
        names = ", ".join(damaged)
        console.warn(f"{key}: missing or changed since it finished: {names}; it is done again")
    begin = time.monotonic()
    try:
        resumed, earlier_s = _prepare(directory, fingerprint, settings, input_digests, files)
        files.publish(directory)
        console.stage_started(key, resumed=resumed)
        with tracker.stage(
            key, directory, params=flatten(settings), fingerprint=fingerprint
        ) as run:
            if "data" in input_digests:
                for dataset in inputs.workspace.dataset_inputs:
                    run.log_dataset(dataset)
            outcome = work(StageWork(directory, console, run, resumed))
            seconds = earlier_s + time.monotonic() - begin
            result = StageResult(
                stage=stage,
                label=inputs.label,
                directory=directory,
                fingerprint=fingerprint,
                outputs=dict(outcome.outputs),
                digests={name: files.digest(path) for name, path in outcome.outputs.items()},
                metrics=dict(outcome.metrics),
                details=dict(outcome.details),
                seconds=seconds,
            )
            _finish(result, settings, input_digests)
            files.publish(directory)
            discard_previous(directory, files)
            _clear(directory, scratch, files)
            run.log_artifact(directory / FINISHED)
            if (directory / METRIC_LOG).is_file():
                # It has every layer's and expert's figures, of which MLflow shows a summary.
                run.log_artifact(directory / METRIC_LOG)
            for plot in outcome.plots:
                run.log_artifact(plot, folder="plots")
    except BaseException:
        if not move_back(directory, files):
            _note_attempt(directory, time.monotonic() - begin)
        raise
    finally:
        console.close()
    console.stage_finished(key, seconds, result.metrics)
    return result


def read_result(directory: Path) -> StageResult | None:
    """Read a stage back, whatever has become of its outputs; None where it never finished."""
    try:
        written = json.loads((directory / FINISHED).read_text(encoding="utf-8"))
        outputs = {name: directory / entry["path"] for name, entry in written["outputs"].items()}
        digests = {name: entry["digest"] for name, entry in written["outputs"].items()}
        return StageResult(
            stage=written["stage"],
            label=written["label"],
            directory=directory,
            fingerprint=written["fingerprint"],
            outputs=outputs,
            digests=digests,
            metrics={
                name: math.nan if value is None else value
                for name, value in written["metrics"].items()
            },
            details=written["details"],
            seconds=written["seconds"],
            skipped=True,
        )
    except (OSError, KeyError, ValueError, TypeError):
        return None


def _damaged_outputs(result: StageResult, files: ResultFiles) -> list[str]:
    """Name the outputs of a finished stage that have gone or changed."""
    return [
        name
        for name, path in result.outputs.items()
        if files.digest_if_whole(path) != result.digests[name]
    ]


def _prepare(
    directory: Path,
    fingerprint: str,
    settings: Mapping[str, Any],
    input_digests: Mapping[str, str],
    files: ResultFiles,
) -> tuple[bool, float]:
    """Make the directory ready; keep an unfinished attempt of the same fingerprint.

    An earlier result of other settings waits beside it until this one is there.
    """
    started = read_started(directory)
    if started is not None and started.get("fingerprint") == fingerprint:
        if (directory / FINISHED).exists():
            files.removed(directory / FINISHED)
            (directory / FINISHED).unlink()
        return True, float(started.get("seconds", 0.0))
    if holds_foreign_files(directory):
        raise MoeDistError(
            f"{directory} holds files that moe-dist did not write.",
            remedy="move them away, or choose another `name` or `output_dir`.",
        )
    if directory.exists() and any(directory.iterdir()):
        set_aside(directory, files)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / STARTED,
        {
            "fingerprint": fingerprint,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "settings": dict(settings),
            "inputs": dict(input_digests),
        },
    )
    return False, 0.0


def _clear(directory: Path, scratch: tuple[str, ...], files: ResultFiles) -> None:
    """Remove what a finished stage no longer needs."""
    for name in scratch:
        removed = directory / f".{name}.removed"
        shutil.rmtree(removed, ignore_errors=True)
        # Out of the way in one step: half a directory of checkpoints would look like a damaged one.
        with suppress(OSError):
            (directory / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
        files.removed(directory / name)


def _note_attempt(directory: Path, seconds: float) -> None:
    """Add an attempt's time to what the stage has cost; never hides the error that ended it."""
    started = read_started(directory)
    if started is None:
        return
    started["seconds"] = float(started.get("seconds", 0.0)) + seconds
    try:
        write_json(directory / STARTED, started)
    except OSError:
        return


def _finish(
    result: StageResult, settings: Mapping[str, Any], input_digests: Mapping[str, str]
) -> None:
    write_json(
        result.directory / FINISHED,
        {
            "stage": result.stage,
            "label": result.label,
            "fingerprint": result.fingerprint,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(result.seconds, 3),
            "outputs": {
                name: {
                    "path": str(path.relative_to(result.directory)),
                    "digest": result.digests[name],
                }
                for name, path in result.outputs.items()
            },
            "metrics": dict(result.metrics),
            "details": dict(result.details),
            "settings": dict(settings),
            "inputs": dict(input_digests),
        },
    )
