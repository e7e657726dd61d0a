"""Progress for people, on a terminal and in a log file."""

from __future__ import annotations

import math

import pytest

from pipelines import console as console_module
from pipelines.console import Console, duration


def test_a_log_file_gets_plain_lines_with_step_loss_and_eta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 100.0, 120.0, 121.0, 140.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    console = Console(live=False)
    console.stage_started("distill", resumed=False)
    console.progress(10, 100, {"loss": 0.5})
    console.progress(20, 100, {"loss": 0.25, "tokens/s": 12345.6})
    console.progress(21, 100, {"loss": 0.2})
    console.progress(40, 100, {"loss": 0.125})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "distill: started",
        "distill: step 10/100  loss 0.5",
        "distill: step 20/100  loss 0.25  tokens/s 12,346  ETA 2 min 40 s",
        "distill: step 40/100  loss 0.125  ETA 1 min 20 s",
    ]


def test_eta_forgets_the_steps_that_a_resumed_run_shows_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 100.0, 101.0, 200.0, 300.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    console = Console(live=False)
    console.stage_started("distill", resumed=True)
    for step in (10, 2000, 2100, 2200):
        console.progress(step, 3000)
    # A hundred steps took a hundred seconds.
    assert capsys.readouterr().err.splitlines()[-1].endswith("ETA 13 min 20 s")


def test_quiet_keeps_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("chatter")
    console.stage_started("adapt", resumed=False)
    console.progress(1, 2)
    console.warn("MLflow is away [retrying]")
    console.result("report: x")
    captured = capsys.readouterr()
    assert captured.err == "warning: MLflow is away [retrying]\n"
    assert captured.out == "report: x\n"


def test_a_live_bar_ends_with_its_stage(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(live=True)
    console.stage_started("distill", resumed=True)
    console.progress(1, 2, {"loss": 1.0})
    console.warn("slow")
    console.stage_finished("distill", 61.0, {"accuracy": 0.9})
    assert "distill: done in 1 min 01 s  (accuracy 0.9)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.44, "8.4 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_say_which_stage_of_how_many_and_what_the_loss_is_made_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(live=False)
    console.planned(["adapt", "distill", "evaluate"])
    console.stage_started("distill", resumed=False)
    console.progress(10, 100, {"loss": 0.5}, {"task": 0.3, "kl": 0.2})
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "distill (2 of 3): started",
        "distill: step 10/100  loss 0.5  (task 0.3  kl 0.2)",
    ]


def test_a_sweep_shows_its_trials_with_their_rung_and_the_best(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))
    console = Console(live=False)
    console.trials(0, 5, {}, {})
    console.trials(1, 5, {"best quality": 0.9}, {"trial-0002 rung 1/3": 0.8})
    assert capsys.readouterr().err.splitlines() == [
        "trials: trial 0/5",
        "trials: trial 1/5  best quality 0.9  ETA 6 min 40 s  (trial-0002 rung 1/3 0.8)",
    ]


def test_a_live_view_of_a_sweep_is_taken_away_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(live=True)
    console.trials(0, 5, {}, {})
    console.note("trial-0000: the recipe as it stands")
    console.trials(1, 5, {"best quality": 0.9}, {"trial-0002 rung 1/3": 0.8})
    console.close()
    console.note("after it")
    assert capsys.readouterr().err.endswith("after it\n")


def test_metrics_are_shown_by_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(live=False)
    console.name_metrics({"f1": "f1 of ok"})
    console.stage_finished("evaluate", 1.0, {"student/f1": 0.5, "f1": math.nan, "accuracy": 1.0})
    said = capsys.readouterr().err
    assert "student/f1 of ok 0.5, f1 of ok undefined, accuracy 1" in said
