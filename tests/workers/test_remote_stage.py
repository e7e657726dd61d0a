"""A job whose stage lies at a URI: what it finds on its machine, and what it leaves there."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from moe_dist.config.data_section import DataConfig
from moe_dist.config.sections import ParallelConfig
from moe_dist.distributed.checkpoint_files import (
    MODEL_FILE,
    list_checkpoints,
    prune_checkpoints,
    step_directory,
    write_checkpoint,
)
from moe_dist.errors import CheckpointError, StorageError
from moe_dist.jobs.job import Job
from moe_dist.jobs.results import CHECKPOINT_DIR
from moe_dist.metric_log import METRIC_LOG
from moe_dist.storage import Store, upload_tree
from moe_dist.workers.remote_stage import local_stage


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MOE_DIST_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("moe_dist.workers.stage_upload.SYNC_INTERVAL_S", 0.01)
    return Store(f"memory://{uuid.uuid4().hex}/stage")


def write(stage: Path, step: int) -> None:
    tensors = {MODEL_FILE: {"weight": torch.full((2,), float(step))}}
    write_checkpoint(step_directory(stage / CHECKPOINT_DIR, step), tensors, {"step": step}, {})


def steps_in(store: Store) -> list[str]:
    names = [entry.name for entry in store.list(CHECKPOINT_DIR)]
    return [name.split("/")[1] for name in names if name.endswith("/manifest.json")]


def is_in(store: Store, step: int) -> bool:
    return f"step-{step:08d}" in steps_in(store)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass(frozen=True, kw_only=True)
class ReadingJob(Job):
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "teacher")

    model: str = "some/model"
    teacher: str = "on/the/hub"

    def run(self) -> None:
        pass


def job(stage_dir: str, **more: Any) -> ReadingJob:
    data = DataConfig(source="files", train="train.tsv", dev="dev.tsv")
    parallel = ParallelConfig()
    shared: dict[str, Any] = {"data": data, "max_length": 8, "seed": 1, "parallel": parallel}
    return ReadingJob(stage_dir=stage_dir, **shared, **more)


def test_a_local_stage_is_used_as_it_is(tmp_path: Path) -> None:
    given = job(str(tmp_path))
    with local_stage(given) as told:
        assert told == given
    assert list(tmp_path.iterdir()) == []


def test_a_job_finds_its_model_and_leaves_its_results(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    models = Store(f"{store.uri}-models")
    upload_tree(models, tmp_path / "model", "teacher")
    with local_stage(job(store.uri, model=f"{models.uri}/teacher")) as told:
        stage = Path(told.stage_dir)
        assert (Path(told.model) / "weights").read_text() == "w"
        assert (told.teacher, told.seed) == ("on/the/hub", 1)
        (stage / "result.json").write_text("{}")
        (stage / "model").mkdir()
        (stage / "model" / "manifest.json").write_text("{}")
        write(stage, 2)
    names = [e.name for e in store.list() if not e.name.startswith(CHECKPOINT_DIR)]
    assert names == ["model/manifest.json", "result.json"]
    assert not stage.exists()


def test_checkpoints_go_up_while_the_job_runs_and_pruned_ones_go(store: Store) -> None:
    def fail_after_three_checkpoints(stage: Path) -> None:
        for step in (2, 4, 6):
            write(stage, step)
            prune_checkpoints(stage / CHECKPOINT_DIR, step, keep=2)
            wait_until(partial(is_in, store, step))
        wait_until(lambda: steps_in(store) == ["step-00000004", "step-00000006"])
        (stage / METRIC_LOG).write_text("one line\n")
        raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"), local_stage(job(store.uri)) as told:
        fail_after_three_checkpoints(Path(told.stage_dir))
    # What a failed job wrote last is not lost.
    assert store.read(METRIC_LOG) == b"one line\n"
    with local_stage(job(store.uri)) as told:
        stage = Path(told.stage_dir)
        assert (stage / METRIC_LOG).read_text() == "one line\n"
        assert [path.name for path in list_checkpoints(stage / CHECKPOINT_DIR)] == ["step-00000006"]


def test_a_damaged_checkpoint_is_passed_over_and_replaced(store: Store, tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
        name = f"{CHECKPOINT_DIR}/step-{step:08d}"
        upload_tree(store, tmp_path / name, name)
    good = store.read(f"{name}/{MODEL_FILE}")
    store.write(f"{name}/{MODEL_FILE}", b"damaged")
    with local_stage(job(store.uri)) as told:
        stage = Path(told.stage_dir)
        assert [path.name for path in list_checkpoints(stage / CHECKPOINT_DIR)] == ["step-00000002"]
        write(stage, 4)
        wait_until(lambda: store.read(f"{name}/{MODEL_FILE}") == good)

    for step in (2, 4):
        store.write(f"{CHECKPOINT_DIR}/step-{step:08d}/{MODEL_FILE}", b"damaged")
    with pytest.raises(CheckpointError, match="no checkpoint of this stage is good"):
        local_stage(job(store.uri)).__enter__()


def test_an_outage_while_training_costs_nothing_and_one_at_the_end_is_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upload = Store.upload

    def refuse(store: Store, pairs: object) -> None:
        raise StorageError("cannot write")

    with local_stage(job(store.uri)) as told:
        stage = Path(told.stage_dir)
        monkeypatch.setattr(Store, "upload", refuse)
        write(stage, 2)
        wait_until(lambda: "cannot write; trying again" in caplog.text)
        monkeypatch.setattr(Store, "upload", upload)
        wait_until(lambda: steps_in(store) == ["step-00000002"])
        assert caplog.text.count("trying again") == 1

    ending = local_stage(job(store.uri))
    stage = Path(ending.__enter__().stage_dir)
    (stage / "result.json").write_text("{}")
    monkeypatch.setattr(Store, "upload", refuse)
    with pytest.raises(StorageError):
        ending.__exit__(None, None, None)
