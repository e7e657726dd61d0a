"""The jobs on two gloo processes with experts spread over them equal the jobs on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.saving import load_model, save_model
from moe_dist.metric_log import MetricLog
from moe_dist.training.jobs import distill_job, importance_job, predict_job
from moe_dist.training.results import load_scores
from tests.training.tiny_task import adapt, task_payload, train_section, write_bert

pytestmark = pytest.mark.distributed
EP2 = {"ep_size": 2, "zero_stage": 1}
EP1 = {"ep_size": 1, "zero_stage": 0}


def write_teacher(root: Path) -> str:
    """A teacher without dropout, so that one process and two can be compared."""
    write_bert(root / "plain", dropout=0.0)
    model, tokenizer = load_pretrained(
        str(root / "plain"), num_labels=2, label_names=("neg", "pos"), seed=1
    )
    return str(save_model(model, root / "teacher", tokenizer=tokenizer))


def payloads(root: Path, teacher: str, student: str, parallel: dict[str, Any]) -> dict[str, Any]:
    train = train_section(num_epochs=1, accumulation=2, log_every=2, checkpoint_every=2)
    return {
        "train": train,
        "distill": {"load_balancing_weight": 0.0, "hidden_weight": 1.0, "temperature": 2.0},
        "parallel": parallel,
        "teacher": teacher,
        "student": student,
    }


def score(rank: int, world_size: int, payload: dict[str, Any]) -> None:
    importance_job(payload)  # type: ignore[arg-type]


def distill_stop_resume_predict(
    rank: int, world_size: int, payload: dict[str, Any], predict: dict[str, Any]
) -> None:
    """Stop after half of the steps, go on, and predict with the saved student."""
    half = payload | {"train": payload["train"] | {"max_steps": 3, "lr_schedule": "constant"}}
    whole = payload | {"train": payload["train"] | {"lr_schedule": "constant"}}
    first = distill_job(half)  # type: ignore[arg-type]
    second = distill_job(whole)  # type: ignore[arg-type]
    assert first["num_steps"] == second["resumed_from"] == 3
    answer = predict_job(predict | {"model": second["model"]})  # type: ignore[typeddict-item]
    assert answer["metrics"] == second["metrics"]
    told = {"metrics": second["metrics"], "logits": answer["predictions"].tolist()}
    Path(payload["stage_dir"], f"rank{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def teacher(root: Path) -> str:
    return write_teacher(root)


def test_scores_are_summed_over_ranks(root: Path, teacher: str) -> None:
    options = {"model": teacher, "num_samples": 37, "batch_size": 8}
    importance_job(task_payload(root, "score-importance") | options)  # type: ignore[arg-type]
    spawn_gloo(score, 2, task_payload(root, "score-two") | options)
    one = load_scores(root / "score-importance" / "scores.safetensors")
    two = load_scores(root / "score-two" / "scores.safetensors")
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_two_ranks_with_spread_experts_equal_one(root: Path, teacher: str) -> None:
    if not (root / "score-importance").exists():
        importance_job(
            task_payload(root, "score-importance") | {"model": teacher, "num_samples": 37}
        )  # type: ignore[arg-type]
    student = adapt(root, teacher)
    alone = task_payload(root, "alone") | payloads(root, teacher, student, EP1)
    alone["train"] = alone["train"] | {"lr_schedule": "constant"}
    expected = distill_job(alone)  # type: ignore[arg-type]
    together = task_payload(root, "together") | payloads(root, teacher, student, EP2)
    spawn_gloo(distill_stop_resume_predict, 2, together, task_payload(root, "together"))

    reference = load_model(expected["model"]).state_dict()
    trained = load_model(root / "together" / "model").state_dict()
    start = load_model(student).state_dict()
    assert set(trained) == set(reference)
    moved = 0.0
    for name, value in reference.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-2, "training changed nothing"
    told = [json.loads((root / "together" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert told[0] == told[1]
    logs = [MetricLog(root / stage / "metrics.jsonl").read() for stage in ("alone", "together")]
    alone_losses, together_losses = (
        [(r.step, r.metrics["train/loss/total"]) for r in log if "train/loss/total" in r.metrics]
        for log in logs
    )
    assert [step for step, _ in together_losses] == [2, 3, 4, 6]
    assert dict(together_losses)[6] == pytest.approx(dict(alone_losses)[6], rel=1e-3)
