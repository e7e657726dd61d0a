"""Every loss of the recipe's `distill` section, alone and with all others, over many steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs.distill import DistillJob
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.metric_log import MetricLog
from tests.training.tiny_task import adapt, job_fields, on_cpu, train_section, write_bert

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 200
WEIGHTS = [name for name in ObjectivesConfig.model_fields if name.endswith("_weight")]
NOTHING = dict.fromkeys(WEIGHTS, 0.0)
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: NOTHING | {"task_weight": 1.0, name: 1.0} for name in WEIGHTS},
    "all-spectral": dict.fromkeys(WEIGHTS, 0.1),
    "all-r1": dict.fromkeys(WEIGHTS, 0.1)
    | {"adversarial_regularizer": "r1", "hidden_layers": "last", "temperature": 4.0},
}


def distil_all(rank: int, world_size: int, jobs: list[DistillJob]) -> None:
    """Each setting one after the other, so that the processes are started once."""
    for job in jobs:
        job.run()


def test_every_loss_trains_200_steps_under_expert_parallelism(tmp_path: Path) -> None:
    write_bert(tmp_path / "plain")
    model, tokenizer = load_pretrained(
        str(tmp_path / "plain"), num_labels=2, label_names=("neg", "pos"), seed=1
    )
    teacher = str(save_model(model, tmp_path / "teacher", tokenizer=tokenizer))
    ImportanceJob(**job_fields(tmp_path, "score-importance", model=teacher)).run()
    shared = {
        "student": adapt(tmp_path, teacher),
        "teacher": teacher,
        "train": train_section(num_epochs=99, max_steps=STEPS, checkpoint_every=None),
        "parallel": on_cpu(ep_size=2, zero_stage=1),
    }
    jobs = [
        DistillJob(**job_fields(tmp_path, name, **shared), distill=ObjectivesConfig(**settings))
        for name, settings in SETTINGS.items()
    ]
    spawn_gloo(distil_all, 2, jobs)
    for name, settings in SETTINGS.items():
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["num_steps"] == STEPS
        records = list(MetricLog(tmp_path / name / "metrics.jsonl").read())
        assert all(math.isfinite(value) for one in records for value in one.metrics.values())
        terms = {key for key in result["train"] if key.startswith("train/loss/")}
        assert len(terms) > sum(weight > 0 for key, weight in settings.items() if key in WEIGHTS)
        for value in load_model(tmp_path / name / "model").state_dict().values():
            assert bool(value.isfinite().all()), name
