"""Sentence vectors and feature losses against loops, with padding, and at the edges."""

from __future__ import annotations

import pytest
import torch

from moe_dist.losses.alignment import POOLINGS, alignment_mse, mapping_mse

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_vectors_equal_the_loop_over_sentences() -> None:
    hidden = torch.randn(2, 3, 4) - 5.0
    for sample in range(2):
        real = hidden[sample, : int(MASK[sample].sum())]
        for name, expected in (
            ("cls", real[0]),
            ("mean", real.mean(dim=0)),
            ("max", real.max(dim=0).values),
        ):
            torch.testing.assert_close(POOLINGS[name](hidden, MASK)[sample], expected)


@pytest.mark.parametrize("name", POOLINGS)
def test_vectors_do_not_see_padding_even_where_it_is_nan(name: str) -> None:
    short = torch.randn(2, 3, 4)
    wide = torch.cat([short, torch.full((2, 2, 4), torch.nan)], dim=1).requires_grad_()
    found = POOLINGS[name](wide, torch.tensor([[1, 1, 1, 0, 0]] * 2))
    torch.testing.assert_close(found, POOLINGS[name](short, None))
    found.sum().backward()
    assert wide.grad is not None and bool((wide.grad[:, 3:] == 0).all())


@pytest.mark.parametrize("name", POOLINGS)
def test_vectors_are_float32_and_extreme_states_stay_finite(name: str) -> None:
    hidden = torch.full((1, 3, 2), -6e4, dtype=torch.bfloat16)
    found = POOLINGS[name](hidden, torch.tensor([[1, 1, 0]]))
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, hidden[:, 0].float())


def test_alignment_by_hand() -> None:
    loss = alignment_mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0]] * 2))
    assert loss.item() == 2.5
    with pytest.raises(ValueError, match="teacher's width"):
        alignment_mse(torch.zeros(2, 3), torch.zeros(2, 4))


def test_mapping_equals_the_loop_over_tokens() -> None:
    student = [torch.randn(2, 3, 2) for _ in range(2)]
    teacher = [torch.randn(2, 3, 4) for _ in range(2)]
    weights = [torch.randn(4, 2) for _ in range(2)]
    expected = 0.0
    for own, other, weight in zip(student, teacher, weights, strict=True):
        for sample in range(2):
            for token in range(int(MASK[sample].sum())):
                gap = weight @ own[sample, token] - other[sample, token]
                expected += float(gap.square().mean())
    found = mapping_mse(student, teacher, weights, MASK)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="one for each"):
        mapping_mse(student, teacher, weights[:1], MASK)
