"""What of a sweep is known before it starts: rungs, budgets, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.config.search_space import parse_space
from moe_dist.data.metrics import METRICS
from moe_dist.errors import ConfigError
from moe_dist.search.proposers import build_proposer
from moe_dist.search.trials import TrialLog
from moe_dist.tracking import NullTracker
from pipelines.chain.files import ResultFiles
from pipelines.search import sweep as sweeping
from pipelines.search.rungs import rung_steps, rung_times
from pipelines.search.sweep import search_recipe
from pipelines.search.trial import TeacherFacts, _OneTrial
from pipelines.search.trial_watch import Supervisor
from tests.inference.start_models import remove_tokenizer
from tests.pipelines.recorder import Recorder
from tests.pipelines.sweeps import finish, settings

__all__ = ["settings"]

Write = Callable[[dict[str, Any]], Path]


def test_a_search_for_the_wrong_direction_is_refused(
    write_recipe: Write, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    def refused(*overrides: str) -> str:
        chosen = [word for override in overrides for word in ("--set", override)]
        done = CliRunner().invoke(app, ["search", recipe, "--dry-run", *chosen])
        assert done.exit_code == 2
        return " ".join(done.output.split())

    recipe = str(write_recipe(settings))
    said = refused("search.mode=min")
    assert "search.mode: quality, here accuracy, is better the higher, and min is asked" in said
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], higher_is_better=False))
    said = refused("search.objectives={accuracy: max, flops: min}")
    assert "search.objectives: accuracy is better the lower, and max is asked for" in said


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


def test_a_search_without_a_space_is_refused(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConfigError, match=r"search\.space is missing"):
        search_recipe(config, Recorder(), finish)


def test_a_trial_s_last_rung_is_its_last_step_however_many_samples_a_row_makes(
    write_recipe: Write, settings: dict[str, Any]
) -> None:
    config = load_config(
        write_recipe(settings), ["train.batch_size=8", "train.num_epochs=3", "train.max_steps=null"]
    )
    asked: list[str] = []

    def batches(train: Any, *, seed: int, split: str) -> Any:
        asked.append(split)
        return SimpleNamespace(steps_per_epoch=1250)

    # One document of 10,000 blocks.
    data = SimpleNamespace(batches=batches, splits=SimpleNamespace(train=[0]))
    trial = _OneTrial(
        config,
        0,
        SimpleNamespace(data=data),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        (1, 3, 9),
        "dev",
        print,
    )
    assert trial._steps() == {417: 1, 1250: 3, 3750: 9}
    assert asked == ["distilled"]


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


def test_a_dry_run_refuses_what_the_search_would(
    write_recipe: Write, settings: Any, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli import app

    recipe = str(write_recipe(settings))
    teacher = Path(shutil.copytree(settings["model"]["teacher"], tmp_path / "model"))
    remove_tokenizer(teacher)
    (tmp_path / "bad.csv").write_text('text,label\n"never closed,1\n')
    for override, fault in (
        (f"data.train={tmp_path / 'bad.csv'}", "is never closed"),
        (f"model.teacher={teacher}", "no tokenizer in"),
    ):
        done = CliRunner().invoke(app, ["search", recipe, "--dry-run", "--set", override])
        assert done.exit_code == 2 and fault in " ".join(done.output.split())


def test_a_metric_that_no_trial_could_have_is_refused(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    dev = tmp_path / "dev.jsonl"
    rows = [line for line in dev.read_text().splitlines() if '"positive"' in line]
    dev.write_text("\n".join(rows) + "\n")
    settings["data"]["metrics"] = ["matthews", "accuracy"]
    with pytest.raises(ConfigError, match="matthews is undefined on the dev rows"):
        search_recipe(load_config(write_recipe(settings)), Recorder(), finish)


@pytest.mark.parametrize("quality", [-0.1, 0.0, float("nan")])
def test_a_share_of_what_a_teacher_does_not_have_is_refused(
    write_recipe: Write, settings: dict[str, Any], quality: float
) -> None:
    settings["search"]["metric"] = "retention"
    config = load_config(write_recipe(settings))
    with pytest.raises(ConfigError, match="retention is undefined"):
        sweeping.check_retention(config, {"own": TeacherFacts("", "", quality)})
    sweeping.check_retention(config, {"own": TeacherFacts("", "", 0.5)})
