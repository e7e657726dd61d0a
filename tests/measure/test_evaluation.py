"""Predictions over a data set."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.data.loaders import collate
from moe_dist.measure import evaluation
from moe_dist.measure.evaluation import expert_load, gate_entropy, predict
from moe_dist.measure.nearness import measure_errors
from tests.training.tiny import PAD, model_inputs, tiny_bert, tiny_data, tiny_student

CPU = torch.device("cpu")


def test_predictions_come_in_the_data_sets_order() -> None:
    model, data = tiny_bert(), tiny_data(11)
    answers = predict(model, data, batch_size=4, pad_token_id=PAD, device=CPU)
    assert model.training, "the mode is restored"
    model.eval()
    with torch.no_grad():
        for row in range(11):
            alone = collate(data, torch.tensor([row]).numpy(), PAD)
            expected = model(**model_inputs(model, alone)).logits[0]
            torch.testing.assert_close(answers.answers[row], expected, rtol=1e-4, atol=1e-5)


def test_samples_that_are_repeated_for_other_ranks_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = tiny_bert(), tiny_data(11)
    expected = predict(model, data, batch_size=4, pad_token_id=PAD, device=CPU).answers
    real = evaluation.eval_batches

    def twice(*args: object, **options: object) -> object:
        yield from real(*args, **options)
        for batch in real(*args, **options):
            yield batch | {"is_repeat": torch.ones_like(batch["is_repeat"])}

    monkeypatch.setattr(evaluation, "eval_batches", twice)
    again = predict(model, data, batch_size=4, pad_token_id=PAD, device=CPU).answers
    torch.testing.assert_close(again, expected)


def test_loads_are_those_of_real_tokens() -> None:
    data = tiny_data(11)
    student = tiny_student(tiny_bert())
    answers = predict(student, data, batch_size=4, pad_token_id=PAD, device=CPU)
    assert len(answers.tokens_per_expert) == 2
    for count_E in answers.tokens_per_expert.values():
        assert count_E.sum().item() == data.num_tokens
    for shares in expert_load(answers.tokens_per_expert).values():
        assert sum(shares) == pytest.approx(1.0) and len(shares) == 4
    assert expert_load({"idle": torch.zeros(2)}) == {"idle": [0.0, 0.0]}


def test_a_comparison_gives_the_answers_that_each_model_gives_alone() -> None:
    data, teacher = tiny_data(11), tiny_bert().eval()
    student = tiny_student(teacher).eval()
    options = {"batch_size": 4, "pad_token_id": PAD}
    found = measure_errors(teacher, {"student": student}, data, **options, advance=lambda: None)
    assert found.teacher is not None
    for own, model in ((found.teacher, teacher), (found.students["student"], student)):
        alone = predict(model, data, **options, device=CPU)
        assert torch.equal(own.answers, alone.answers)
        for kind in ("tokens_per_expert", "routing_sums"):
            sums, expected = getattr(own, kind), getattr(alone, kind)
            assert sums.keys() == expected.keys()
            assert all(torch.equal(sums[name], expected[name]) for name in sums)
    assert found.students["student"].tokens_per_expert


def test_gates_tell_how_undecided_they_are() -> None:
    student = tiny_student(tiny_bert())
    answers = predict(student, tiny_data(11), batch_size=4, pad_token_id=PAD, device=CPU)
    entropies = gate_entropy(answers.routing_sums)
    assert entropies.keys() == answers.tokens_per_expert.keys()
    assert all(0 < entropy <= math.log(4) + 1e-6 for entropy in entropies.values())
    assert gate_entropy({"unused": torch.zeros(4)}) == {}
    hashed = tiny_student(tiny_bert(), router="hash_random")
    answers = predict(hashed, tiny_data(3), batch_size=2, pad_token_id=PAD, device=CPU)
    assert answers.routing_sums == {}


def test_a_gpu_answers_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        evaluation, "answering", lambda device, fault: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    model, seen = tiny_bert(), list[torch.dtype]()
    model.classifier.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    answers = predict(model, tiny_data(5), batch_size=4, pad_token_id=PAD, device=CPU).answers
    assert set(seen) == {torch.bfloat16} and answers.dtype is torch.float32


def test_the_mode_is_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()

    def fails(*args: object, **inputs: object) -> object:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.bert, "forward", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        predict(model, tiny_data(3), batch_size=2, pad_token_id=PAD, device=CPU)
    assert model.training
