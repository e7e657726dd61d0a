"""Runs that nobody here made: odd names, other programs' documents, no numbers, deleted places."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moe_dist.errors import MissingInputError, TrackingError
from moe_dist.tracking import RunReader, build_tracker
from pipelines.cli import app
from pipelines.report.documents import clean_loads, clean_report, number, shown
from pipelines.report.listing import Listing, comparison_tables, list_runs, list_tables
from pipelines.report.page import render_page
from pipelines.report.run_summary import RunView
from pipelines.report.selection import select_runs
from pipelines.report.svg import heat_map, line_chart, scatter, spans

mlflow = pytest.importorskip("mlflow")
NAMES = (
    '"><img src=x onerror=alert(1)>',
    "</title></svg><script>alert(2)</script>",
    "[/bold] [red]markup[/red] [link=http://x]y[/link]",
    'it\'s "both" \\ 100 %',
    "日本語の実験、とても長い名前のひとつの実行結果その一二三四五",
    "\x1b[2J\x1b]0;owned\x07 bell",
    "{{ 7 * 7 }} {% raw %} ${HOME} $(id)",
    "x" * 200,
)


class Elements(HTMLParser):
    """Collects tags and attributes that could run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with runs of those names, of which some hold documents of other programs."""
    root = tmp_path_factory.mktemp("hostile")
    uri = f"sqlite:///{root}/mlflow.db"
    tracker = build_tracker(uri, experiment="hostile")
    documents: list[Any] = [
        {"name": "another program's"},
        {"main_metric": "accuracy", "student": {"metrics": {"accuracy": "<b>high</b>"}}},
        {"main_metric": "<i>", "student": {"metrics": {"<i>": 0.5}, "retention": math.inf}},
        [1, 2],
    ]
    for index, name in enumerate(NAMES):
        directory = root / f"run-{index}"
        with tracker.chain(name, directory, params={f"setting {index}": name}) as chain:
            with chain.stage("distill", directory / "distill") as stage:
                for step, loss in enumerate((1.0, math.nan, math.inf, -1e299, 0.5)):
                    stage.log_metrics(step, {"train/loss/total": loss, "dev/accuracy": 0.5})
            if index < len(documents):
                (directory / "report.json").write_text(json.dumps(documents[index]))
                chain.log_artifact(directory / "report.json")
            chain.set_tags({"router": "[/]", "partition": "\x07"})
    return uri


def rendered(*tables: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=4000, force_terminal=False)
    for table in tables:
        console.print(table)
    return stream.getvalue()


def test_nothing_of_a_name_is_obeyed_on_the_page(uri: str) -> None:
    # MLflow takes no such names of settings and metrics, but a directory may hold them.
    loads = {"<s>": {"<b>": [0.5, 0.5]}}
    curves = {"": {"train/loss/<s>": ([1, 2], [1.0, 0.5])}}
    odd = RunView("<u>", "", "<b>", {"<u>": "<i>"}, curves=curves, loads=loads)
    page = render_page([odd, *select_runs(NAMES, uri=uri)], "<h6>" + NAMES[1])
    parsed = Elements()
    parsed.feed(page)
    assert parsed.handlers == [] and parsed.tags.count("script") == 1
    assert not {"img", "h6", "s", "u", "b"} & set(parsed.tags)
    assert "loss: &lt;s&gt;" in page and "script-src 'sha256-" in page
    assert "{{ 7 * 7 }}" in page and "\x1b" not in page and "\x07" not in page
    assert "日本語" in page


def test_nothing_of_a_name_is_obeyed_in_the_terminal(uri: str) -> None:
    listing = Listing(everything=True, columns=("setting 2",))
    text = rendered(*list_tables(list_runs(uri, "", listing), listing))
    assert "[/bold] [red]markup[/red]" in text and "\x1b" not in text and "\x07" not in text
    text = rendered(*comparison_tables(select_runs(NAMES, uri=uri)))
    assert "[/bold] [red]markup[/red]" in text and "\x1b" not in text


def test_every_name_is_found_alone(uri: str) -> None:
    reader = RunReader(uri)
    for name in NAMES:
        assert reader.find([name])[name].name == name
    for name in ("%", "_", "' or 1=1 --", "", "x" * 5000, "\x00"):
        assert reader.find([name]) == {}


def test_runs_of_unusable_reports_have_no_results(uri: str) -> None:
    (view,) = select_runs([NAMES[0]], uri=uri)
    assert view.models == ()
    (view,) = select_runs([NAMES[1]], uri=uri)
    assert view.quality is None and view.main_metric == "accuracy"
    (view,) = select_runs([NAMES[2]], uri=uri)
    assert view.quality == 0.5 and view.models[0].retention is None
    assert render_page([view])


def test_documents_of_other_forms_are_left_out() -> None:
    bad: list[Any] = [None, 1, "x", [], {"student": {}}, {"main_metric": "a", "student": [1]}]
    for content in bad:
        assert clean_report(content if isinstance(content, dict) else {"student": content}) == {}
        assert clean_loads({"details": content}) == {}
    odd = {
        "main_metric": "a",
        "student": {"latency_ms": None, "parameters": [1], "flops_per_token": "many"},
        "comparisons": ["missing", 3, "seconds", "dense"],
        "dense": {"metrics": {"a": 1}},
        "seconds": {"distill": 1, "x": "y"},
        "differences": {"teacher": {"low": 0}, "dense": 5},
    }
    clean = clean_report(odd)
    assert clean["student"] == {"latency_ms": {}, "parameters": {}, "flops_per_token": None}
    assert clean["differences"] == {} and clean["seconds"] == {"distill": 1.0}
    assert clean["dense"] == {"metrics": {"a": 1.0}}
    loads = {"student": {"0": [0.5, 0.5], "1": [0.5, None], "2": "x", "3": [-1, 2]}, "x": 3}
    assert clean_loads({"details": {"expert_loads": loads}}) == {"student": {"0": [0.5, 0.5]}}


def test_what_is_no_finite_number_is_none() -> None:
    odd: list[Any] = [None, "1", True, math.nan, math.inf, 1.79e308, 10**400]
    assert [number(value) for value in odd] == [None] * len(odd)
    assert number(3) == 3.0


def test_a_report_of_runs_without_anything(tmp_path: Path) -> None:
    views = [RunView(name, name, "RUNNING", {}) for name in ("a", "b")]
    assert "None of these runs has been evaluated" in render_page(views)
    assert rendered(*comparison_tables(views))


def test_charts_bear_the_extremes() -> None:
    from pipelines.report.svg import Dot, Line, Span

    for low, high in ((-1e299, 1e299), (0.0, 0.0), (5e-324, 1e-323), (1e16, 1e16 + 2)):
        for chart in (
            line_chart([Line("a", [0, 10**18], [low, high])], x_label="step"),
            scatter([Dot("a", low, low), Dot("b", high, high)], x_label="x", higher_is_better=True),
            spans([Span("a", low, low, high)], reference=1.0),
        ):
            assert chart and "nan" not in chart and "inf" not in chart
    assert heat_map({"0": [0.0, 0.0]})


def test_odd_characters_are_replaced() -> None:
    assert shown("a\x1b[1mb\u202ec\ud800\nd") == "a\ufffd[1mb\ufffdc\ufffd\ufffdd"
    assert shown("שלום 👩‍🔬 é\n", kept="\n") == "שלום 👩‍🔬 é\n"


def test_deleted_experiments_say_so(uri: str, tmp_path: Path) -> None:
    with build_tracker(uri, experiment="gone").chain("lost", tmp_path / "lost", params={}) as run:
        pass
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match="'gone' is deleted"):
        RunReader(uri, "gone")
    for name in ("lost", str(run.run_id)):
        with pytest.raises(MissingInputError, match="no run is called"):
            select_runs([name], uri=uri)


def test_json_has_no_word_for_nan(uri: str) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    for names in ((), (NAMES[2],)):
        result = CliRunner().invoke(app, ["runs", *names, "--uri", uri, "--json", "--all"])
        assert result.exit_code == 0 and json.loads(result.output, parse_constant=refuse)


def test_a_key_that_no_run_has_is_named_with_its_neighbours(uri: str) -> None:
    with pytest.raises(MissingInputError) as caught:
        list_runs(uri, "", Listing(sort="dev/acuracy", everything=True))
    assert "dev/accuracy" in str(caught.value)


def test_a_sweeps_directory_stands_for_its_trials(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "outputs/x/search"
    with build_tracker(uri, experiment="swept").chain(
        "x search", directory, params={"a": 1}
    ) as sweep:
        for number_ in range(2):
            with sweep.stage(f"t{number_}", directory / f"t{number_}") as trial:
                trial.set_tags({"trial": str(number_)})
    monkeypatch.chdir(tmp_path / "outputs")
    found = select_runs(["x/search", str(directory), "x search"], uri=uri)
    assert [view.name for view in found] == ["t0", "t1"]
    assert [view.name for view in select_runs(["x/search/t1"], uri=uri)] == ["t1"]
    # A run may be called like a directory that has nothing to do with it.
    (tmp_path / "outputs/t0").mkdir()
    assert [view.name for view in select_runs(["t0"], uri=uri)] == ["t0"]
