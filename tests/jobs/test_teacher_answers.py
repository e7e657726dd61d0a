"""A teacher is asked once about each row: the same losses, and the next student asks no more."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs import teacher_answers
from moe_dist.jobs.distill import DistillJob
from moe_dist.metric_log import MetricLog, series
from moe_dist.moe.routing import use_samples
from moe_dist.training import step
from moe_dist.training.teacher_answers import TeacherAnswers
from tests.training.tiny_task import job_fields, on_cpu, train_section, write_untrained_pair

ONLY_KL = ObjectivesConfig(task_weight=0.0, hidden_weight=0.0, kl_weight=1.0, temperature=2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("answers")
    return root, write_untrained_pair(root)


@pytest.fixture(autouse=True)
def cache(models: tuple[Path, dict[str, str]]) -> Path:
    """Where answers are kept; empty before each test."""
    folder = models[0] / "cache" / teacher_answers.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who runs: models in steps, and the teacher before them."""
    calls: list[str] = []
    own, take = step._outputs, teacher_answers._take

    def outputs(model: Any, *args: Any) -> Any:
        calls.append("student" if model.training else "teacher")
        return own(model, *args)

    def taken(*args: Any) -> Any:
        calls.append("all rows")
        return take(*args)

    monkeypatch.setattr(step, "_outputs", outputs)
    monkeypatch.setattr(teacher_answers, "_take", taken)
    return calls


def job(models: tuple[Path, dict[str, str]], name: str, **changes: Any) -> DistillJob:
    root, directories = models
    train = train_section(num_epochs=2, log_every=1, precision="fp32", **changes.pop("train", {}))
    distill = ONLY_KL.model_copy(update=changes.pop("distill", {}))
    fields = job_fields(root, name, **directories, train=train, distill=distill)
    return DistillJob(**(fields | changes))


def losses(one: DistillJob) -> list[float]:
    one.run()
    return losses_in(one)


def losses_in(one: DistillJob) -> list[float]:
    records = MetricLog(Path(one.stage_dir) / "metrics.jsonl").read()
    return series(records, "train/loss/prediction_kl")[1]


def test_losses_are_those_of_a_teacher_that_is_asked_in_every_step(
    models: tuple[Path, dict[str, str]], asked: list[str], cache: Path
) -> None:
    plain = losses(job(models, "plain-steps", distill={"keep_answers_gib": 0.0}))
    assert set(asked) == {"student", "teacher"} and not cache.exists()
    asked.clear()
    found = losses(job(models, "kept"))
    assert found == pytest.approx(plain, rel=1e-4) and len(found) > 10
    assert asked.count("all rows") == 1 and "teacher" not in asked
    (folder,) = cache.glob("[!.]*")
    names = {file.name for file in folder.iterdir()}
    assert names == {"answers.safetensors", "answers.json"}
    asked.clear()
    # The next student of the same teacher and rows, even for one epoch.
    again = losses(job(models, "another", train={"max_steps": 3}, seed=5))
    assert len(again) == 3 and set(asked) == {"student"}


def test_what_was_kept_is_of_this_teacher_and_whole(
    models: tuple[Path, dict[str, str]],
    asked: list[str],
    cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = losses(job(models, "first"))
    (folder,) = cache.glob("[!.]*")
    answers = folder / "answers.safetensors"
    whole = answers.read_bytes()
    flipped = bytearray(whole)
    flipped[-2] ^= 0x40  # of the last number's exponent; the header is whole
    for number, content in enumerate((b"half of it", flipped)):
        answers.write_bytes(content)
        asked.clear()
        caplog.clear()
        assert losses(job(models, f"damaged{number}")) == first
        assert asked.count("all rows") == 1 and answers.read_bytes() == whole
        (line,) = [said for said in caplog.messages if "damaged" in said]
        assert str(folder) in line
    other = load_model(Path(models[1]["teacher"]))
    with torch.no_grad():
        other.classifier.bias += 1.0
    saved = str(save_model(other, tmp_path / "other", tokenizer=None))
    asked.clear()
    job(models, "of another", teacher=saved).run()
    assert asked.count("all rows") == 1 and len(list(cache.glob("[!.]*"))) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distill": {"hidden_weight": 1.0}}, "losses read its hidden states"),
        ({"train": {"max_steps": 2}}, "each row is trained on once"),
        ({"distill": {"keep_answers_gib": 1e-7}}, "more than distill.keep_answers_gib=1e-07"),
    ],
)
def test_where_answers_are_not_kept_the_log_says_why(
    models: tuple[Path, dict[str, str]],
    asked: list[str],
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    reason: str,
) -> None:
    one = job(models, reason, **changes)
    with caplog.at_level(logging.INFO, logger="moe_dist.training"):
        one.run()
    (line,) = [said for said in caplog.messages if "teacher is asked" in said]
    assert reason in line and "teacher" in asked and not cache.exists()
    is_told = "more than" in reason
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(record.getMessage() == line for record in told) == is_told


