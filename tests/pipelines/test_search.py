"""A sweep without Ray: what is shared, resumed, failed and reported; Ray's part is in tests/ray."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from moe_dist.config import load_config
from moe_dist.config.search_space import parse_space
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.search.objectives import parse_goals
from moe_dist.search.proposers import build_proposer
from moe_dist.search.trials import Report, Trial, TrialLog, rank_trials
from moe_dist.tracking import NullTracker
from moe_dist.training.placement import Placement, WorkerNeed
from moe_dist.training.search import TrialRoom
from pipelines.files import ResultFiles
from pipelines.search import sweep as sweeping
from pipelines.search.frontier import answer_goal, describe_student, goal_config
from pipelines.search.results import write_results
from pipelines.search.rungs import rung_steps, rung_times
from pipelines.search.sweep import SweepResult, search_recipe
from pipelines.search.trial import TrialRunner
from pipelines.search.watching import Supervisor
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
SPACE = {
    "moe.router": {"from": "routers"},
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
}


class Ended(BaseException):
    """A trial that is stopped where it reports, as Tune does it."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run trials one after the other; the last measured stands for an early stop of odd ones."""

    def run_sweep(
        run_trial: Any,
        watcher: Any,
        ruling: Any,
        room: Any,
        session: Any,
        *,
        num_trials: int,
        past: Iterable[Trial] = (),
    ) -> None:
        while (task := watcher.next_task()) is not None and not watcher.is_time_up():
            number = task["number"]
            watcher.started(number)
            begin = time.monotonic()

            def say(report: Any, number: int = number, begin: float = begin) -> None:
                told = Report(report["rung"], report["step"], dict(report["metrics"]))
                watcher.reported(number, told, report["num_steps"], time.monotonic() - begin)
                if number % 2 and report["rung"] < ruling.last_rung:
                    raise Ended

            try:
                run_trial(json.loads(json.dumps(task)), say)
            except Ended:
                watcher.ended(number)
            except Exception as fault:
                watcher.ended(number, str(fault))
            else:
                watcher.ended(number)

    room = TrialRoom(Placement(1, 1, WorkerNeed(1)), 1, in_place=True)
    monkeypatch.setattr(sweeping, "run_sweep", run_sweep)
    monkeypatch.setattr(sweeping, "_find_room", lambda *_: room)


