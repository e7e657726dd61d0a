"""Every family that can answer questions: its head, what padding changes, and importance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.heads import answered_kind
from moe_dist.data.encoding import Encoded
from moe_dist.data.loaders import TrainBatches, eval_batches
from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.pretrained import check_pretrained, load_pretrained
from moe_dist.tasks import TASK_KINDS
from moe_dist.training.step import distill_terms
from tests.conversion.dense_models import EVERY_FAMILY, VOCAB_SIZE, kinds_of, tiny_model
from tests.inference.start_models import SPECIAL, edit_weights, write_tokenizer

KIND = TASK_KINDS["question_answering"]
FAMILIES = [name for name in EVERY_FAMILY if "ForQuestionAnswering" in kinds_of(name)]


def windows(lengths: list[int], seed: int = 0) -> Encoded:
    """Samples of three tokens of a question and a context, the answers anywhere."""
    draw = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    places = np.concatenate([np.arange(length) for length in lengths])
    ends = np.array([sorted(draw.integers(0, length, 2)) for length in lengths])
    return Encoded(
        input_ids=draw.integers(3, VOCAB_SIZE, offsets[-1]).astype(np.int32),
        token_type_ids=None,
        offsets=offsets,
        labels=ends,
        sample_ids=np.arange(len(lengths)),
        columns={"is_context": (places > 2).astype(np.int32)},
    )


def test_most_families_can() -> None:
    assert {"bert", "roberta", "modernbert", "gpt2", "llama", "t5", "bart"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_same_whatever_stands_beside_them(family: str) -> None:
    dense = tiny_model(family, "ForQuestionAnswering")
    scores = score_importance(dense, eval_batches(windows([9, 6, 4]), batch_size=3))
    alone = score_importance(dense, eval_batches(windows([9, 6, 4]), batch_size=1))
    for one, other in zip(scores, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    plan = plan_partition(scores, num_experts=2, expert_size=16, num_shared_neurons=4)
    student = dense_to_moe(dense, plan, router="hash_random").eval()
    for model in (dense, student):
        assert answered_kind(model) is KIND
        found: dict[int, list[Any]] = {}
        for batch_size in (1, 3):
            for batch in eval_batches(windows([9, 6, 4]), batch_size=batch_size):
                with torch.no_grad():
                    output = model(**KIND.inputs(model, batch))
                    predictions = KIND.predictions(model, output, batch)
                    losses = KIND.losses(predictions, batch)
                    answers = KIND.answer(model, batch, {})
                for row, place in enumerate(batch["index"].tolist()):
                    found.setdefault(place, []).append((losses[row], answers[row]))
        for (loss, answer), (other, same) in found.values():
            torch.testing.assert_close(loss, other, rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(answer, same, rtol=2e-4, atol=2e-4)


def given(family: str, head: str) -> Any:
    return tiny_model(family, head, **{"num_labels": 2} if "Classification" in head else {})


def start(folder: Path, family: str, head: str) -> str:
    """Write a start model, whose tokenizer pads and ends as it says."""
    own = family.partition("-")[0]
    write_tokenizer(folder, own if own in SPECIAL else "bert")
    given(family, head).save_pretrained(folder)
    return str(folder)


def load(folder: str, seed: int) -> Any:
    check_pretrained(folder, num_labels=2, kind=KIND)
    model, _ = load_pretrained(folder, num_labels=2, kind=KIND, seed=seed)
    assert type(model).__name__.endswith("ForQuestionAnswering")
    assert model.config.num_labels == 2
    return model


def split(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the head, and those of the body without the body's own prefix."""
    head, body = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith(("qa_outputs.", "classifier.")):
            head[name] = value.clone()
        elif not name.startswith("head."):  # ModernBERT's lies between the two
            body[name.removeprefix(f"{model.base_model_prefix}.")] = value
    return head, body


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_was_trained_for_questions_is_kept(family: str, tmp_path: Path) -> None:
    trained = start(tmp_path, family, "ForQuestionAnswering")
    (first, body), (second, _) = (split(load(trained, seed)) for seed in (0, 1))
    torch.testing.assert_close(first, second)
    expected_head, expected_body = split(given(family, "ForQuestionAnswering"))
    torch.testing.assert_close(first, expected_head)
    torch.testing.assert_close(body, expected_body)
    checked = check_pretrained(trained, num_labels=2, kind=KIND)
    assert checked.is_whole and checked.notes == ()


STARTS = [
    (family, head)
    for family in FAMILIES
    for head in dict.fromkeys(
        [kinds_of(family)[0], "ForSequenceClassification", "Model", "ForMaskedLM"]
    )
    if head in kinds_of(family)
]


@pytest.mark.parametrize(
    ("family", "head"),
    [*STARTS, ("bert", "ForTokenClassification"), ("modernbert", "ForTokenClassification")],
)
def test_a_head_is_new_where_there_was_another_or_none(
    family: str, head: str, tmp_path: Path
) -> None:
    folder = start(tmp_path / "start", family, head)
    model = load(folder, 0)
    (first, body), (second, _) = (split(one) for one in (model, load(folder, 1)))
    weights = [name for name in first if name.endswith("weight")]
    assert weights and not any(torch.equal(first[name], second[name]) for name in weights)
    checked = check_pretrained(folder, num_labels=2, kind=KIND)
    assert not checked.is_whole and checked.notes[0].startswith("new: ")
    expected = split(given(family, head))[1]
    for name, value in body.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    again = load_model(save_model(model, tmp_path / "saved"))
    batch = next(iter(eval_batches(windows([9, 6, 4]), batch_size=3)))
    with torch.no_grad():
        both = [
            KIND.predictions(one, one(**KIND.inputs(one, batch)), batch)
            for one in (model.eval(), again)
        ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "t5", "bert"])
def test_a_wrapper_around_the_start_model_is_named_as_it_stands(
    family: str, tmp_path: Path
) -> None:
    folder = start(tmp_path, family, kinds_of(family)[0])
    edit_weights(tmp_path, lambda own: {f"model.{name}": one for name, one in own.items()})
    with pytest.raises(ConversionError) as caught:
        load(folder, 0)
    assert "begin with 'model." in caught.value.message
    assert "take 'model." in caught.value.remedy


def test_a_head_of_three_classes_makes_no_trouble(tmp_path: Path) -> None:
    tiny_model("bert", num_labels=3).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "bert")
    model, _ = load_pretrained(str(tmp_path), num_labels=2, kind=KIND)
    assert model.qa_outputs.weight.shape[0] == model.config.num_labels == 2


def test_a_family_without_such_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig

    CLIPTextConfig(vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"no model for data.kind=question_answering"):
        load_pretrained(str(tmp_path), num_labels=2, kind=KIND)


def test_a_step_is_the_same_however_it_is_cut() -> None:
    teacher, student = (tiny_model("bert", "ForQuestionAnswering") for _ in range(2))
    with torch.no_grad():
        student.qa_outputs.weight.mul_(0.5)
    found = []
    for world_size, accumulation in ((1, 1), (1, 3), (2, 2)):
        sums: dict[str, float] = {}
        for rank in range(world_size):
            batches = TrainBatches(
                windows([9, 6, 4, 12, 7, 5]),
                batch_size=6,
                world_size=world_size,
                rank=rank,
                accumulation=accumulation,
            )
            (step,) = batches.epoch(0)
            for batch in step.micro_batches:
                made = distill_terms(
                    student, teacher, batch, objectives=("prediction_kl", "soft_targets")
                )
                for name, term in made.terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term.sum.detach())
        found.append(sums)
    assert set(found[0]) == {"task", "prediction_kl", "soft_targets"}
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
