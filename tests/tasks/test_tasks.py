"""Kinds of tasks: their losses, answers and heads, against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig

from moe_dist.config.data_checks import KEYS_OF_KINDS
from moe_dist.config.data_section import TaskDataConfig
from moe_dist.data.metrics import METRICS
from moe_dist.losses.distillation import prediction_kl
from moe_dist.tasks import TASK_KINDS, TaskKind, head_kind

CLASSES, NUMBERS = TASK_KINDS["classification"], TASK_KINDS["regression"]


def test_recipes_name_every_kind_and_metrics_are_known() -> None:
    annotation = str(TaskDataConfig.model_fields["kind"].annotation)
    for name, kind in TASK_KINDS.items():
        assert f"'{name}'" in annotation
        assert set(kind.default_metrics) <= set(kind.metrics) <= set(METRICS)


def test_recipes_know_which_kinds_read_a_key() -> None:
    for key, kinds in KEYS_OF_KINDS.items():
        reading = {name for name, kind in TASK_KINDS.items() if key in kind.option_names}
        assert reading == set(kinds), key
        assert key in TaskDataConfig.model_fields


def test_every_kind_says_how_it_is_served() -> None:
    for kind in TASK_KINDS.values():
        assert kind.served_columns
    assert "serve" in TaskKind.__abstractmethods__, "a kind without it cannot be made"
    assert not hasattr(TASK_KINDS["seq2seq"], "served"), "only of those that one forward answers"


def test_classification_takes_cross_entropy() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    losses = CLASSES.losses(logits, {"labels": torch.tensor([0, 1])})
    assert losses.tolist() == pytest.approx([math.log(4 / 3), math.log(2)], rel=1e-6)


def test_regression_takes_squares_whatever_the_shape_of_the_head() -> None:
    labels = torch.tensor([1.0, 0.5])
    for logits in (torch.tensor([[0.0], [2.5]]), torch.tensor([0.0, 2.5])):
        assert NUMBERS.losses(logits, {"labels": labels}).tolist() == pytest.approx([1.0, 4.0])


def test_losses_leave_low_precision() -> None:
    logits = torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16)
    losses = CLASSES.losses(logits, {"labels": torch.tensor([1])})
    assert losses.dtype == torch.float32 and math.isfinite(float(losses[0]))


def test_prediction_errors_are_the_loss_of_each_sample() -> None:
    student, teacher = torch.randn(7, 3), torch.randn(7, 3)
    found = CLASSES.prediction_errors(student, teacher, {})
    for row in range(7):
        expected = prediction_kl(student[row : row + 1], teacher[row : row + 1])
        torch.testing.assert_close(found[row], expected)
    torch.testing.assert_close(found.sum(), CLASSES.prediction_loss(student, teacher, {}))
    student, teacher = student[:, :1], teacher[:, :1]
    values = NUMBERS.prediction_errors(student, teacher, {})
    torch.testing.assert_close(values, (student - teacher).square()[:, 0])
    torch.testing.assert_close(values.sum(), NUMBERS.prediction_loss(student, teacher, {}))


def test_answers_are_classes_or_the_output_itself() -> None:
    logits = torch.tensor([[0.1, 2.0], [0.9, 0.2]])
    assert CLASSES.said(logits.numpy()).tolist() == [1, 0]
    assert NUMBERS.said(logits.numpy()).tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize(("kind", "names"), [(CLASSES, ("bad", "good")), (NUMBERS, None)])
def test_a_head_of_a_kind_is_known_again(kind: object, names: tuple[str, ...] | None) -> None:
    found = head_kind(names)
    assert found is kind
    config = BertConfig(num_labels=found.num_outputs(names))
    architecture = "BertForSequenceClassification"
    assert [one for one in TASK_KINDS.values() if one.owns(architecture, config)] == [kind]
    for key, value in found.model_settings(names).items():
        setattr(config, key, value)
    assert [one for one in TASK_KINDS.values() if one.owns(architecture, config)] == [kind]
