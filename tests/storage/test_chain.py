"""The whole chain with its results in a bucket, on machines that share nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from moe_dist.inference import load_model
from moe_dist.metric_log import MetricLog
from moe_dist.storage import Store, local_file
from pipelines.chain.chain import ChainResult, run_chain
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
SECRET = "test-secret-that-is-planted"


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """A function that takes the scratch space away, as if the next process ran elsewhere."""
    numbers = iter(range(100))

    def another() -> Path:
        scratch = tmp_path / f"machine-{next(numbers)}"
        monkeypatch.setenv("MOE_DIST_SCRATCH", str(scratch))
        return scratch

    another()
    return another


def run(recipe: Path, *overrides: str, until: str = "evaluate") -> tuple[Recorder, ChainResult]:
    recorder = Recorder()
    return recorder, run_chain(load_config(recipe, overrides), recorder, until=until)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_chain_in_a_bucket_is_finished_on_every_machine(
    s3: str,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    machines: Callable[[], Path],
) -> None:
    data = Store(f"{s3}/data")
    data.upload([(tmp_path / f"{part}.jsonl", f"{part}.jsonl") for part in ("train", "dev")])
    files = {part: f"{s3}/data/{part}.jsonl" for part in ("train", "dev")}
    tiny_settings |= {"output_dir": f"{s3}/out", "data": tiny_settings["data"] | files}
    recipe = write_recipe(tiny_settings)
    first, result = run(recipe)
    assert first.ran == ["finetune-teacher", "score-importance", "adapt", "distill", "evaluate"]
    assert result.report_path is not None
    assert result.shown(result.report_path) == f"{s3}/out/tiny/report.json"

    store = Store(f"{s3}/out/tiny")
    names = {entry.name for entry in store.list()}
    assert {"report.json", "report.md", "recipe.yaml", "distill/losses.png"} <= names
    assert not [name for name in names if "checkpoints/" in name or name.endswith(".partial")]
    for name in names:
        assert SECRET.encode() not in (store.read(name) or b""), name
    report = json.loads(store.read("report.json") or b"")
    model = load_model(f"{s3}/out/tiny/distill/model")
    assert sum(p.numel() for p in model.parameters()) == report["student"]["parameters"]["total"]

    scratch = machines()
    again, _ = run(recipe)
    assert again.skipped == first.ran
    assert again.ran == []
    # Nothing bulky stays.
    assert not list(scratch.rglob("*.safetensors"))

    machines()
    changed, _ = run(recipe, "moe.router=token_gate", until="adapt")
    assert changed.skipped == ["finetune-teacher", "score-importance"]
    assert changed.ran == ["adapt"]
    # The same student comes out again, and all that was made of it still counts.
    machines()
    back, _ = run(recipe)
    assert back.ran == ["adapt"]


def test_a_bucket_that_is_not_there_ends_the_run_before_it_starts(
    s3: str, write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    recipe = write_recipe(tiny_settings | {"output_dir": "s3://nobody-made-this/out"})
    with pytest.raises(ConfigError, match=r"output_dir: cannot write.*no such bucket"):
        run(recipe)


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_elsewhere_from_its_uploaded_checkpoint(
    s3: str, write_recipe: Write, tiny_settings: dict[str, Any], machines: Callable[[], Path]
) -> None:
    tiny_settings["output_dir"] = f"{s3}/out"
    tiny_settings["train"] |= {"num_epochs": 200, "checkpoint_every": 60}
    recipe = write_recipe(tiny_settings)
    stage = Store(f"{s3}/out/tiny/finetune-teacher")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "finetune-teacher", str(recipe), "--quiet"],
        env=os.environ | {"MOE_DIST_SCRATCH": str(machines())},
    )

    def uploaded() -> list[str]:
        names = [entry.name for entry in stage.list("checkpoints")]
        return [name for name in names if name.endswith("manifest.json")]

    wait_for(uploaded, process, 240)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)

    machines()
    recorder, result = run(recipe, until="finetune-teacher")
    assert recorder.resumed == ["finetune-teacher"]
    details = result.results["finetune-teacher"].details
    assert details["num_steps"] == 1200
    assert details["resumed_from"] >= 60
    with local_file(f"{stage.uri}/metrics.jsonl") as path:
        steps = [r.step for r in MetricLog(path).read() if "train/loss/total" in r.metrics]
    assert steps == list(range(2, 1201, 2))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ray_workers_train_into_a_bucket(
    s3: str, write_recipe: Write, tiny_settings: dict[str, Any], machines: Callable[[], Path]
) -> None:
    tiny_settings |= {"output_dir": f"{s3}/out", "parallel": {"num_workers": 2, "ep_size": 2}}
    recipe = write_recipe(tiny_settings)
    recorder, _ = run(recipe, until="distill")
    assert recorder.ran[-1] == "distill"
    store = Store(f"{s3}/out/tiny")
    attempts = (store.read("distill/ray/attempts.jsonl") or b"").splitlines()
    assert len(attempts) == 1
    load_model(f"{s3}/out/tiny/distill/model")
    machines()
    again, _ = run(recipe, until="distill")
    assert again.ran == []
