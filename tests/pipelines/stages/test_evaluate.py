"""What `evaluate` says of models without a value, and of one that has diverged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.data.metrics import LabelSpace, compute_metrics
from moe_dist.errors import DataError
from moe_dist.measure.evaluation import Predictions
from moe_dist.tasks import Figures
from pipelines.report.nearness import Imitation
from pipelines.report.quality import (
    Answers,
    TaskAnswers,
    compare_students,
    describe_classes,
    describe_tasks,
    measure_quality,
)
from pipelines.stages.evaluate import run_over_dev

SPACE = LabelSpace(2, 0, ("fraud", "ok"))


def answers(labels: list[int], metrics: tuple[str, ...], task: str = "", **said: Any) -> Answers:
    logits = {name: np.eye(2)[values] for name, values in said.items()}
    own = TaskAnswers(metrics, SPACE, np.array(labels), logits)
    return Answers({task: own}, Imitation({}), {}, 1, {})


def test_an_undefined_metric_is_none_with_a_sentence() -> None:
    found = answers([1] * 4, ("f1", "accuracy"), teacher=[1] * 4, student=[1, 1, 1, 0])
    entries = measure_quality(found)
    assert entries["student"]["metrics"] == {"f1": None, "accuracy": 0.75}
    why = "f1 of fraud of student is undefined: none of the 4 labels is 'fraud'"
    assert entries["student"]["undefined"] == {"f1": why}
    gap = compare_students(found, "student", "f1", seed=0)["teacher"]
    assert gap["difference"] is gap["low"] is gap["high"] is None
    assert gap["undefined"] == why
    assert describe_classes(found) == {"classes": {"names": ["fraud", "ok"], "positive": 0}}


def test_a_task_of_several_is_compared_and_explained_by_itself() -> None:
    one = answers([0, 1, 0, 1], ("matthews",), "a", teacher=[0, 1, 0, 0], student=[1] * 4)
    two = answers([0, 1, 0, 1], ("accuracy",), "b", teacher=[0, 1, 0, 0], student=[0, 1, 0, 1])
    both = Answers(one.tasks | two.tasks, Imitation({}), {}, 1, {})
    entries = measure_quality(both)
    assert entries["student"]["metrics"] == {"mean": None, "a/matthews": None, "b/accuracy": 1.0}
    assert "a/matthews is" in entries["student"]["undefined"]["mean"]
    assert "all 4 predictions are 'ok'" in entries["student"]["undefined"]["a/matthews"]
    tasks = describe_tasks(both, "student", seed=0)["tasks"]
    assert "all 4 predictions are 'ok'" in tasks["a"]["differences"]["teacher"]["undefined"]
    assert tasks["b"]["differences"]["teacher"]["difference"] == pytest.approx(0.25)
    assert tasks["a"]["classes"]["positive"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_named(value: float) -> None:
    def metrics(figures: Figures) -> dict[str, float]:
        return compute_metrics(["accuracy"], figures.values, [0, 1, 1], SPACE)

    def figures(answers: torch.Tensor, split: str, calibration: None) -> Figures:
        return Figures(answers.numpy(), np.array([0, 1, 1]), np.arange(3))

    part = SimpleNamespace(
        part=lambda split: None,
        splits=SimpleNamespace(task=SimpleNamespace(options={})),
        calibrate=lambda answer: None,
        figures=figures,
        metrics=metrics,
    )
    data: Any = SimpleNamespace(parts={"": part})
    logits = torch.tensor([[0.0, 1.0], [value, 0.0], [1.0, 0.0]])
    with pytest.raises(DataError, match="dense: accuracy: 1 of 3 predictions are NaN or infinite"):
        run_over_dev("dense", data, lambda encoded, options: Predictions(logits))
