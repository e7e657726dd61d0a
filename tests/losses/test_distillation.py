"""Distillation losses against values computed the naive way, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moe_dist.losses.distillation import (
    hidden_mse,
    prediction_kl,
    prediction_mse,
    soft_targets,
)


def test_prediction_kl_equals_the_definition() -> None:
    student = torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.0, -1.0]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, -2.0]])
    expected = 0.0
    for row_s, row_t in zip(student.double(), teacher.double(), strict=True):
        p, q = row_s.softmax(-1), row_t.softmax(-1)
        expected += 0.5 * float((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert float(prediction_kl(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_prediction_kl_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): both directions add up to (1/4) ln 3.
    student = torch.tensor([[math.log(3.0), 0.0]])
    teacher = torch.zeros(1, 2)
    assert float(prediction_kl(student, teacher)) == pytest.approx(math.log(3.0) / 8, rel=1e-6)


def test_prediction_kl_is_symmetric_and_zero_for_equals() -> None:
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    assert float(prediction_kl(a, b)) == pytest.approx(float(prediction_kl(b, a)), rel=1e-5)
    assert float(prediction_kl(a, a)) == 0.0
    assert float(prediction_kl(a, a + 7.0)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_equal_the_definition(temperature: float) -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    expected = 0.0
    for row_s, row_t in zip(student.double(), teacher.double(), strict=True):
        p, q = (row_t / temperature).softmax(-1), (row_s / temperature).softmax(-1)
        expected += temperature**2 * float((p * (p / q).log()).sum())
    found = soft_targets(student, teacher, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(soft_targets(student, student)) == 0.0


def test_soft_targets_teach_what_the_cross_entropy_with_them_teaches() -> None:
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    (own,) = torch.autograd.grad(soft_targets(student, teacher), student)
    entropy = torch.nn.functional.cross_entropy(student, teacher.softmax(-1), reduction="sum")
    (other,) = torch.autograd.grad(entropy, student)
    torch.testing.assert_close(own, other)


def test_temperature_divides_logits_and_keeps_the_scale() -> None:
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    expected = 9.0 * float(prediction_kl(a / 3.0, b / 3.0))
    assert float(prediction_kl(a, b, 3.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("loss_of", [prediction_kl, soft_targets])
def test_extreme_logits_stay_finite(
    dtype: torch.dtype, temperature: float, loss_of: Callable[..., torch.Tensor]
) -> None:
    student = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4], [-1e4, 1e4], [1e4, 0.0]], dtype=dtype)
    loss = loss_of(student, teacher, temperature)
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 1e4
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_prediction_kl_names_its_mistakes() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        prediction_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature"):
        prediction_kl(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)


def test_prediction_mse_sums_over_samples() -> None:
    loss = prediction_mse(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]))
    assert float(loss) == 5.0


def test_hidden_mse_equals_the_loop_over_tokens() -> None:
    student = [torch.randn(2, 3, 4) for _ in range(3)]
    teacher = [torch.randn(2, 3, 4) for _ in range(3)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = 0.0
    for layer in range(3):
        for sample in range(2):
            for token in range(3):
                if mask[sample, token]:
                    gap = student[layer][sample, token] - teacher[layer][sample, token]
                    expected += float((gap**2).mean())
    assert float(hidden_mse(student, teacher, mask)) == pytest.approx(expected, rel=1e-5)


def test_hidden_mse_does_not_see_padding() -> None:
    short = torch.randn(2, 3, 4)
    target = torch.randn(2, 3, 4)
    garbage = torch.full((2, 2, 4), torch.nan)
    padded = torch.cat([short, garbage], dim=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    loss = hidden_mse([padded], [torch.cat([target, garbage], dim=1)], mask)
    loss.backward()
    assert float(loss) == pytest.approx(float(hidden_mse([short], [target], None)), rel=1e-6)
    assert padded.grad is not None
    assert bool((padded.grad[:, 3:] == 0).all()) and bool((padded.grad[:, :3] != 0).all())


def test_hidden_mse_computes_in_float32() -> None:
    student = [torch.full((1, 1, 2), 1.0, dtype=torch.bfloat16)]
    teacher = [torch.full((1, 1, 2), 1.0078125, dtype=torch.bfloat16)]
    loss = hidden_mse(student, teacher, None)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0.0078125**2, rel=1e-6)


def test_hidden_mse_names_unequal_models() -> None:
    one, two = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 3)] * 2
    with pytest.raises(ValueError, match="equal depth"):
        hidden_mse(one, two, None)
    with pytest.raises(ValueError, match="equal width"):
        hidden_mse(one, [torch.zeros(1, 2, 4)], None)
    with pytest.raises(ValueError, match="output_hidden_states"):
        hidden_mse([], [], None)


def test_hidden_mse_of_many_numbers_is_summed_as_exactly_as_of_few() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(64, 512, 768, generator=generator)
    right = float(student.double().square().sum() / 768)
    assert float(hidden_mse([student], [torch.zeros_like(student)], None)) == pytest.approx(
        right, rel=1e-5
    )
