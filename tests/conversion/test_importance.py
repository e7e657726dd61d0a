"""One backward for a batch gives what a backward for each sample gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import score_importance
from moe_dist.conversion.families import find_slots
from moe_dist.conversion.importance import task_losses
from moe_dist.errors import ConversionError, MissingInputError
from tests.conversion.dense_models import (
    NUM_NEURONS,
    VOCAB_SIZE,
    tiny_model,
    token_batch,
)


def sample_loop(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The definition, taken literally: weights times their gradients, sample by sample."""
    slots = find_slots(model)
    scores = [torch.zeros(slot.num_neurons) for slot in slots]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            sample = {
                key: value[row : row + 1, :length] if value.dim() == 2 else value[row : row + 1]
                for key, value in batch.items()
            }
            model.zero_grad()
            model(**sample).loss.backward()
            for slot, score_F in zip(slots, scores, strict=True):
                terms = torch.zeros_like(score_F)
                for linear in (slot.linear_in, slot.gate):
                    if linear is not None:
                        weight: Any = linear.weight
                        dim = 0 if slot.spec.transposed else 1
                        parts = (weight * weight.grad).sum(dim=dim).detach()
                        terms += parts.view(-1, len(terms)).sum(dim=0)  # two where they are fused
                weight = slot.linear_out.weight
                terms += (weight * weight.grad).sum(dim=1 if slot.spec.transposed else 0).detach()
                score_F += terms.abs()
    model.zero_grad()
    return scores


def assert_same(scores: list[Tensor], expected: list[Tensor]) -> None:
    assert len(scores) == len(expected)
    for score_F, expected_F in zip(scores, expected, strict=True):
        assert score_F.dtype == torch.float32
        assert float(expected_F.min()) > 0, "a trivial case proves nothing"
        # A neuron's two terms may cancel, so its error is measured against the largest score.
        tolerance = 1e-5 * float(expected_F.max())
        torch.testing.assert_close(score_F, expected_F, rtol=1e-5, atol=tolerance)


def num_hooks(model: Any) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def labelled(seed: int, labels: Tensor) -> dict[str, Tensor]:
    return token_batch(num_samples=len(labels), seed=seed) | {"labels": labels}


def test_classification_with_padding() -> None:
    model = tiny_model("bert", num_labels=3)
    batches = [labelled(1, torch.tensor([0, 2, 1, 1])), labelled(2, torch.tensor([1, 0]))]
    assert_same(score_importance(model, batches), sample_loop(model, batches))


def test_sentence_pairs() -> None:
    model = tiny_model("bert")
    batch = labelled(3, torch.tensor([0, 1, 1, 0]))
    second = torch.arange(batch["input_ids"].shape[1])[None] >= 2
    batch["token_type_ids"] = second.long() * batch["attention_mask"]
    scores = score_importance(model, [batch])
    assert_same(scores, sample_loop(model, [batch]))
    without = score_importance(
        model, [{key: value for key, value in batch.items() if key != "token_type_ids"}]
    )
    assert not torch.allclose(scores[0], without[0])


def test_regression() -> None:
    model = tiny_model("bert", num_labels=1)
    batches = [labelled(4, torch.tensor([0.5, 4.0, 2.25])), labelled(5, torch.tensor([1.0]))]
    assert_same(score_importance(model, batches), sample_loop(model, batches))


def test_multi_label() -> None:
    model = tiny_model("bert", num_labels=3, problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    batch = token_batch(num_samples=2, length=3, seed=6)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = labels
    assert_same(score_importance(model, [batch]), sample_loop(model, [batch]))


def test_question_answering() -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config: Any = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=NUM_NEURONS,
    )
    model = BertForQuestionAnswering(config).eval()
    positions = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    batch = token_batch(num_samples=2, length=5) | positions
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = sample_loop(model, [batch])
    torch.testing.assert_close(score_importance(model, [batch]), expected, rtol=1e-5, atol=1e-8)


def test_chunked_feed_forward() -> None:
    batch = labelled(8, torch.tensor([0, 1]))
    whole = score_importance(tiny_model("bert"), [batch])
    chunked = score_importance(tiny_model("bert", chunk_size_feed_forward=1), [batch])
    assert_same(chunked, whole)


def test_last_block_is_cut_to_the_position_that_the_head_reads() -> None:
    model = tiny_model("bert")
    widths: list[int] = []
    slots = find_slots(model)
    handles = [
        slot.linear_in.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
        for slot in slots
    ]
    batch = labelled(1, torch.tensor([0, 1]))
    cut = score_importance(model, [batch])
    length = batch["input_ids"].shape[1]
    assert widths == [length] * (len(slots) - 1) + [1]
    widths.clear()
    # A loss of the caller's may read every position, so that nothing may be left out.
    whole = score_importance(model, [batch], per_sample_loss=lambda *args: task_losses(*args))
    assert widths == [length] * len(slots)
    for handle in handles:
        handle.remove()
    assert_same(cut, whole)


def test_shards_add_up() -> None:
    model = tiny_model("bert")
    first, second = labelled(1, torch.tensor([0, 1])), labelled(2, torch.tensor([1, 1]))
    both = score_importance(model, [first, second])
    parts = zip(score_importance(model, [first]), score_importance(model, [second]), strict=True)
    torch.testing.assert_close(both, [one + other for one, other in parts])


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.pooler.eval()
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = num_hooks(model)
    with pytest.raises(MissingInputError):
        score_importance(model, [token_batch()])
    score_importance(model, [labelled(1, torch.tensor([0, 1]))])
    assert flags == {name: value.requires_grad for name, value in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert hooks == num_hooks(model)
    assert all(value.grad is None for value in model.parameters())


def test_dropout_plays_no_part() -> None:
    batch = labelled(1, torch.tensor([0, 1]))
    model = tiny_model("bert", hidden_dropout_prob=0.5).train()
    first, second = score_importance(model, [batch]), score_importance(model, [batch])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_works_where_the_caller_needs_no_gradient() -> None:
    batch = labelled(1, torch.tensor([0, 1]))
    model = tiny_model("bert")
    with torch.no_grad():
        scores = score_importance(model, [batch])
    torch.testing.assert_close(scores, score_importance(model, [batch]))


def test_entries_that_the_model_does_not_know_are_ignored() -> None:
    batch = labelled(1, torch.tensor([0, 1]))
    model = tiny_model("bert")
    more = batch | {"index": torch.tensor([4, 5])}
    torch.testing.assert_close(score_importance(model, [more]), score_importance(model, [batch]))


def test_no_batches() -> None:
    with pytest.raises(ConversionError, match="no batches"):
        score_importance(tiny_model("bert"), [])


def test_missing_labels_are_named() -> None:
    with pytest.raises(MissingInputError, match="'labels'"):
        score_importance(tiny_model("bert"), [token_batch()])


def test_model_without_head() -> None:
    model = tiny_model("bert").bert
    with pytest.raises(MissingInputError, match="no task head"):
        score_importance(model, [labelled(1, torch.tensor([0, 1]))])


def test_model_without_known_ffns() -> None:
    with pytest.raises(ConversionError, match=r"Linear has no feed-forward .*\n.*bart, bert"):
        score_importance(torch.nn.Linear(2, 2), [])


def test_scores_that_are_not_finite() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ConversionError, match="not finite"):
        score_importance(model, [labelled(1, torch.tensor([0, 1]))])
