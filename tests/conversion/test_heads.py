"""One encoder with a head for each task: it answers for the task that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.heads import (
    TaskHead,
    choose_task,
    head_rows,
    install_heads,
    read_heads,
    set_heads,
)
from moe_dist.conversion.shrink import plan_shrink, shrink_model
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference import load_model, save_model
from moe_dist.moe.routing import record_routing, use_task
from tests.conversion.dense_models import logits_of, random_scores, tiny_model, token_batch

HEADS = (
    TaskHead("sst2", ("negative", "positive")),
    TaskHead("stsb", None),
    TaskHead("nli", ("yes", "maybe", "no")),
)


def several_tasks() -> Any:
    model = tiny_model("bert", num_labels=6)
    set_heads(model, HEADS)
    return model


def student_of(model: Any, **options: Any) -> Any:
    plan = plan_partition(
        random_scores(model), num_experts=4, expert_size=10, num_shared_neurons=4, tie_shared=True
    )
    return dense_to_moe(model, plan, router="task_gate", **options)


def test_each_task_has_its_own_columns() -> None:
    model, batch = several_tasks(), token_batch()
    plain = tiny_model("bert", num_labels=6)
    whole = logits_of(plain, batch)
    for index, columns in enumerate(([0, 1], [2], [3, 4, 5])):
        with use_task(index):
            assert torch.equal(logits_of(model, batch), whole[:, columns])
    assert [head_rows(HEADS, index) for index in range(3)] == [
        slice(0, 2),
        slice(2, 3),
        slice(3, 6),
    ]
    assert model.config.id2label[2] == "stsb/value"


def test_a_task_must_be_named_once_and_exist() -> None:
    model, batch = several_tasks(), token_batch()
    with pytest.raises(MissingInputError, match=r"3 tasks \(sst2, stsb, nli\)"):
        logits_of(model, batch)
    with use_task(3), pytest.raises(MissingInputError, match="no task 3"):
        logits_of(model, batch)
    with pytest.raises(MissingInputError, match="no task 'qqp'"):
        choose_task(model, "qqp")
    with use_task(0), pytest.raises(MissingInputError, match="labels out"):
        model(**batch, labels=torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("heads", "fault"),
    [
        (HEADS[:1], "two or more"),
        ((HEADS[0], HEADS[0]), "two or more"),
        (HEADS[:2], "6 outputs, and its tasks have 3"),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads: tuple[TaskHead, ...], fault: str) -> None:
    with pytest.raises(ConversionError, match=fault):
        set_heads(tiny_model("bert", num_labels=6), heads)
    with pytest.raises(ConversionError, match="no head"):
        set_heads(tiny_model("gpt2"), HEADS)


def test_a_saved_student_knows_its_tasks(tmp_path: Path) -> None:
    batch, student = token_batch(), student_of(several_tasks())
    assert student.config.moe["num_tasks"] == 3
    save_model(student, tmp_path / "student")
    for index, head in enumerate(HEADS):
        with use_task(index), record_routing() as record:
            answer = logits_of(student, batch)
        assert answer.shape == (4, head.num_labels)
        # All tokens of a task go to one expert.
        assert all(len(entry.routing.expert_ids.unique()) == 1 for entry in record.entries)
        alone = load_model(tmp_path / "student", task=head.name)
        assert torch.equal(logits_of(alone, batch), answer)
        with use_task(0):
            assert logits_of(alone, batch).shape == (4, 2)
    loaded = load_model(tmp_path / "student")
    assert read_heads(loaded) == HEADS
    with pytest.raises(MissingInputError):
        logits_of(loaded, batch)
    with pytest.raises(MissingInputError, match="no task"):
        load_model(tmp_path / "student", task="cola")


def test_what_is_made_of_the_model_keeps_the_tasks() -> None:
    model, batch = several_tasks(), token_batch()
    install_heads(model)
    smaller = shrink_model(model, plan_shrink(model, num_layers=1))
    with use_task(1):
        assert logits_of(smaller, batch).shape == (4, 1)
        assert logits_of(student_of(smaller), batch).shape == (4, 1)


def test_importance_is_scored_on_the_task_s_own_loss() -> None:
    """Rows of the other heads do not enter it."""
    model, batch = several_tasks(), token_batch()
    alone = tiny_model("bert", num_labels=1)
    alone.load_state_dict(
        model.state_dict()
        | {name: model.state_dict()[name][2:3] for name in ("classifier.weight", "classifier.bias")}
    )
    alone.config.problem_type = "regression"
    labelled = batch | {"labels": torch.tensor([0.5, 1.0, -1.0, 0.0])}
    with use_task(1):
        found = score_importance(model, [labelled])
    for own, expected in zip(found, score_importance(alone, [labelled]), strict=True):
        assert torch.allclose(own, expected, rtol=1e-5)
