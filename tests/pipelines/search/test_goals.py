"""The cheapest student that keeps a goal, and what a search tells programs and draws."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from moe_dist.config import load_config
from moe_dist.data.tasks import TASKS
from moe_dist.search.objectives import parse_goals
from moe_dist.search.trials import Report, Trial, rank_trials
from pipelines.search import sweep as sweeping
from pipelines.search.frontier import answer_goal, describe_student, goal_config
from pipelines.search.sweep import SweepResult
from tests.pipelines.recorder import Recorder
from tests.pipelines.sweeps import in_this_process, settings

__all__ = ["in_this_process", "settings"]

Write = Callable[[dict[str, Any]], Path]


def tried(number: int, retention: float, flops: float, **overrides: Any) -> Trial:
    metrics = {"quality": retention, "retention": retention, "flops": flops}
    return Trial(number, overrides, overrides, "finished", [Report(1, 1, metrics)], 1)


def sweep_of(*trials: Trial) -> Any:
    by_number = {trial.number: trial for trial in trials}
    return SweepResult(None, Path(), by_number, 0.0, {}, TASKS["sst2"])  # type: ignore[arg-type]


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


@pytest.mark.parametrize("combine", ["auto", "merge"])
def test_the_frontier_of_a_merged_recipe_is_merged(
    write_recipe: Write, tiny_settings: dict[str, Any], combine: str
) -> None:
    from moe_dist.config.search_space import table_values

    tiny_settings["distill"] = {"load_balancing_weight": 0.1}
    tiny_settings["moe"] |= {"router": "merged_sequence", "top_k": 2, "combine": combine}
    config = load_config(write_recipe(tiny_settings))
    space = goal_config(config, parse_goals("retention>=0.99"), "latency", Recorder()).search.space
    assert set(space["moe.router"]["choice"]) == set(table_values("merged_routers"))
    assert space["moe.num_experts"]["choice"][0] == 1


def test_a_goal_leaves_the_direction_of_quality_to_the_data(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(tiny_settings))
    for text in ("quality<=40", "flops<=1e6"):
        goal = goal_config(config, parse_goals(text), "latency", Recorder())
        assert goal.search.directed(higher_is_better=False).wanted["quality"] == "min"
        assert goal.search.directed(higher_is_better=True).wanted["quality"] == "max"
    named = goal_config(config, parse_goals("perplexity<=40"), "latency", Recorder())
    assert named.search.wanted == {"perplexity": "min", "latency": "min"}


def test_quality_is_bounded_from_the_side_that_the_recipe_tells(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    def said(goal: str) -> str:
        recipe = str(write_recipe(tiny_settings))
        done = CliRunner().invoke(app, ["search", recipe, "--dry-run", "--goal", goal])
        assert done.exit_code != 0
        return " ".join(done.output.split())

    wrong = "is better, as these data are measured; write quality"
    assert f"higher {wrong}>=0.9" in said("quality<=0.9")
    tiny_settings["data"] = {"source": "package", "name": "bbc-news", "kind": "causal_lm"}
    tiny_settings["distill"] = {"task_weight": 0}
    assert f"lower {wrong}<=40" in said("quality>=40")
    tiny_settings["data"] |= {"kind": "classification", "metrics": ["f1"]}
    assert f"higher {wrong}>1" in said("quality<1")


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
    from pipelines.commands.search import search

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


def test_the_curve_of_the_best_is_that_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.search import plots

    drawn: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        drawn.extend(figure.axes[0].get_legend_handles_labels()[1])
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    # The fewest FLOPs are the best, of equal ones those of the earlier trial.
    trials = [tried(0, 1.0, 9.0), tried(1, 1.0, 3.0), tried(2, 1.0, 3.0), tried(3, 1.0, 8.0)]
    best = rank_trials(trials, "flops", "min")[0]
    plots.plot_curves(trials, "flops", tmp_path / "curves.png", best=best.number)
    assert drawn == ["the recipe as it stands", "trial 1, the best"]


@pytest.mark.parametrize("narrow", [4e5, 4e2])
def test_costs_at_an_axis_have_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: float
) -> None:
    from pipelines.search import plots

    read: list[tuple[str, list[str]]] = []

    def keep(figure: Any, path: Path) -> Path:
        figure.canvas.draw()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            texts = [label.get_text() for label in axis.get_ticklabels()]
            read.append((axis.get_offset_text().get_text(), texts))
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    trials = [tried(n, 0.998 + n / 1e4, 11_065_000.0 + n * narrow) for n in range(3)]
    plots.plot_fronts(trials, "retention", ["flops"], tmp_path / "pareto.png")
    (x_offset, flops), (y_offset, retentions) = read
    assert x_offset == y_offset == ""
    assert all(text.endswith(" M") for text in flops) and len(set(flops)) == len(flops) >= 2
    assert all(text.startswith(("0.99", "1.0")) for text in retentions)
