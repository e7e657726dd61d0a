"""A stage is skipped, resumed or run anew by its fingerprint alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.errors import MissingInputError, MoeDistError
from moe_dist.tracking import NullTracker
from pipelines.chain.files import ResultFiles
from pipelines.chain.stage import (
    StageInputs,
    StageOutcome,
    StageResult,
    StageWork,
    execute,
    read_result,
)
from tests.pipelines.recorder import Recorder


class Bench:
    """Runs one made-up stage and counts how often its work is done."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "stage"
        self.resumed: list[bool] = []
        self.fail: BaseException | None = None
        self.checkpoint = False
        workspace: Any = SimpleNamespace(
            stage_directory=lambda stage, label: self.directory,
            console=Recorder(),
            files=ResultFiles(root),
        )
        self.console: Recorder = workspace.console
        self.inputs = StageInputs(workspace)
        self.tracker = NullTracker().chain("test", root, params={})

    def run(self, **settings: Any) -> StageResult:
        return execute(
            "made-up",
            settings=settings,
            input_digests={"input": "abc"},
            inputs=self.inputs,
            tracker=self.tracker,
            work=self.work,
            scratch=("scratch",),
        )

    def run_aside(self, **settings: Any) -> None:
        """Run in a directory of its own and move it in place, as if nothing was there before."""
        place, self.directory = self.directory, self.directory.with_name("aside") / "stage"
        self.run(**settings)
        self.directory.rename(place)
        self.directory.parent.rmdir()
        self.directory = place

    def siblings(self) -> set[str]:
        return {path.name for path in self.directory.parent.iterdir()}

    def work(self, stage: StageWork) -> StageOutcome:
        self.resumed.append(stage.resumed)
        (stage.directory / "partial.txt").write_text("half")
        (stage.directory / "scratch").mkdir(exist_ok=True)
        (stage.directory / "scratch" / "step").write_text("large")
        if self.checkpoint:
            (stage.directory / "checkpoints" / "step-00000001").mkdir(parents=True)
        if self.fail is not None:
            raise self.fail
        (stage.directory / "out.txt").write_text("whole")
        return StageOutcome(outputs={"out": stage.directory / "out.txt"}, metrics={"accuracy": 0.5})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_finished_stage_is_skipped_and_read_back(bench: Bench) -> None:
    first = bench.run(size=1)
    second = bench.run(size=1)
    assert len(bench.resumed) == 1
    assert second.skipped
    assert not first.skipped
    assert second.outputs == first.outputs
    assert second.digests == first.digests
    assert second.metrics == {"accuracy": 0.5}


def test_another_setting_runs_the_stage_anew_in_an_empty_directory(bench: Bench) -> None:
    bench.run(size=1)
    (bench.directory / "old.txt").write_text("from the first run")
    bench.run(size=2)
    assert bench.resumed == [False, False]
    assert not (bench.directory / "old.txt").exists()


def test_an_unfinished_stage_keeps_its_files_and_resumes(bench: Bench) -> None:
    bench.fail = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=1)
    assert read_result(bench.directory) is None
    assert (bench.directory / "partial.txt").exists()
    bench.fail = None
    result = bench.run(size=1)
    assert bench.resumed == [False, True]
    assert result.seconds > 0


def test_scratch_outlives_a_failure_and_not_a_success(bench: Bench) -> None:
    bench.fail = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=1)
    assert (bench.directory / "scratch" / "step").exists()
    bench.fail = None
    bench.run(size=1)
    assert {path.name for path in bench.directory.iterdir()}.isdisjoint(
        {"scratch", ".scratch.removed"}
    )


@pytest.mark.parametrize("left", ["scratch", ".scratch.removed"])
def test_scratch_that_a_stopped_process_left_goes_when_the_stage_is_skipped(
    bench: Bench, left: str
) -> None:
    bench.run(size=1)
    (bench.directory / left).mkdir()
    (bench.directory / left / "step").write_text("large")
    assert bench.run(size=1).skipped
    assert not (bench.directory / left).exists()


def test_an_unfinished_stage_of_other_settings_is_not_resumed(bench: Bench) -> None:
    bench.fail = RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=1)
    bench.fail = None
    bench.run(size=2)
    assert bench.resumed == [False, False]


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()])
def test_an_attempt_that_fails_before_a_checkpoint_leaves_the_earlier_result(
    bench: Bench, error: BaseException
) -> None:
    bench.run(size=1)
    before = {path.name: path.read_bytes() for path in bench.directory.glob("*.*")}
    bench.fail = error
    with pytest.raises(type(error)):
        bench.run(size=2)
    assert {path.name: path.read_bytes() for path in bench.directory.glob("*.*")} == before
    assert bench.siblings() == {"stage"}
    assert bench.run(size=1).skipped


