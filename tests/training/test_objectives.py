"""The table of losses: each row through real models, with padding, other shapes and regression."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moe_dist.config import ObjectivesConfig
from moe_dist.conversion.shrink import plan_shrink, shrink_model
from moe_dist.errors import ConversionError
from moe_dist.training.companion import build_companion
from moe_dist.training.objectives import (
    OBJECTIVES,
    ObjectiveSettings,
    chosen_objectives,
    objective_weights,
    pair_stacks,
    pair_states,
)
from moe_dist.training.step import distill_terms, freeze
from tests.inference.start_models import build_model
from tests.training.tiny import padded, tiny_batch, tiny_bert, tiny_data, tiny_student

ALL: dict[str, Any] = {row.weight_key: 1.0 for row in OBJECTIVES.values()}


def small(teacher: Any, **sizes: int) -> tuple[Any, Any]:
    """A student of the teacher, and the plan that it was cut by."""
    chosen = {"num_layers": 1, "hidden_size": 12, "intermediate_size": 20} | sizes
    plan = plan_shrink(teacher, **chosen, init="truncate")
    return shrink_model(teacher, plan).train(), plan


def losses(**settings: Any) -> ObjectivesConfig:
    """Only the losses that are named."""
    return ObjectivesConfig(**({"kl_weight": 0, "hidden_weight": 0} | settings))


def computed(
    student: Any, teacher: Any, plan: Any, batch: Any, weights: Any = ALL, **settings: Any
) -> dict[str, torch.Tensor]:
    section = losses(**weights)
    pairs = pair_states(plan.layers if plan else range(2), section.hidden_layers)
    companion = build_companion(
        student,
        teacher,
        section,
        num_pairs=len(pairs),
        hidden_ids=plan.hidden_ids if plan else None,
    )
    terms = distill_terms(
        student,
        teacher,
        batch,
        objectives=chosen_objectives(section),
        settings=ObjectiveSettings(pairs=pairs, **settings),
        companion=companion,
    ).terms
    return {name: term.sum for name, term in terms.items()}


def test_every_weight_is_a_key_of_the_recipe() -> None:
    assert {row.weight_key for row in OBJECTIVES.values()} <= set(ObjectivesConfig.model_fields)
    assert chosen_objectives(ObjectivesConfig()) == ("prediction_kl", "hidden_mse")


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_a_small_student_has_every_term_and_padding_changes_none(pooling: str) -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student, plan = small(teacher)
    batch = tiny_batch()
    narrow = computed(student, teacher, plan, batch, pooling=pooling)
    assert set(narrow) == {"task", *OBJECTIVES}
    wide = computed(student, teacher, plan, padded(batch, 5), pooling=pooling)
    assert {n: v.item() for n, v in wide.items()} == pytest.approx(
        {n: v.item() for n, v in narrow.items()}, rel=1e-4
    )
    sum(narrow.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in student.bert.parameters())


def test_terms_are_the_losses_of_what_the_models_show() -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student, plan = small(teacher)
    batch = tiny_batch()
    found = computed(student, teacher, plan, batch)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    own = student(**inputs, output_hidden_states=True).hidden_states
    other = teacher(**inputs, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    # A map starts as the cut that made the student: the dimensions it lacks are 0.
    hidden = 0.0
    for index, place in ((0, 0), (1, 2)):
        mapped = torch.zeros_like(other[place])
        mapped[..., list(plan.hidden_ids)] = own[index]
        hidden += (mapped - other[place])[mask].square().mean(dim=-1).sum().item()
    assert found["hidden_mse"].item() == pytest.approx(hidden, rel=1e-5)
    assert found["mapping_mse"].item() == pytest.approx(hidden, rel=1e-5)
    vector = torch.zeros_like(other[-1][:, 0])
    vector[:, list(plan.hidden_ids)] = own[-1][:, 0]
    aligned = (vector - other[-1][:, 0]).square().mean(dim=-1).sum().item()
    assert found["alignment_mse"].item() == pytest.approx(aligned, rel=1e-5)


def test_a_copy_of_the_teacher_is_at_distance_zero_whatever_is_compared() -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student = tiny_bert(dropout=0.0)
    found = computed(student, teacher, None, tiny_batch())
    for name in set(OBJECTIVES) - {"adversarial"}:
        assert found[name].item() == pytest.approx(0.0, abs=1e-6), name
    assert found["adversarial"].item() > 0


def test_experts_take_every_loss() -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student = tiny_student(teacher)
    found = computed(student.train(), teacher, None, tiny_batch())
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(math.isfinite(value.item()) for value in found.values())


def test_regression_has_the_losses_in_its_own_form() -> None:
    teacher = freeze(tiny_bert(dropout=0.0, num_labels=1))
    student, plan = small(teacher)
    found = computed(student, teacher, plan, tiny_batch(tiny_data(regression=True)))
    assert set(found) == {"task", "prediction_mse", *OBJECTIVES} - {"prediction_kl"}
    assert found["prediction_mse"].item() == found["soft_targets"].item()


def test_extreme_models_have_finite_losses_and_gradients() -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student, plan = small(teacher)
    with torch.no_grad():
        student.classifier.weight.mul_(1e6)
        teacher.classifier.weight.mul_(-1e6)
        student.bert.encoder.layer[0].attention.self.query.weight.mul_(1e4)
    found = computed(student, teacher, plan, tiny_batch())
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(math.isfinite(value.item()) for value in found.values())
    for name, parameter in student.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))),
        ("last", ((4, 12),)),
        (2, ((0, 0), (2, 6), (4, 12))),
        (3, ((1, 3), (4, 12))),
        (9, ((4, 12),)),
    ],
)
def test_which_hidden_states_meet(which: Any, expected: Any) -> None:
    assert pair_states((2, 5, 8, 11), which) == expected


def test_weights_rise_or_wait() -> None:
    section = losses(**ALL, warmup_fraction=0.2, adversarial_warmup_fraction=0.5)
    weights = objective_weights(section, 10)
    assert [weights["attention_mse"].at(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert [weights["adversarial"].at(step) for step in (4, 5)] == [0.0, 1.0]
    assert weights["prediction_mse"] == weights["prediction_kl"]


def test_what_cannot_be_compared_is_refused_with_a_remedy() -> None:
    teacher = tiny_bert()
    student, plan = small(teacher, hidden_size=8, num_heads=1)
    with pytest.raises(ConversionError, match="head by head"):
        build_companion(
            student,
            teacher,
            losses(attention_weight=1.0),
            num_pairs=1,
            hidden_ids=plan.hidden_ids,
        )
    with pytest.raises(ConversionError, match="belong together"):
        build_companion(student, teacher, losses(), num_pairs=1)


def test_nothing_is_added_where_nothing_is_needed() -> None:
    teacher = tiny_bert()
    companion = build_companion(tiny_bert(), teacher, ObjectivesConfig(), num_pairs=3)
    assert not companion.state_dict()
    only = build_companion(tiny_bert(), teacher, losses(mapping_weight=1.0), num_pairs=3)
    assert len(list(only.parameters())) == 3


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))),
        ("last", ((1, 1), (4, 4))),
        (2, ((1, 1), (2, 2), (4, 4))),
    ],
)
def test_states_of_two_stacks_meet_stack_by_stack(
    which: str | int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert pair_stacks((1, 2), which) == expected


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_hidden_loss_is_the_sum_over_both_stacks(family: str) -> None:
    teacher, student = build_model(family).eval(), build_model(family).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    end = student.config.eos_token_id
    ids = torch.tensor([[5, 6, 7, end], [8, end, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    terms = distill_terms(student, teacher, batch | {"labels": torch.tensor([0, 1])}).terms
    with torch.no_grad():
        own, other = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    real = batch["attention_mask"].bool()
    expected = sum(
        (a[real] - b[real]).square().sum() / 16
        for name in ("encoder_hidden_states", "decoder_hidden_states")
        for a, b in zip(own[name], other[name], strict=True)
    )
    torch.testing.assert_close(terms["hidden_mse"].sum, expected)
