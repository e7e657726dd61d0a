"""Every loss under bf16 autocast, which is what `precision: auto` takes on most GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.saving import save_model
from moe_dist.jobs.distill import DistillJob
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.metric_log import MetricLog
from tests.training.tiny_task import adapt, job_fields, train_section, write_bert

WEIGHTS = [name for name in ObjectivesConfig.model_fields if name.endswith("_weight")]


@pytest.mark.parametrize("regularizer", ["spectral", "r1"])
def test_all_losses_are_nearly_those_of_fp32(tmp_path: Path, regularizer: str) -> None:
    write_bert(tmp_path / "plain", dropout=0.0)
    model, tokenizer = load_pretrained(
        str(tmp_path / "plain"), num_labels=2, label_names=("neg", "pos"), seed=1
    )
    teacher = str(save_model(model, tmp_path / "teacher", tokenizer=tokenizer))
    ImportanceJob(**job_fields(tmp_path, "score-importance", model=teacher)).run()
    student = adapt(tmp_path, teacher)
    settings: dict[str, Any] = dict.fromkeys(WEIGHTS, 0.1) | {
        "adversarial_regularizer": regularizer,
        "adversarial_warmup_fraction": 0.0,
    }

    def first_losses(precision: str) -> dict[str, float]:
        train = train_section(
            num_epochs=9, max_steps=3, log_every=1, warmup_fraction=0.0, precision=precision
        )
        fields = job_fields(tmp_path, precision, student=student, teacher=teacher, train=train)
        DistillJob(**fields, distill=ObjectivesConfig(**settings)).run()
        records = MetricLog(tmp_path / precision / "metrics.jsonl").read()
        assert all(math.isfinite(value) for one in records for value in one.metrics.values())
        return {
            name: value
            for name, value in records[0].metrics.items()
            if name.startswith("train/loss/")
        }

    exact, rounded = first_losses("fp32"), first_losses("bf16")
    assert exact.keys() == rounded.keys() and len(exact) > len(WEIGHTS)
    for name, value in exact.items():
        assert rounded[name] == pytest.approx(value, rel=0.05, abs=0.02), name