def test_who_chose_the_limit_is_told_where_answers_lie_or_why_not(
    models: tuple[Path, dict[str, str]], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = {"keep_answers_gib": 0.5}
    for changes in ({}, chosen, chosen | {"hidden_weight": 1.0}):
        job(models, "told", distill=changes).run()
        told = [said for said in caplog.messages if "the teacher" in said]
        caplog.clear()
        if "hidden_weight" in changes:
            assert told == ["the teacher is asked in every step: losses read its hidden states"]
        else:
            assert len(told) == bool(changes) and all(str(cache) in line for line in told)


def test_found_answers_beyond_the_limit_are_not_used(
    models: tuple[Path, dict[str, str]], asked: list[str], cache: Path
) -> None:
    job(models, "small enough").run()
    (folder,) = cache.glob("[!.]*")
    asked.clear()
    job(models, "too large", distill={"keep_answers_gib": 1e-7}).run()
    assert "teacher" in asked and "all rows" not in asked and folder.is_dir()


def test_answers_stay_on_the_host() -> None:
    answers = TeacherAnswers(
        torch.tensor([3, 5]), torch.tensor([[1.0], [2.0]]), torch.device("meta")
    )
    with use_samples(torch.tensor([5, 3, 5]), 0):
        batch = answers.of_batch()
    assert answers.values.device.type == "cpu"
    assert batch.device.type == "meta" and batch.shape == (3, 1)


def test_answers_that_are_no_numbers_are_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher_answers._keep(tmp_path / "new", torch.tensor([1.0, torch.nan]), 1.0)
    assert not list(tmp_path.iterdir())
    (line,) = caplog.messages
    assert "not kept" in line


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    values = torch.zeros(2**18)  # 1 MiB
    for number in range(4):
        teacher_answers._keep(tmp_path / f"{number}", values, 1.0)
        stamp = 1000 * (number if number else 99)
        os.utime(tmp_path / f"{number}", (stamp, stamp))
    teacher_answers._keep(tmp_path / "new", values, 3.01 / 1024)
    left = {one.name for one in tmp_path.glob("[!.]*")}
    assert left == {"new", "0", "3"}


def test_what_killed_writers_left_is_cleared(tmp_path: Path) -> None:
    gone = tmp_path / f".other.building-1999999999-{platform.node()}-abc"
    alive = tmp_path / f".other.building-{os.getpid()}-{platform.node()}-abc"
    for folder in (gone, alive):
        folder.mkdir()
    teacher_answers._keep(tmp_path / "new", torch.zeros(4), 1.0)
    assert not gone.exists() and alive.exists()


def test_a_folder_that_another_process_removed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        teacher_answers._keep(tmp_path / name, torch.zeros(4), 1.0)
    iterdir = Path.iterdir

    def removed(self: Path) -> Any:
        if self.name == "a":
            shutil.rmtree(self)
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", removed)
    teacher_answers._keep(tmp_path / "new", torch.zeros(4), 1e-9)
    assert not caplog.messages
    assert {one.name for one in tmp_path.glob("[!.]*")} == {"new"}


def run_ranks(rank: int, world_size: int, one: DistillJob) -> None:
    one.run()


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_share_the_rows_and_their_answers(
    models: tuple[Path, dict[str, str]], cache: Path
) -> None:
    alone = losses(job(models, "alone", distill={"keep_answers_gib": 0.0}))
    both = job(models, "both", parallel=on_cpu(ep_size=2))
    spawn_gloo(run_ranks, 2, both)
    assert losses_in(both) == pytest.approx(alone, rel=1e-4)
    assert len(list(cache.glob("[!.]*"))) == 1
