from __future__ import annotations

import math

import pytest
import torch

from moe_dist.tasks import retrieval
from moe_dist.tasks.retrieval import ranks


@pytest.mark.parametrize("at_a_time", [1, 70, 2**24])
def test_ranks_are_those_of_sorted_cosines(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_COSINES", at_a_time)
    torch.manual_seed(0)
    questions, passages = torch.randn(40, 8), torch.randn(30, 8) * torch.rand(30, 1)
    answers = torch.randint(0, 30, (40,))
    found = ranks(questions, passages, answers)
    for question, answer, rank in zip(questions, answers, found, strict=True):
        cosines = torch.cosine_similarity(question[None], passages)
        order = cosines.argsort(descending=True).tolist()
        assert rank == 1 + order.index(int(answer))


def test_ties_count_against_the_right_passage() -> None:
    passages = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    questions = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert ranks(questions, passages, torch.tensor([1, 2])).tolist() == [3, 1]


def test_equal_vectors_tie_whatever_is_rounded() -> None:
    torch.manual_seed(1)
    passages = torch.randn(1, 384).repeat(501, 1)
    found = ranks(torch.randn(7, 384), passages, torch.arange(7))
    assert found.tolist() == [501] * 7


def test_what_is_no_number_comes_last() -> None:
    passages = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    broken = torch.tensor([[math.nan, 1.0], [1.0, 0.0]])
    assert ranks(broken, passages, torch.tensor([0, 0])).tolist() == [3, 1]
    passages[0, 0] = math.nan
    assert ranks(torch.tensor([[1.0, 0.0]]), passages, torch.tensor([0])).tolist() == [3]


def test_no_questions_have_no_ranks() -> None:
    assert ranks(torch.zeros(0, 2), torch.ones(3, 2), torch.zeros(0).long()).tolist() == []