def finish(result: SweepResult, run: Any) -> int | None:
    summary = write_results(result, run)
    return None if summary["best"] is None else summary["best"]["trial"]


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    tiny_settings["train"] |= {"num_epochs": 2}
    tiny_settings["search"] = {"num_trials": 3, "space": SPACE, "algorithm": "random"}
    return tiny_settings


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_shares_its_teacher_and_leaves_a_recipe(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from pyarrow import parquet

    from pipelines.chain import run_chain

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
    (said,) = recorder.warned
    assert "no further point for search.num_trials=9: 2 fit; 2 others" in said
    enough = Recorder()
    search_recipe(load_config(write_recipe(settings), ["search.num_trials=2"]), enough, finish)
    assert enough.warned == []


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
    assert warned == ["trial-0001 failed: no memory left"]
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


@pytest.mark.parametrize(("budget", "goes_on"), [(29, False), (31, True)])
def test_a_budget_counts_the_workers_of_each_trial(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path, budget: int, goes_on: bool
) -> None:
    settings["parallel"] = {}
    space = {"parallel.num_workers": {"choice": [1, 2]}, "moe.top_k": {"choice": [1, 2]}}
    settings["search"] |= {"space": space, "worker_budget_s": budget}
    config = load_config(write_recipe(settings))
    log = TrialLog(tmp_path / "trials.jsonl")
    for number, workers in ((0, 1), (1, 2)):
        log.started(number, {}, {"parallel.num_workers": workers})
        log.ended(number, "finished", 10.0)
    dimensions, _ = parse_space(config.search.space)
    supervisor = Supervisor(
        config,
        tmp_path,
        log,
        build_proposer(dimensions, config),
        NullTracker().chain("tiny", tmp_path, params={}),
        Recorder(),
        ResultFiles(tmp_path),
    )
    assert (supervisor.next_task() is not None) == goes_on


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
    from moe_dist.training.results import load_predictions
    from pipelines.chain import run_chain
    from pipelines.payloads import data_arguments
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
    splits = load_splits(**data_arguments(config))
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


def test_a_search_without_a_space_is_refused(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConfigError, match=r"search\.space is missing"):
        search_recipe(config, Recorder(), finish)


def test_rungs_follow_the_scheduler(write_recipe: Write, settings: dict[str, Any]) -> None:
    halving = load_config(write_recipe(settings)).search
    assert rung_times(halving) == (1, 3, 9)
    assert rung_steps((1, 3, 9), 90) == {10: 1, 30: 3, 90: 9}
    assert rung_steps((1, 3, 9), 2) == {1: 3, 2: 9}
    even = load_config(write_recipe(settings), ["search.scheduler=median"]).search
    assert rung_times(even) == (1, 2, 3)


def test_a_dry_run_asks_the_data_for_the_metric(write_recipe: Write, settings: Any) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    recipe = str(write_recipe(settings))
    wanted = ["search", recipe, "--dry-run", "--set", "search.metric=f1"]
    done = CliRunner().invoke(app, wanted)
    assert done.exit_code == 2 and "f1 is no metric of these data" in done.output
    done = CliRunner().invoke(app, [*wanted, "--set", "data.train=elsewhere.jsonl"])
    assert done.exit_code == 0 and "not known: whether the data have" in done.output


# Goals


def tried(number: int, retention: float, flops: float, **overrides: Any) -> Trial:
    metrics = {"quality": retention, "retention": retention, "flops": flops}
    return Trial(number, overrides, overrides, "finished", [Report(1, 1, metrics)], 1)


def sweep_of(*trials: Trial) -> Any:
    return SweepResult(None, Path(), {trial.number: trial for trial in trials}, 0.0, {})  # type: ignore[arg-type]


def test_the_cheapest_that_keeps_the_goal_is_named() -> None:
    result = sweep_of(
        tried(0, 1.0, 9.0),
        tried(1, 0.97, 3.0),
        tried(2, 0.995, 5.0, **{"moe.num_experts": 1}),
        tried(3, 0.991, 6.0),
    )
    answer = answer_goal(result, parse_goals("retention>=0.99"), "flops")
    assert answer.is_met and answer.num_meeting == 3 and answer.trial is result.trials[2]
    assert "The cheapest of 3 models (of 4)" in answer.lines[0]
    assert "the pruned dense student" in answer.lines[1]
    remeasured = answer_goal(result, parse_goals("retention>=0.99"), "flops", {2: 8.0, 3: 7.0})
    assert remeasured.trial is result.trials[3]


def test_no_model_that_keeps_the_goal_is_said() -> None:
    result = sweep_of(tried(1, 0.97, 3.0), tried(2, 0.98, 5.0))
    answer = answer_goal(result, parse_goals("retention>=0.99"), "flops")
    assert not answer.is_met and answer.trial is result.trials[2]
    assert answer.lines[0] == "None of 2 models meets retention >= 0.99."
    assert "closest is trial 2 with retention 0.9800" in answer.lines[1]


def test_the_frontier_holds_dense_and_moe_students_of_the_tables(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from moe_dist.config.search_space import table_values

    tiny_settings["distill"] = {"load_balancing_weight": 0.01}
    tiny_settings["moe"]["router"] = "token_gate"
    config = load_config(write_recipe(tiny_settings))
    goal = goal_config(config, parse_goals("retention>=0.99"), "latency", Recorder())
    space = goal.search.space
    assert space["moe.num_experts"]["choice"][0] == 1
    assert space["moe.expert_size"]["choice"] == [4, 8, 16, 24]
    assert set(space["moe.router"]["choice"]) <= set(table_values("routers"))
    assert {"hash_random", "token_gate"} <= set(space["moe.router"]["choice"])
    assert "importance" in space["moe.partition"]["choice"]
    assert space["distill.load_balancing_weight"]["otherwise"] == 0.0
    assert goal.search.wanted == {"retention": "max", "latency": "min"}
    assert goal.search.chosen_scheduler == "none"
    assert describe_student(Trial(0)) == "the recipe as it stands"


@pytest.mark.usefixtures("in_this_process")
def test_a_goal_is_answered_with_a_recipe(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    del settings["search"]["space"]
    settings["search"] |= {"num_trials": 2, "rungs": 1}
    recipe = str(write_recipe(settings))
    goal = ["--goal", "quality>=0", "--minimize", "latency"]
    done = CliRunner().invoke(app, ["search", recipe, "--quiet", *goal])
    assert done.exit_code == 0, done.output
    assert "The cheapest of" in done.output
    best = yaml.safe_load((tmp_path / "outputs/tiny/search/best.yaml").read_text())
    assert "search" not in best
    other = ["--set", "name=other", "--goal", "quality>1", "--minimize", "flops"]
    none = CliRunner().invoke(app, ["search", recipe, "--quiet", *other])
    assert none.exit_code == 1 and "None of" in none.output


@pytest.mark.usefixtures("in_this_process")
def test_a_search_tells_programs_by_json_lines(
    write_recipe: Write, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.search.commands import search

    settings["search"] |= {"num_trials": 2, "rungs": 2}
    search(write_recipe(settings), as_json=True)
    *before, last = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert last["event"] == "report" and last["report"]["trials"]["all"] == 3
    assert Path(last["path"]).name == "report.json"
    told = [event for event in before if event["event"] == "trials"]
    assert told[0] == {"event": "trials", "over": 0, "total": 3, "figures": {}, "running": {}}
    assert {"trial-0001 rung 1/2"} <= {name for event in told for name in event["running"]}
    assert told[-1]["over"] == 3 and "best quality" in told[-1]["figures"]
    with pytest.raises(typer.Exit):
        search(write_recipe(settings), goal="nonsense", as_json=True)
    (fault,) = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert fault["event"] == "error" and "nonsense" in fault["message"]
    # Whoever warns later must not write to what is closed.
    assert not logging.getLogger("moe_dist").handlers


@pytest.mark.usefixtures("in_this_process")
def test_other_seeds_confirm_the_answer_to_a_goal(
    write_recipe: Write, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app
    from pipelines.search import confirming

    monkeypatch.setattr(confirming, "run_sweep", sweeping.run_sweep)
    settings["data"]["holdout_samples"] = 12
    settings["search"] |= {"num_trials": 1, "rungs": 1, "confirm_seeds": 2}
    settings["search"]["space"] = {"moe.num_experts": {"choice": [1]}}
    goal = ["--goal", "quality>=0, flops<1e12", "--minimize", "parameters"]
    done = CliRunner().invoke(app, ["search", str(write_recipe(settings)), "--quiet", *goal])
    assert done.exit_code == 0, done.output
    directory = tmp_path / "outputs/tiny/search"
    report = json.loads((directory / "report.json").read_text())
    assert report["objectives"] == {"quality": "max", "parameters": "min", "flops": "min"}
    assert report["goal"]["is_met"] and report["confirmed"]["best"] == report["best"]["trial"] == 1
    said = "With other seeds and on the dev rows its quality is"
    assert said in " ".join(done.output.split()) and said in (directory / "report.md").read_text()
    assert "The cheapest of" in (directory / "report.md").read_text()


def test_what_a_goal_lacks_is_said_before_anything_runs(
    write_recipe: Write, settings: dict[str, Any], in_this_process: None
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    recipe = str(write_recipe(settings))
    for options, said in (
        (["--minimize", "flops"], "needs a --goal"),
        (["--goal", "f1>=0.9"], "f1 is no metric of these data, which have accuracy"),
        (["--goal", "quality>=0.9", "--minimize", "quality"], "quality"),
    ):
        done = CliRunner().invoke(app, ["search", recipe, "--quiet", *options])
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output


# Pictures


def test_the_curve_of_the_best_is_that_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.search import pictures

    drawn: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        drawn.extend(figure.axes[0].get_legend_handles_labels()[1])
        return path

    monkeypatch.setattr(pictures, "save_figure", keep)
    # The fewest FLOPs are the best, of equal ones those of the earlier trial.
    trials = [tried(0, 1.0, 9.0), tried(1, 1.0, 3.0), tried(2, 1.0, 3.0), tried(3, 1.0, 8.0)]
    best = rank_trials(trials, "flops", "min")[0]
    pictures.plot_curves(trials, "flops", tmp_path / "curves.png", best=best.number)
    assert drawn == ["the recipe as it stands", "trial 1, the best"]
