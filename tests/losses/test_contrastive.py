"""Finding a text's own passage among those of the batch, against a loop over single pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_dist.losses.contrastive import SCALE, in_batch_negatives


def slow_losses(first_BD: Tensor, second_BD: Tensor, texts: list[tuple[str, str]]) -> list[float]:
    """One sum for each pair, by its own text."""
    losses = []
    for own, (question, passage) in enumerate(texts):
        scores = []
        for other, (other_question, other_passage) in enumerate(texts):
            is_answer = other_passage in (passage, question) or other_question == question
            if other == own or not is_answer:
                a, b = first_BD[own].double(), second_BD[other].double()
                scores.append((other, SCALE * float(a @ b / a.norm() / b.norm())))
        total = math.log(sum(math.exp(score) for _, score in scores))
        losses.append(total - dict(scores)[own])
    return losses


def numbered(texts: list[tuple[str, str]]) -> Tensor:
    known = sorted({text for pair in texts for text in pair})
    return torch.tensor([[known.index(text) for text in pair] for pair in texts])


TEXTS = [("q", "a"), ("qq", "b"), ("qqq", "a"), ("qq", "c"), ("qqqq", "d")]


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 8, generator=generator) for _ in range(2))
    return first, second


def test_each_text_is_told_from_the_others_that_do_not_answer_it(
    vectors: tuple[Tensor, Tensor],
) -> None:
    found = in_batch_negatives(*vectors, numbered(TEXTS))
    assert found.tolist() == pytest.approx(slow_losses(*vectors, TEXTS), rel=1e-5, abs=1e-6)


def test_distinct_texts_have_the_loss_of_sentence_transformers(
    vectors: tuple[Tensor, Tensor],
) -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    official = losses.MultipleNegativesRankingLoss(torch.nn.Identity())
    distinct = torch.arange(10).reshape(5, 2)
    expected = official.compute_loss_from_embeddings(list(vectors), None)
    torch.testing.assert_close(in_batch_negatives(*vectors, distinct).mean(), expected)


def test_a_text_is_no_negative_of_itself(vectors: tuple[Tensor, Tensor]) -> None:
    both_ways = [("a", "b"), ("b", "a"), ("a", "c"), ("d", "e"), ("f", "f")]
    found = in_batch_negatives(*vectors, numbered(both_ways))
    assert found.tolist() == pytest.approx(slow_losses(*vectors, both_ways), rel=1e-5, abs=1e-6)


def test_equal_passages_are_no_negatives_of_each_other(vectors: tuple[Tensor, Tensor]) -> None:
    first, second = vectors
    alike = torch.tensor([[0, 9], [1, 9], [2, 9], [3, 9], [4, 9]])
    assert in_batch_negatives(first, second, alike).tolist() == [0.0] * 5
    same_question = alike.flip(1)
    assert in_batch_negatives(first, second, same_question).tolist() == [0.0] * 5


def test_a_pair_alone_has_nothing_to_be_told_from(vectors: tuple[Tensor, Tensor]) -> None:
    first, second = vectors
    assert in_batch_negatives(first[:1], second[:1], torch.tensor([[0, 1]])).tolist() == [0.0]


def test_lengths_do_not_count_and_half_precision_is_computed_in_full(
    vectors: tuple[Tensor, Tensor],
) -> None:
    first, second = (side.bfloat16() for side in vectors)
    expected = in_batch_negatives(first.float(), 3 * second.float(), numbered(TEXTS))
    found = in_batch_negatives(first, second, numbered(TEXTS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_the_gradient_is_that_of_finite_differences(vectors: tuple[Tensor, Tensor]) -> None:
    first, second = (side.requires_grad_() for side in vectors)
    in_batch_negatives(first, second, numbered(TEXTS)).sum().backward()
    step = 1e-4
    for side, leaf in enumerate((first, second)):
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
        for place in ((0, 0), (3, 5)):
            sums = []
            for sign in (1, -1):
                moved = [one.detach().double().clone() for one in (first, second)]
                moved[side][place] += sign * step
                sums.append(sum(slow_losses(moved[0], moved[1], TEXTS)))
            expected = (sums[0] - sums[1]) / (2 * step)
            assert float(leaf.grad[place]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
