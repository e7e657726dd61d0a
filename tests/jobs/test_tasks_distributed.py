"""Several tasks on two gloo processes train as on one, also when they stop in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.data_section import DataConfig
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs.distill import DistillJob
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.jobs.results import load_scores
from tests.training.tiny_task import (
    adapt,
    job_fields,
    on_cpu,
    train_section,
    write_bert,
    write_sentences,
)

pytestmark = pytest.mark.distributed
HEADS = (TaskHead("mood", ("neg", "pos")), TaskHead("grade", None))


def fields(root: Path, stage: str, **more: Any) -> dict[str, Any]:
    """A classification and a smaller regression."""
    shared = job_fields(root, stage, **more)
    for split, count in (("train", 40), ("dev", 11)):
        path = root / f"grade-{split}.tsv"
        if not path.exists():
            write_sentences(path, count, seed=count, regression=True)
    mood = shared["data"].model_dump(exclude={"tasks", "mixing", "mixing_temperature"})
    grade = mood | {
        "train": str(root / "grade-train.tsv"),
        "dev": str(root / "grade-dev.tsv"),
        "kind": "regression",
    }
    return shared | {"data": DataConfig(source="tasks", tasks={"mood": mood, "grade": grade})}


def stop_and_go_on(rank: int, world_size: int, scoring: ImportanceJob, job: DistillJob) -> None:
    """Score; stop the distillation within its first epoch and go on."""
    scoring.run()
    train = job.train.model_copy(update={"max_steps": 5})
    first, second = replace(job, train=train).run(), job.run()
    assert first["num_steps"] == second["resumed_from"] == 5
    told = json.dumps(second["metrics"])
    Path(job.stage_dir, f"rank{rank}.json").write_text(told)


def test_two_ranks_with_spread_experts_train_as_one_does(tmp_path: Path) -> None:
    write_bert(tmp_path / "plain", dropout=0.0)
    names = [name for head in HEADS for name in head.output_names]
    model, tokenizer = load_pretrained(
        str(tmp_path / "plain"), num_labels=3, label_names=names, seed=1
    )
    set_heads(model, HEADS)
    teacher = str(save_model(model, tmp_path / "teacher", tokenizer=tokenizer))
    scoring = {"model": teacher, "num_samples": 30, "batch_size": 8}
    ImportanceJob(**fields(tmp_path, "score-importance", **scoring)).run()
    student = adapt(tmp_path, teacher, router="task_gate")
    distilling = {
        "train": train_section(
            num_epochs=1, accumulation=2, log_every=2, checkpoint_every=5, lr_schedule="constant"
        ),
        "distill": ObjectivesConfig(),
        "teacher": teacher,
        "student": student,
    }
    alone = DistillJob(**fields(tmp_path, "alone", **distilling)).run()
    spawn_gloo(
        stop_and_go_on,
        2,
        ImportanceJob(**fields(tmp_path, "score-two", **scoring)),
        DistillJob(**fields(tmp_path, "together", **distilling, parallel=on_cpu(ep_size=2))),
    )

    pairs = [
        load_scores(tmp_path / stage / "scores.safetensors")
        for stage in ("score-importance", "score-two")
    ]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
        # Both tasks count alike.
        assert float(one.sum()) == pytest.approx(2.0, rel=1e-4)
    assert alone["num_steps"] == (96 + 40) // 16
    reference = load_model(alone["model"]).state_dict()
    trained = load_model(tmp_path / "together" / "model").state_dict()
    start = load_model(student).state_dict()
    for name, value in reference.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)
    assert max(float((value - start[name]).abs().max()) for name, value in trained.items()) > 1e-2
    told = [json.loads((tmp_path / f"together/rank{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert set(told[0]) == {"mean", "mood/accuracy", "grade/pearson", "grade/spearman"}
