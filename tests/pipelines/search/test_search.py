"""A sweep without Ray: what is shared, resumed, failed and reported; Ray's part is in tests/ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from moe_dist.config import load_config
from moe_dist.config.search_space import parse_space
from moe_dist.data.metrics import METRICS
from moe_dist.errors import MoeDistError
from moe_dist.search.trials import Report, Trial, TrialLog
from moe_dist.workers.cluster_capacity import Capacity, Node
from pipelines.search import sweep as sweeping
from pipelines.search.results import verdict_lines
from pipelines.search.sweep import search_recipe
from pipelines.search.trial import TeacherFacts, TrialRunner, _OneTrial
from tests.pipelines.recorder import Recorder
from tests.pipelines.sweeps import SPACE, finish, in_this_process, settings

__all__ = ["in_this_process", "settings"]

Write = Callable[[dict[str, Any]], Path]


def test_a_trial_starts_where_the_chain_does(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    import torch

    from moe_dist.inference import load_model
    from pipelines.chain.chain import run_chain
    from pipelines.search.trial import _Warm

    config = load_config(write_recipe(tiny_settings))
    run_chain(config, Recorder(), until="adapt")
    run = Path(config.run_dir)
    scores = run / "score-importance" / "scores.safetensors"
    facts = TeacherFacts(str(run / "finetune-teacher" / "model"), str(scores), 0.5)
    warm = _Warm.load(config, facts)
    teacher = {name: value.clone() for name, value in warm.teacher.state_dict().items()}
    trial = _OneTrial(config, config.seed, warm, facts, (1,), "dev", lambda _: None)
    found = trial._student().state_dict()
    for name, value in load_model(run / "adapt" / "model").state_dict().items():
        assert torch.equal(value, found[name]), name
    for name, value in warm.teacher.state_dict().items():
        assert torch.equal(value, teacher[name]), "the teacher is as it was"


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_shares_its_teacher_and_leaves_a_recipe(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from pyarrow import parquet

    from pipelines.chain.chain import run_chain

    config = load_config(write_recipe(settings))
    recorder = Recorder()
    result = search_recipe(config, recorder, finish)
    assert recorder.ran == ["finetune-teacher", "score-importance"]
    assert [trial.status for trial in result.trials.values()] == [
        "finished",
        "stopped",
        "finished",
        "stopped",
    ]
    assert [len(result.trials[number].reports) for number in range(4)] == [3, 1, 3, 1]
    directory = tmp_path / "outputs/tiny/search"
    report = json.loads((directory / "report.json").read_text())
    assert report["trials"]["all"] == 4
    assert report["steps"]["taken"] < report["steps"]["of_all_to_the_end"]
    assert report["best"]["trial"] in (0, 2)
    text = (directory / "report.md").read_text()
    for name in ("parallel.png", "pareto.png", "curves.png"):
        assert (directory / name).stat().st_size > 1000 and name in text
    table = parquet.read_table(directory / "trials.parquet")
    assert table.num_rows == 4
    assert {"trial", "status", "moe.router", "train.learning_rate", "quality", "flops"} <= set(
        table.column_names
    )

    best = load_config(directory / "best.yaml")
    assert best.train.learning_rate == report["best"]["overrides"].get(
        "train.learning_rate", config.train.learning_rate
    )
    again = Recorder()
    run_chain(best, again, until="distill")
    assert again.skipped == ["finetune-teacher", "score-importance"]
    assert again.ran == ["adapt", "distill"]


@pytest.mark.usefixtures("in_this_process")
def test_where_lower_is_better_a_sweep_wants_the_lowest(
    write_recipe: Write,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], higher_is_better=False))
    config = load_config(write_recipe(settings))
    result = search_recipe(config, Recorder(), finish)
    report = json.loads((tmp_path / "outputs/tiny/search/report.json").read_text())
    assert report["objectives"] == {"quality": "min"}
    whole = [trial for trial in result.trials.values() if trial.status == "finished"]
    lowest = min(whole, key=lambda trial: (trial.value("quality"), trial.number))
    assert report["best"]["trial"] == lowest.number
    (teacher,) = result.teachers.values()
    assert lowest.value("retention") == pytest.approx(teacher.quality / lowest.value("quality"))


@pytest.mark.parametrize(
    ("metric", "low", "high", "claim"),
    [
        ("accuracy", 0.1, 0.3, "it beats"),
        ("accuracy", -0.3, -0.1, "it is worse than"),
        ("perplexity", -3.0, -1.0, "it beats"),
        ("perplexity", 1.0, 3.0, "it is worse than"),
        ("perplexity", -1.0, 3.0, "it cannot be told apart from"),
    ],
)
def test_the_best_is_judged_by_the_metrics_direction(
    metric: str, low: float, high: float, claim: str
) -> None:
    versus = {"metric": metric, "title": metric, "difference": (low + high) / 2}
    versus |= {"low": low, "high": high, "confidence": 0.95}
    summary = {
        "best": {"trial": 3, "metrics": {"quality": 0.5}},
        "objectives": {"quality": "max"},
        "against_baseline": versus,
        "chosen_on": "dev",
    }
    _, line = verdict_lines(summary)
    assert f"{claim} the recipe as it stands ({metric} {versus['difference']:+.4f}," in line


@pytest.mark.usefixtures("in_this_process")
def test_an_interrupted_sweep_goes_on_and_runs_nothing_twice(
    write_recipe: Write,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config(write_recipe(settings))
    ran: list[int] = []
    whole = TrialRunner.__call__

    def stop_at_two(self: TrialRunner, task: Any, say: Any) -> None:
        ran.append(task["number"])
        if task["number"] == 2:
            raise KeyboardInterrupt
        whole(self, task, say)

    with monkeypatch.context() as patched:
        patched.setattr(TrialRunner, "__call__", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            search_recipe(config, Recorder(), finish)
    log = tmp_path / "outputs/tiny/search/trials.jsonl"
    point = TrialLog(log).trials[2].overrides

    def note(self: TrialRunner, task: Any, say: Any) -> None:
        ran.append(task["number"])
        whole(self, task, say)

    monkeypatch.setattr(TrialRunner, "__call__", note)
    result = search_recipe(config, Recorder(), finish)
    assert ran == [0, 1, 2, 2, 3]
    assert result.trials[2].overrides == point
    search_recipe(config, Recorder(), finish)
    assert len(ran) == 5

    more = load_config(write_recipe(settings), ["search.num_trials=4"])
    search_recipe(more, Recorder(), finish)
    assert ran[5:] == [4]
    other = load_config(write_recipe(settings), ["train.batch_size=16"])
    with pytest.raises(MoeDistError, match="another search"):
        search_recipe(other, Recorder(), finish)


@pytest.mark.usefixtures("in_this_process")
def test_a_space_with_too_few_points_says_so(write_recipe: Write, settings: dict[str, Any]) -> None:
    space = {"moe.expert_size": {"choice": [12, 16, 5000, 9000]}}
    settings["search"] |= {"num_trials": 9, "space": space, "baseline": False}
    recorder = Recorder()
    result = search_recipe(load_config(write_recipe(settings)), recorder, finish)
    assert len(result.trials) == 2
    (said,) = (line for line in recorder.warned if "point" in line)
    assert "no further point for search.num_trials=9: 2 fit; 2 others" in said
    enough = Recorder()
    search_recipe(load_config(write_recipe(settings), ["search.num_trials=2"]), enough, finish)
    assert not any("point" in line for line in enough.warned)


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_trial_says_so_and_the_others_go_on(
    write_recipe: Write,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = TrialRunner.__call__

    def fail_at_one(self: TrialRunner, task: Any, say: Any) -> None:
        if task["number"] == 1:
            raise ValueError("no memory left")
        whole(self, task, say)

    monkeypatch.setattr(TrialRunner, "__call__", fail_at_one)
    recorder = Recorder()
    warned: list[str] = []
    monkeypatch.setattr(recorder, "warn", warned.append)
    result = search_recipe(load_config(write_recipe(settings)), recorder, finish)
    assert result.trials[1].status == "failed" and result.trials[2].status == "finished"
    said = [line for line in warned if line.startswith("trial")]
    assert said == ["trial-0001 failed: no memory left"]
    text = (tmp_path / "outputs/tiny/search/report.md").read_text()
    assert "- trial 1: no memory left" in text


@pytest.mark.usefixtures("in_this_process")
def test_trials_that_disagree_on_the_teacher_get_their_own(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["search"] |= {
        "space": {"finetune.num_epochs": {"choice": [1, 3]}},
        "algorithm": "grid",
        "scheduler": "none",
        "rungs": 1,
        "baseline": False,
    }
    config = load_config(write_recipe(settings))
    recorder = Recorder()
    result = search_recipe(config, recorder, finish)
    assert recorder.ran == ["finetune-teacher", "score-importance"] * 2
    assert len(result.teachers) == 2 and len(result.trials) == 2
    assert len(list((tmp_path / "outputs/tiny/search/shared").iterdir())) == 2


@pytest.mark.usefixtures("in_this_process")
def test_a_time_budget_ends_the_sweep_and_leaves_the_rest(
    write_recipe: Write, settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(settings), ["search.time_budget_s=1e-6"])
    result = search_recipe(config, Recorder(), finish)
    assert len(result.trials) <= 1
    rest = load_config(write_recipe(settings), ["search.worker_budget_s=1e-6"])
    assert len(search_recipe(rest, Recorder(), finish).trials) <= 2


@pytest.mark.usefixtures("in_this_process")
def test_the_best_is_confirmed_with_other_seeds(
    write_recipe: Write, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipelines.search import confirming

    monkeypatch.setattr(confirming, "run_sweep", sweeping.run_sweep)
    settings["search"] |= {"scheduler": "none", "rungs": 1, "num_trials": 1, "confirm_seeds": 2}
    # With the recipe's own rate nothing is learned, so the trial cannot be worse.
    settings["train"]["learning_rate"] = 1e-12
    settings["finetune"] = {"learning_rate": 1e-3}
    settings["search"]["space"] = {"train.learning_rate": {"choice": [1e-2]}}
    settings["search"]["metric"] = "flops"
    settings["search"]["baseline"] = False
    result = search_recipe(load_config(write_recipe(settings)), Recorder(), finish)
    assert result.confirmed is not None
    assert len(result.confirmed.best_values) == len(result.confirmed.baseline_values) == 2
    assert result.confirmed.difference == 0.0
    report = json.loads((tmp_path / "outputs/tiny/search/report.json").read_text())
    assert report["confirmed"]["best"] == 1
    again = search_recipe(load_config(write_recipe(settings)), Recorder(), finish)
    assert again.confirmed == result.confirmed


@pytest.mark.usefixtures("in_this_process")
def test_withheld_rows_choose_and_the_dev_rows_confirm(
    write_recipe: Write, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moe_dist.data.sources import load_splits
    from moe_dist.jobs.job import row_arguments
    from moe_dist.jobs.results import load_predictions
    from pipelines.chain.chain import run_chain
    from pipelines.search import confirming

    monkeypatch.setattr(confirming, "run_sweep", sweeping.run_sweep)
    settings["data"]["holdout_samples"] = 12
    settings["train"]["learning_rate"] = 1e-12
    settings["finetune"] = {"learning_rate": 1e-3}
    settings["search"] |= {"num_trials": 1, "scheduler": "none", "rungs": 1, "confirm_seeds": 2}
    settings["search"]["space"] = {"moe.num_experts": {"choice": [1]}}
    # One expert is cheaper, whatever it has learned, so the trial is the best.
    settings["search"]["metric"] = "parameters"
    config = load_config(write_recipe(settings))
    result = search_recipe(config, Recorder(), finish)
    splits = load_splits(**row_arguments(config.data, config.seed))
    assert splits.holdout is not None

    directory = tmp_path / "outputs/tiny/search"
    chosen = load_predictions(directory / "trials/trial-0001/distill/predictions.npz")
    assert chosen.sample_ids.tolist() == splits.holdout["sample_id"][:]
    confirmed = [
        load_predictions(
            directory / f"confirm/trial-0001/trial-000{number}/distill/predictions.npz"
        )
        for number in range(4)
    ]
    assert all(one.sample_ids.tolist() == splits.dev["sample_id"][:] for one in confirmed)
    quality = result.trials[1].metrics["quality"]
    teacher = result.teachers["own"]
    assert quality == (chosen.logits.argmax(1) == chosen.labels).mean()
    assert teacher.holdout_quality is not None
    assert result.trials[1].metrics["retention"] == pytest.approx(quality / teacher.holdout_quality)

    report = json.loads((directory / "report.json").read_text())
    assert report["chosen_on"] == "holdout"
    assert report["confirmed"]["on_examples"]["num_examples"] == 16
    assert report["confirmed"]["num_asked"] == 1
    text = (directory / "report.md").read_text()
    assert "On the rows withheld from training" in text
    assert "Over 16 dev rows and the seeds together" in text
    assert "The dev rows had no part in the choice" in text
    again = Recorder()
    run_chain(load_config(directory / "best.yaml"), again, until="distill")
    assert again.skipped == ["finetune-teacher", "score-importance"]


@pytest.mark.usefixtures("in_this_process")
def test_without_other_seeds_the_dev_rows_judge_nothing(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["data"]["holdout_samples"] = 12
    settings["search"] |= {"num_trials": 1, "scheduler": "none", "rungs": 1}
    search_recipe(load_config(write_recipe(settings)), Recorder(), finish)
    text = (tmp_path / "outputs/tiny/search/report.md").read_text()
    assert "The dev rows judged no trial" in text


def test_a_margin_is_compared_with_the_noise_of_seeds() -> None:
    from pipelines.search.confirming import judge

    def trials(*values: float) -> dict[int, Trial]:
        return {
            number: Trial(number, status="finished", reports=[Report(1, 1, {"quality": value})])
            for number, value in enumerate(values)
        }

    clear = judge("quality", 7, trials(0.90, 0.80, 0.91, 0.80, 0.90, 0.81))
    assert clear is not None and clear.low > 0
    assert "more than the noise of seeds" in str(clear) and "trial 7" in str(clear)
    noise = judge("quality", 7, trials(0.90, 0.80, 0.80, 0.90, 0.85, 0.85))
    assert noise is not None and noise.low < 0 < noise.high
    assert "cannot be told" in str(noise)
    assert judge("quality", 7, trials(0.9, 0.8)) is None


@pytest.mark.parametrize(
    ("parallel", "space", "at_a_time"),
    [
        ({}, {}, 4),
        ({"cpus_per_worker": 2}, {}, 2),
        ({}, {"parallel.cpus_per_worker": {"choice": ["auto", 4]}}, 1),
        ({"num_workers": 2}, {}, 2),
    ],
)
def test_a_trials_worker_has_one_cpu_unless_the_recipe_says_more(
    write_recipe: Write,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, Any],
    space: dict[str, Any],
    at_a_time: int,
) -> None:
    node = Node("id", "10.0.0.1", "", 4, 0, 8.0, 4, 0)
    monkeypatch.setattr(sweeping, "read_capacity", lambda: Capacity((node,)))
    settings["search"]["space"] = SPACE | space
    config = load_config(write_recipe(settings | {"parallel": parallel}))
    dimensions, _ = parse_space(config.search.space)
    assert sweeping._find_room(config, dimensions, Mock()).num_concurrent == at_a_time


@pytest.mark.parametrize(("cpus_per_worker", "num_threads"), [("auto", 1), (3, 3)])
def test_a_trial_has_as_many_threads_as_cpus(
    write_recipe: Write,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cpus_per_worker: int | str,
    num_threads: int,
) -> None:
    class Begun(Exception):
        pass

    threads = Mock(side_effect=Begun)
    monkeypatch.setattr("torch.set_num_threads", threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    settings["parallel"] = {"cpus_per_worker": cpus_per_worker}
    runner = TrialRunner(load_config(write_recipe(settings)), "", (1,), {})
    task = {"number": 0, "overrides": {}, "teacher": "own", "in_place": True, "is_ruled": True}
    with pytest.raises(Begun):
        runner(task, Mock())
    threads.assert_called_once_with(num_threads)
