"""The form that a distillation asks its teacher in, and what is said where it is another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.conversion.half_attention import has_block_attention
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.backends.native_blocks import UnsuitedError
from moe_dist.inference.saving import load_model
from moe_dist.jobs import distill
from moe_dist.jobs.distill import DistillJob
from moe_dist.metric_log import MetricLog, series
from tests.inference.native_forms import is_native
from tests.training.tiny_task import job_fields, train_section, write_untrained_pair

LOSSES = ObjectivesConfig(task_weight=0.0, hidden_weight=1.0, kl_weight=1.0)
half = pytest.mark.skipif(not is_native("bf16"), reason="not on this processor")
byte = pytest.mark.skipif(not is_native("int8"), reason="not on this processor")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("asked")
    return root, write_untrained_pair(root)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of quick teachers."""
    made: list[str] = []
    own = distill.quick_teacher

    def quick(teacher: Any, precision: str) -> Any:
        found = own(teacher, precision)
        made.append(precision)
        return found

    monkeypatch.setattr(distill, "quick_teacher", quick)
    return made


def losses(
    models: tuple[Path, dict[str, str]], name: str, precision: str, **changes: Any
) -> dict[str, list[float]]:
    root, directories = models
    one = DistillJob(
        **job_fields(
            root,
            name,
            **directories,
            train=train_section(num_epochs=1, log_every=1, precision=precision),
            distill=LOSSES.model_copy(update=changes),
        )
    )
    one.run()
    records = MetricLog(Path(one.stage_dir) / "metrics.jsonl").read()
    names = ("prediction_kl", "hidden_mse")
    return {name: series(records, f"train/loss/{name}")[1] for name in names}


@half
def test_losses_of_a_quick_teacher_are_the_same(
    models: tuple[Path, dict[str, str]], forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = losses(models, "quick", "bf16")
    assert forms == ["bf16"] and has_block_attention()

    def unsuited(*_: Any) -> Any:
        raise UnsuitedError("not today")

    monkeypatch.setattr(distill, "quick_teacher", unsuited)
    plain = losses(models, "plain-form", "bf16")
    assert len(plain["hidden_mse"]) > 5
    for name, values in found.items():
        assert values == pytest.approx(plain[name], rel=0.03, abs=1e-4)


@byte
def test_a_teacher_in_int8(models: tuple[Path, dict[str, str]], forms: list[str]) -> None:
    plain = losses(models, "fp32", "fp32")
    assert not forms
    found = losses(models, "int8", "fp32", teacher_precision="int8")
    assert forms == ["int8"]
    assert found["hidden_mse"] != plain["hidden_mse"]
    assert found["hidden_mse"] == pytest.approx(plain["hidden_mse"], rel=0.1)


def test_where_there_is_no_int8_it_is_said(
    models: tuple[Path, dict[str, str]], forms: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "moe_dist.training"):
        losses(models, "attention", "fp32", teacher_precision="int8", attention_weight=1.0)
    assert not forms
    assert "the teacher is asked in fp32, not in int8: losses read its attention" in caplog.text


def test_a_teacher_that_nobody_asks_needs_no_form(
    models: tuple[Path, dict[str, str]], forms: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"task_weight": 1.0, "hidden_weight": 0.0, "kl_weight": 0.0}
    with caplog.at_level(logging.WARNING, "moe_dist.training"):
        losses(models, "nobody", "fp32", teacher_precision="int8", **weights)
    assert not forms and "int8" not in caplog.text


def ask_on_ranks(rank: int, world_size: int, directory: str) -> None:
    """On rank 1 there is nothing native."""
    made = load_model(Path(directory))
    own = distill.quick_teacher

    def quick(teacher: Any, precision: str) -> Any:
        if rank == 1:
            raise UnsuitedError("no compiler on this one")
        return own(teacher, precision)

    distill.quick_teacher = quick  # type: ignore[attr-defined]
    lines: list[str] = []
    distill.logger.addHandler(_Kept(lines))
    asked = distill._asked_in("int8", made, ["hidden_mse"], "bf16", torch.device("cpu"))
    assert asked is made
    assert len(lines) == (rank == 0)
    assert all("not in int8: no compiler on this one" in line for line in lines)


class _Kept(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.distributed
def test_ranks_ask_the_same_teacher(models: tuple[Path, dict[str, str]]) -> None:
    spawn_gloo(ask_on_ranks, 2, models[1]["teacher"])