def test_an_attempt_with_a_checkpoint_stays_and_so_does_the_earlier_result(bench: Bench) -> None:
    bench.run(size=1)
    bench.checkpoint, bench.fail = True, RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=2)
    assert bench.siblings() == {"stage", ".stage.previous"}
    bench.checkpoint, bench.fail = False, None
    bench.run(size=2)
    assert bench.resumed == [False, False, True]
    assert bench.siblings() == {"stage"}


def test_the_earlier_result_comes_back_when_it_is_wanted_again(bench: Bench) -> None:
    bench.run(size=1)
    bench.checkpoint, bench.fail = True, RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=2)
    assert bench.run(size=1).skipped
    assert bench.siblings() == {"stage"}


def test_the_earlier_result_outlives_attempts_of_several_settings(bench: Bench) -> None:
    bench.run(size=1)
    bench.checkpoint, bench.fail = True, RuntimeError("killed")
    with pytest.raises(RuntimeError):
        bench.run(size=2)
    bench.checkpoint = False
    with pytest.raises(RuntimeError):
        bench.run(size=3)
    assert bench.run(size=1).skipped


@pytest.mark.parametrize("left", ["nothing", "empty", "partial", "started", "finished"])
@pytest.mark.parametrize("size", [1, 2])
def test_what_a_killed_process_left_does_not_stop_the_next_start(
    bench: Bench, left: str, size: int
) -> None:
    bench.run(size=1)
    bench.directory.rename(bench.directory.with_name(".stage.previous"))
    for name in (".stage.removed", ".stage.previous.removed"):
        bench.directory.with_name(name).mkdir()
    if left in ("empty", "partial"):
        bench.directory.mkdir()
    if left == "partial":
        (bench.directory / "started.json.partial").write_text('{"finger')
    if left in ("started", "finished"):
        bench.run_aside(size=2)
    if left == "started":
        (bench.directory / "stage.json").unlink()
    result = bench.run(size=size)
    assert result.outputs["out"].read_text() == "whole"
    assert result.skipped == ((left == "finished") == (size == 2))
    assert bench.siblings() == {"stage"}


def test_files_of_others_are_left_alone_beside_an_earlier_result(bench: Bench) -> None:
    bench.run(size=1)
    bench.directory.rename(bench.directory.with_name(".stage.previous"))
    test_files_of_others_are_left_alone(bench)
    assert bench.siblings() == {"stage", ".stage.previous"}


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_damaged_output_is_made_again(bench: Bench, damage: str) -> None:
    bench.run(size=1)
    output = bench.directory / "out.txt"
    output.unlink() if damage == "removed" else output.write_text("tampered")
    assert bench.console.warned == []
    bench.run(size=1)
    why = "made-up: missing or changed since it finished: out; it is done again"
    assert bench.console.warned == [why]
    assert output.read_text() == "whole"
    assert len(bench.resumed) == 2


def test_files_of_others_are_left_alone(bench: Bench) -> None:
    bench.directory.mkdir()
    (bench.directory / "thesis.txt").write_text("precious")
    with pytest.raises(MoeDistError, match="did not write"):
        bench.run(size=1)
    assert (bench.directory / "thesis.txt").read_text() == "precious"


def test_what_a_stage_was_made_from_is_written_down(bench: Bench) -> None:
    bench.run(size=1)
    written = json.loads((bench.directory / "stage.json").read_text())
    assert written["settings"] == {"size": 1}
    assert written["inputs"] == {"input": "abc"}


def test_a_missing_stage_is_named_with_the_command_that_makes_it(bench: Bench) -> None:
    with pytest.raises(MissingInputError, match="moe-dist adapt"):
        bench.inputs.result("adapt")


def test_a_comparison_takes_its_own_result_before_the_shared_one(bench: Bench) -> None:
    teacher, own = bench.run(size=1), bench.run(size=2)
    inputs = StageInputs(
        bench.inputs.workspace, {"teacher": teacher, "adapt": teacher, "adapt/dense": own}, "dense"
    )
    assert inputs.result("adapt") is own
    assert inputs.result("teacher") is teacher
