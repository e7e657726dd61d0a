"""What people see in MLflow's pages, in a browser of this machine.

With MOE_DIST_SCREENSHOTS=DIRECTORY the pictures of `docs/img` are made anew.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moe_dist.tracking import StageNote, build_tracker
from pipelines.benchmarks.tracking_process import log_run
from pipelines.report.plots import plot_expert_load
from tests.tracking.servers import Server

pytest.importorskip("mlflow")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXPERIMENT, SWEEPS = "seen", "searched"
PATIENCE_MS = 120_000
SETTLING_MS = 1500
ASSISTANT_MS = 20_000
NUM_COLOURS = 256
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three finished runs, each with two stages."""
    root = tmp_path_factory.mktemp("seen")
    instance = Server(root)
    instance.start()
    tracker = build_tracker(instance.uri, experiment=EXPERIMENT)
    for number in range(3):
        log_run(tracker, root / f"run-{number}", number, 20)
    loads = {f"encoder.layer.{index}": [0.4, 0.3, 0.2, 0.1] for index in range(4)}
    with tracker.chain("with-plot", root / "with-plot", params={"moe.router": "x"}) as chain:
        picture = plot_expert_load(loads, root / "with-plot/expert-load.png")
        chain.log_artifact(picture, folder="plots")
        (root / "with-plot/report.md").write_text("# what came out")
        chain.log_artifact(root / "with-plot/report.md")
    log_sweep(instance, root / "search")
    yield instance
    instance.stop()


def log_sweep(server: Server, directory: Path) -> None:
    """A sweep of three trials, each with its stages."""
    tracker = build_tracker(server.uri, experiment=SWEEPS)
    begin = time.time()
    with tracker.chain("demo search", directory, params={"search.num_trials": 3}) as sweep:
        for number in range(3):
            place = directory / f"trial-000{number}"
            with sweep.stage(place.name, place, params={"moe.top_k": number + 1}) as trial:
                trial.set_tags({"trial": str(number), "best": str(number == 2).lower()})
                trial.log_metrics(10, {"trial/accuracy": 0.7 + number / 20})
                for order, name in enumerate(("adapt", "evaluate", "distill")):
                    began = begin + 10 * number + order
                    note = StageNote(name, place / name, "", began, began + 1, "FINISHED")
                    trial.note_stage(note).log_metrics(10, {"dev/accuracy": 0.7 + number / 20})


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 720})
        opened.set_default_timeout(PATIENCE_MS)
        yield opened
        browser.close()


@pytest.fixture
def keep() -> Callable[[Any, str], None]:
    """A function that keeps a picture of a page where pictures are asked for."""
    target = os.environ.get("MOE_DIST_SCREENSHOTS")

    def shoot(page: Any, name: str) -> None:
        if target:
            page.wait_for_timeout(SETTLING_MS)
            path = Path(target) / f"{name}.png"
            page.screenshot(path=str(path))
            with Image.open(path) as picture:
                picture.convert("RGB").quantize(NUM_COLOURS).save(path, optimize=True)

    return shoot


def open_page(page: Any, url: str) -> None:
    """Open a page of MLflow and put its assistant away."""
    page.goto(url)
    close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    with suppress(sync_api.TimeoutError):
        close.click(timeout=ASSISTANT_MS)


def runs_url(server: Server, name: str = EXPERIMENT) -> str:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name(name)
    return f"{server.uri}/#/experiments/{experiment.experiment_id}/runs"


def test_a_chain_unfolds_into_its_stages(server: Server, page: Any, keep: Any) -> None:
    open_page(page, runs_url(server))
    page.get_by_role("link", name="run-2").first.wait_for()
    assert page.get_by_role("link", name="distill", exact=True).count() == 0
    page.locator(".ag-row", has=page.get_by_text("run-2")).locator("button").first.click()
    page.get_by_role("link", name="distill", exact=True).first.wait_for()
    keep(page, "mlflow-runs")


def test_a_sweep_unfolds_into_trials_and_these_into_stages(
    server: Server, page: Any, keep: Any
) -> None:
    open_page(page, runs_url(server, SWEEPS))
    page.get_by_role("link", name="demo search").first.wait_for()
    assert page.get_by_role("link", name="trial-0002", exact=True).count() == 0
    for parent, child in (("demo search", "trial-0002"), ("trial-0002", "distill")):
        page.locator(".ag-row", has=page.get_by_text(parent)).locator("button").first.click()
        page.get_by_role("link", name=child, exact=True).first.wait_for()
    stages = [page.get_by_role("link", name=name, exact=True) for name in ("adapt", "evaluate")]
    assert [stage.count() for stage in stages] == [1, 1]
    keep(page, "mlflow-sweep")


def test_comparing_runs_draws_a_chart(server: Server, page: Any, keep: Any) -> None:
    import json
    from urllib.parse import quote

    from moe_dist.tracking import RunReader

    reader = RunReader(server.uri, EXPERIMENT)
    runs = [run for run in reader.search() if run.name == "distill"]
    ids = quote(json.dumps([run.run_id for run in runs]))
    experiments = quote(json.dumps([runs[0].experiment_id]))
    open_page(page, f"{server.uri}/#/compare-runs?runs={ids}&experiments={experiments}")
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    keep(page, "mlflow-compare")


def test_plots_of_a_run_open(server: Server, page: Any, keep: Any) -> None:
    from moe_dist.tracking import RunReader

    run = RunReader(server.uri, EXPERIMENT).find(["with-plot"])["with-plot"]
    place = f"experiments/{run.experiment_id}/runs/{run.run_id}/artifacts/plots/expert-load.png"
    open_page(page, f"{server.uri}/#/{place}")
    page.locator("img[alt='plots/expert-load.png']").wait_for()
    keep(page, "mlflow-artifact")
