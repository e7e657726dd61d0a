"""The page that compares runs, from directories of runs and from numbers alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.errors import MissingInputError
from moe_dist.metric_log import MetricLog
from pipelines.report.page import cost_figures, render_page
from pipelines.report.run_summary import RunView, read_directory
from pipelines.report.selection import select_runs

NO_STORE = "sqlite:////nowhere/mlflow.db"


def model(accuracy: float, flops: float) -> dict[str, Any]:
    return {
        "metrics": {"accuracy": accuracy},
        "parameters": {"total": 2e7, "active": 1e7},
        "flops_per_token": flops,
        "latency_ms": {"1": flops / 1e6, "32": flops / 1e5},
    }


def write_run(root: Path, name: str, *, router: str = "hash_random", accuracy: float = 0.9) -> Path:
    directory = root / name
    (directory / "evaluate").mkdir(parents=True)
    recipe = {
        "name": name,
        "compare": {"dense": {}},
        "moe": {"router": router, "num_experts": 2, "layers": None},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = {
        "main_metric": "accuracy",
        "teacher": model(0.92, 2e7),
        "student": model(accuracy, 1e7) | {"retention": accuracy / 0.92},
        "dense": model(0.85, 1e7) | {"retention": 0.85 / 0.92},
        "comparisons": ["dense"],
        "differences": {
            "teacher": {"metric": "accuracy", "low": accuracy - 0.94, "high": accuracy - 0.90}
        },
        "seconds": {"distill": 12.0},
    }
    (directory / "report.json").write_text(json.dumps(report))
    loads = {"student": {"bert.encoder.layer.0": [0.75, 0.25], "bert.encoder.layer.1": [0.5, 0.5]}}
    (directory / "evaluate/stage.json").write_text(json.dumps({"details": {"expert_loads": loads}}))
    log = MetricLog(directory / "distill/metrics.jsonl")
    for step in range(1, 300):
        log.append(step, {"train/loss/total": 1.0 / step, "moe/load_imbalance/x": 1.5})
    log.append(299, {"dev/accuracy": accuracy})
    return directory


class Outside(HTMLParser):
    """Collects what a page would load, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink")]
        if tag not in ("meta", "br", "line", "circle", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag in self.open:
            while self.open.pop() != tag:
                pass


def test_a_directory_tells_what_the_run_did(tmp_path: Path) -> None:
    view = read_directory(write_run(tmp_path, "one", accuracy=0.9))
    assert view.status == "FINISHED" and view.main_metric == "accuracy" and view.quality == 0.9
    assert view.params["moe.router"] == "hash_random" and view.params["moe.layers"] == "null"
    assert "name" not in view.params
    student, dense = view.models
    assert (student.label, dense.label) == ("", "dense")
    assert student.interval == pytest.approx((1 - 0.04 / 0.92, 1.0)) and dense.interval is None
    steps, values = view.curves[""]["train/loss/total"]
    assert steps[-1] == 299 and values[0] == 1.0
    assert view.curves[""]["moe/load_imbalance_worst"][1][0] == 1.5


def test_a_run_that_is_not_finished_can_be_compared(tmp_path: Path) -> None:
    whole = write_run(tmp_path, "whole")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.yaml").write_text("name: begun\nmoe: {router: token_gate}\n")
    page = render_page(select_runs([str(begun), str(whole)], uri=NO_STORE))
    assert "unfinished" in page and "begun" in page


def test_the_page_loads_nothing_and_shows_differences_first(tmp_path: Path) -> None:
    places = [
        write_run(tmp_path, "gate<b>", router="token_gate", accuracy=0.91),
        write_run(tmp_path, "hash", accuracy=0.88),
    ]
    page = render_page(select_runs([str(place) for place in places], uri=NO_STORE), "A & B")
    parsed = Outside()
    parsed.feed(page)
    assert parsed.links == [] and parsed.open == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert "gate&lt;b&gt;" in page and "gate<b>" not in page and "A &amp; B" in page
    assert page.index("moe.router") < page.index("What came out")
    for part in ("Retention", "Quality against cost", "Learning curves", "Load of the experts"):
        assert f"<h2>{part}</h2>" in page
    assert "0.9891" in page  # retention of the better run
    assert "gate&lt;b&gt; has the highest accuracy: 0.9100" in page
    assert "no other run reaches its interval, which begins at 0.8900" in page
    assert 'name="viewport"' in page


def as_language_model(directory: Path, perplexity: float) -> Path:
    """Turn a run into one that is measured by perplexity, its teacher's being 20."""
    path = directory / "report.json"
    report = json.loads(path.read_text())
    report |= {"main_metric": "perplexity", "higher_is_better": False}
    for name, value in (("teacher", 20.0), ("student", perplexity), ("dense", 50.0)):
        report[name]["metrics"] = {"perplexity": value}
        report[name]["retention"] = 20.0 / value
    low, high = perplexity - 22.0, perplexity - 18.0
    report["differences"] = {"teacher": {"metric": "perplexity", "low": low, "high": high}}
    path.write_text(json.dumps(report))
    return directory


def test_of_perplexities_the_lowest_is_best(tmp_path: Path) -> None:
    places = [
        as_language_model(write_run(tmp_path, "worse"), 29.0),
        as_language_model(write_run(tmp_path, "better"), 25.0),
    ]
    views = select_runs([str(place) for place in places], uri=NO_STORE)
    better = next(view for view in views if view.name == "better")
    assert not better.higher_is_better
    # The difference to the teacher lies in 3 to 7.
    assert better.models[0].interval == pytest.approx((20 / 27, 20 / 23))
    page = render_page(views)
    assert "better has the lowest perplexity: 25.0000, retention 0.800" in page
    assert "no other run reaches its interval, which ends at 27.0000" in page
    assert "perplexity (lower is better)" in page
    assert page.index(">better<") < page.index(">worse<")
    near = as_language_model(write_run(tmp_path, "near"), 26.5)
    page = render_page(select_runs([*map(str, places), str(near)], uri=NO_STORE))
    assert "another run reaches its interval, which ends at 27.0000: no clear winner" in page


def test_runs_of_opposite_directions_have_charts_of_their_own(tmp_path: Path) -> None:
    places = [
        as_language_model(write_run(tmp_path, "text"), 25.0),
        write_run(tmp_path, "classes"),
    ]
    views = select_runs([str(place) for place in places], uri=NO_STORE)
    titles = [figure.title for figure in cost_figures(views, {})]
    assert titles[:2] == ["FLOPs per token", "FLOPs per token (lower is better)"]
    assert "measured by different metrics" in render_page(views)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = [write_run(tmp_path / side, "same") for side in ("left", "right")]
    views = select_runs([str(place) for place in places], uri=NO_STORE)
    assert len({view.name for view in views}) == 2
    assert "All settings are the same" in render_page(views)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no recipe\.yaml"):
        select_runs([str(tmp_path)], uri=NO_STORE)


def test_a_hundred_runs_of_many_experts_stay_small() -> None:
    layers = {f"encoder.layer.{index}": [1 / 32] * 32 for index in range(24)}
    curve = (list(range(1000)), [1.0 / (step + 1) for step in range(1000)])
    views = [
        RunView(
            name=f"run-{number}",
            source=str(number),
            status="FINISHED",
            params={"seed": str(number)},
            curves={"": {f"train/loss/{name}": curve for name in "abcdef"}},
            loads={"student": layers},
        )
        for number in range(100)
    ]
    assert len(render_page(views).encode()) < 5e6
