"""The stages of a trial: what its worker notes, and what the driver makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.tracking import StageNote
from pipelines.chain.files import ResultFiles
from pipelines.search.trial_stages import STAGES_NAME, StageLog, TrialStages, clear_stages


class Run:
    """A trial's run that remembers its stages."""

    def __init__(self) -> None:
        self.notes: dict[str, StageNote] = {}
        self.measured: list[tuple[int, dict[str, float]]] = []

    def note_stage(self, note: StageNote) -> Run:
        self.notes[note.name] = note
        return self

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.measured.append((step, metrics))

    def statuses(self) -> dict[str, str]:
        return {name: note.status for name, note in self.notes.items()}


@pytest.fixture
def run() -> Run:
    return Run()


def follow(run: Any, directory: Path) -> TrialStages:
    return TrialStages(run, directory, "ab12", ResultFiles(directory))


def test_stages_are_followed_while_they_run(run: Run, tmp_path: Path) -> None:
    log, stages = StageLog(tmp_path), follow(run, tmp_path)
    stages.measured(1, {"accuracy": 0.5})  # seen before what was written earlier
    with log.stage("adapt", {"moe": {"top_k": 2}}) as place:
        stages.follow()
        assert place == tmp_path / "adapt" and run.statuses() == {"adapt": "RUNNING"}
        assert run.notes["adapt"].params == {"moe": {"top_k": 2}}
    with log.stage("evaluate", {}):
        pass
    stages.measured(9, {"accuracy": 0.75})
    own = [(1, {"trial/accuracy": 0.5}), (9, {"trial/accuracy": 0.75})]
    of_stage = [(1, {"student/accuracy": 0.5}), (9, {"student/accuracy": 0.75})]
    assert run.measured == [*own, *of_stage]
    note = run.notes["adapt"]
    assert note.status == "FINISHED" and note.ended_s is not None
    assert note.started_s <= note.ended_s <= run.notes["evaluate"].started_s


class Stopped(BaseException):
    """How Ray Tune ends a trial."""


@pytest.mark.parametrize(("fault", "status"), [(Stopped, "FINISHED"), (ValueError("no"), "FAILED")])
def test_what_ends_a_stage_is_its_state(run: Run, tmp_path: Path, fault: Any, status: str) -> None:
    with pytest.raises((Stopped, ValueError)), StageLog(tmp_path).stage("distill", {}):
        raise fault
    follow(run, tmp_path).end("FINISHED")
    assert run.statuses() == {"distill": status}


def test_a_worker_that_dies_leaves_its_last_stage_to_the_driver(run: Run, tmp_path: Path) -> None:
    log = StageLog(tmp_path)
    with log.stage("adapt", {}):
        pass
    with log.stage("distill", {}):
        stages = follow(run, tmp_path)
        with (tmp_path / STAGES_NAME).open("a") as stream:
            stream.write('{"stage": "evalu')
        stages.end("FAILED")
    assert run.statuses() == {"adapt": "FINISHED", "distill": "FAILED"}
    assert run.notes["distill"].ended_s is not None


def test_an_earlier_attempt_is_forgotten(run: Run, tmp_path: Path) -> None:
    clear_stages(tmp_path, ResultFiles(tmp_path))
    with StageLog(tmp_path).stage("adapt", {}):
        pass
    clear_stages(tmp_path, ResultFiles(tmp_path))
    follow(run, tmp_path).end("KILLED")
    assert run.notes == {}
