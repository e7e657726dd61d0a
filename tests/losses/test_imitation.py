"""How far a student is from its teacher, sample by sample, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.losses.imitation import hidden_errors


def states(seed: int, *, layers: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, 6, generator=generator) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])


def test_hidden_errors_equal_the_loop_over_tokens() -> None:
    own, other = states(0), states(1)
    found = hidden_errors(own, other, MASK)
    for sample in range(4):
        parts = []
        for student, teacher in zip(own, other, strict=True):
            gap = whole = 0.0
            for token in range(5):
                if MASK[sample, token]:
                    one, two = student[sample, token], teacher[sample, token]
                    gap += sum((float(a) - float(b)) ** 2 for a, b in zip(one, two, strict=True))
                    whole += sum(float(b) ** 2 for b in two)
            parts.append(gap / whole)
        assert float(found[sample]) == pytest.approx(sum(parts) / 3, rel=1e-5)


def test_a_copy_misses_nothing_and_zeros_everything() -> None:
    teacher = states(1)
    assert hidden_errors(teacher, teacher, MASK).tolist() == [0.0] * 4
    nothing = [torch.zeros_like(state) for state in teacher]
    assert hidden_errors(nothing, teacher, None).tolist() == pytest.approx([1.0] * 4)


def test_padding_of_any_value_does_not_count() -> None:
    own, other = states(0), states(1)
    expected = hidden_errors(own, other, MASK)
    for state in (*own, *other):
        state[~MASK.bool()] = math.nan
    assert torch.equal(hidden_errors(own, other, MASK), expected)


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal depth and width"):
        hidden_errors(states(0, layers=2), states(1), MASK)
    with pytest.raises(ValueError, match="equal depth and width"):
        hidden_errors([state[..., :4] for state in states(0)], states(1), MASK)
