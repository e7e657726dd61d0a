"""The log that an interrupted sweep continues from."""

from __future__ import annotations

from pathlib import Path

from moe_dist.search.trials import Report, TrialLog, WeightSegment


def test_a_log_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl")
    log.started(1, {"seed": 3}, {"seed": 3, "moe.top_k": 1})
    log.reported(1, Report(1, 10, {"quality": 0.5, "loss": float("nan")}), num_steps=30)
    log.reported(1, Report(3, 30, {"quality": 0.75}), num_steps=30)
    log.ended(1, "finished", 4.5)
    log.started(2, {}, {})
    log.ended(2, "failed", 0.0, "no memory")
    log.started(3, {}, {})

    again = TrialLog(tmp_path / "trials.jsonl").trials
    assert again == log.trials
    assert again[1].metrics == {"quality": 0.75} and again[1].steps_done == 30
    assert again[1].drawn == {"seed": 3}
    assert [trial.is_over for trial in again.values()] == [True, False, False]
    assert again[2].message == "no memory"


def test_half_a_line_of_a_killed_driver_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path).started(1, {}, {})
    with path.open("a") as stream:
        stream.write('{"event": "ended", "num')
    log = TrialLog(path)
    log.ended(1, "stopped", 1.0)
    assert TrialLog(path).trials[1].status == "stopped"


def test_a_trial_that_starts_again_forgets_its_first_attempt(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl")
    log.started(1, {}, {})
    log.reported(1, Report(1, 10, {"quality": 0.5}), num_steps=30)
    log.started(1, {}, {})
    assert log.trials[1].reports == []


def test_a_trial_that_follows_another_has_its_course(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl")
    first, second, third = ({"train.learning_rate": rate} for rate in (1e-3, 1e-4, 1e-5))
    log.started(1, first, first)
    log.started(2, second, second)
    log.took_over(1, 2, 10, third, third)
    log.took_over(2, 1, 20, first, first)
    assert log.trials[1].overrides == third
    assert log.trials[1].weight_history == [
        WeightSegment(0, 2, second),
        WeightSegment(10, 1, third),
    ]
    assert log.trials[2].weight_history == [
        WeightSegment(0, 2, second),
        WeightSegment(10, 1, third),
        WeightSegment(20, 2, first),
    ]
    assert TrialLog(tmp_path / "trials.jsonl").trials == log.trials
