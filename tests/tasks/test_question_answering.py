"""Questions and contexts: windows, labels, losses, answers and figures, against slow oracles."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_dist.config.question_checks import STRIDE as RECIPE_STRIDE
from moe_dist.data.encoding import encode
from moe_dist.data.loaders import eval_batches
from moe_dist.data.samples import Sample, to_dataset
from moe_dist.data.tasks import TaskSpec
from moe_dist.errors import ConversionError, DataError
from moe_dist.losses.distillation import prediction_kl
from moe_dist.tasks import TASK_KINDS, Answered, TokenRows
from moe_dist.tasks.answer_spans import MASKED, best_spans
from moe_dist.tasks.question_answering import STRIDE
from tests.tasks.test_tokens import SlowTokenizer, bert, gpt2, t5

KIND = TASK_KINDS["question_answering"]
WORDS = "the end a b c d e f".split()


def roberta() -> Any:
    """Two separators between the texts, and no segments."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


TOKENIZERS = {"bert": bert, "roberta": roberta, "t5": t5, "gpt2": gpt2}


def answer(context: str, text: str) -> dict[str, Any]:
    return {"text": text, "answer_start": context.index(text)}


def columns(*rows: tuple[str, str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    return {
        "text_a": [question for question, _, _ in rows],
        "text_b": [context for _, context, _ in rows],
        "label": [json.dumps(answers) for _, _, answers in rows],
        "sample_id": list(range(len(rows))),
    }


def random_rows(num_rows: int, seed: int) -> dict[str, list[Any]]:
    draw = random.Random(seed)
    rows = []
    for number in range(num_rows):
        words = draw.choices(WORDS, k=draw.randint(1, 40))
        context = (" " if number % 3 else "  ").join(words)
        first = draw.randrange(len(words))
        sizes = [len(word) for word in words]
        gap = 1 if number % 3 else 2
        start = sum(sizes[:first]) + gap * first
        end = start + len(words[first])
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))
        answers = [{"text": context[start:end], "answer_start": start}] if number % 4 else []
        rows.append((question, context, answers))
    return columns(*rows)


def published_features(
    rows: dict[str, list[Any]], tokenizer: Any, max_length: int, stride: int
) -> list[tuple[list[int], list[int] | None, int, tuple[int, int]]]:
    """What `run_qa` of transformers makes of the rows, for one at a time."""
    found = []
    for row, (question, context) in enumerate(zip(rows["text_a"], rows["text_b"], strict=True)):
        made = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers = json.loads(rows["label"][row])
        for index, ids in enumerate(made["input_ids"]):
            offsets, sequences = made["offset_mapping"][index], made.sequence_ids(index)
            label = (0, 0)
            if answers:
                start = answers[0]["answer_start"]
                end = start + len(answers[0]["text"])
                first = sequences.index(1)
                last = len(sequences) - 1 - sequences[::-1].index(1)
                if offsets[first][0] <= start and offsets[last][1] >= end:
                    # Within the context: published code counts on separators around it.
                    begin, stop = first, last
                    while first <= stop and offsets[first][0] <= start:
                        first += 1
                    while last >= begin and offsets[last][1] >= end:
                        last -= 1
                    label = (first - 1, max(first - 1, last + 1))
            types = made["token_type_ids"][index] if "token_type_ids" in made else None
            found.append((ids, types, row, label))
    return found


@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize(("max_length", "stride"), [(16, 4), (24, 0), (64, 20)])
def test_windows_and_labels_are_those_of_published_code(
    family: str, max_length: int, stride: int
) -> None:
    tokenizer, rows = TOKENIZERS[family](), random_rows(40, seed=max_length)
    made = KIND.tokens(
        rows, tokenizer, max_length=max_length, is_training=True, options={"stride": stride}
    )
    expected = published_features(rows, tokenizer, max_length, stride)
    assert len(made.input_ids) == len(expected) > (40 if max_length < 40 else 39)
    types: Any = made.token_type_ids
    if types is None:
        types = [None] * len(expected)
    found = zip(made.input_ids, types, made.rows, made.labels, strict=True)
    for (ids, own_types, row, label), (other, other_types, number, right) in zip(
        found, expected, strict=True
    ):
        assert (list(ids), row, tuple(label)) == (other, number, right)
        assert own_types is None or list(own_types) == other_types


def test_blanks_around_an_answer_belong_to_no_token_of_it() -> None:
    tokenizer = next(iter(TOKENIZERS.values()))()
    context = "  ".join(WORDS[:3])
    start = context.index(WORDS[1])
    labels = []
    for around in ("", " "):
        text = f"{around}{WORDS[1]}{around}"
        answers = [{"text": text, "answer_start": start - len(around)}]
        made = KIND.tokens(
            columns((WORDS[0], context, answers)), tokenizer, max_length=32, is_training=True
        )
        labels.append(made.labels[0])
    assert labels[0] == labels[1] != (0, 0)


def test_tokens_know_their_characters_in_the_context() -> None:
    context = "the end </s> [SEP] a"
    for family, make in TOKENIZERS.items():
        rows = columns(("a </s> b", context, [answer(context, "a")]))
        made = KIND.tokens(rows, make(), max_length=64, is_training=True)
        parts = [
            context[start:end]
            for start, end, own in zip(
                made.columns["char_start"][0],
                made.columns["char_end"][0],
                made.columns["is_context"][0],
                strict=True,
            )
            if own
        ]
        assert "".join(parts).replace(" ", "") == context.replace(" ", ""), family
        start, end = made.labels[0]
        assert start == end and context[made.columns["char_start"][0][start] :] == "a"


def test_a_question_that_leaves_no_room_is_refused() -> None:
    rows = columns(("the end " * 6, "a b c d e f", []))
    with pytest.raises(DataError, match=r"the question 'the end .* has 15 tokens .* leaves 1 of"):
        KIND.tokens(rows, bert(), max_length=16, is_training=True, options={"stride": 2})
    # A context that fits needs no overlap.
    made = KIND.tokens(rows, bert(), max_length=21, is_training=True, options={"stride": 12})
    assert len(made.input_ids) == 1


def test_a_context_of_nothing_that_is_a_token_is_refused() -> None:
    with pytest.raises(DataError, match="the context of 'a' gives no tokens"):
        KIND.tokens(columns(("a", "\u200b \n", [])), bert(), max_length=16, is_training=True)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"SlowTokenizer\) does not say which characters"):
        KIND.tokens(columns(("a", "b", [])), SlowTokenizer(), max_length=16, is_training=True)


def test_blanks_before_a_question_are_no_tokens() -> None:
    made = KIND.tokens(columns((" \t" * 400 + "a", "b", [])), t5(), max_length=16, is_training=True)
    assert len(made.input_ids[0]) < 16


class Output:
    def __init__(self, num_samples: int, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.start_logits = torch.randn(num_samples, length, generator=generator)
        self.end_logits = torch.randn(num_samples, length, generator=generator)


def batch_of(lengths: list[int], width: int, labels: list[tuple[int, int]]) -> dict[str, Tensor]:
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return {"attention_mask": mask.long(), "labels": torch.tensor(labels)}


def test_losses_are_means_of_both_ends_whatever_the_padding() -> None:
    output, batch = Output(2, 9), batch_of([6, 9], 9, [(1, 4), (0, 0)])
    predictions = KIND.predictions(None, output, batch)
    for row, length in enumerate((6, 9)):
        expected = 0.0
        for end, logits in enumerate((output.start_logits, output.end_logits)):
            own = logits[row, :length].double()
            expected += float(own.logsumexp(0) - own[batch["labels"][row, end]]) / 2
        assert float(KIND.losses(predictions, batch)[row]) == pytest.approx(expected, rel=1e-6)


def test_distances_leave_padding_out_and_are_finite() -> None:
    batch = batch_of([6, 9], 9, [(0, 0), (0, 0)])
    student = KIND.predictions(None, Output(2, 9, 1), batch)
    teacher = KIND.predictions(None, Output(2, 9, 2), batch)
    found = KIND.prediction_errors(student, teacher, batch, 0.5)
    for row, length in enumerate((6, 9)):
        parts = [
            prediction_kl(
                student[row : row + 1, :length, end], teacher[row : row + 1, :length, end], 0.5
            )
            for end in range(2)
        ]
        torch.testing.assert_close(found[row], sum(parts) / 2)
    torch.testing.assert_close(KIND.prediction_loss(student, teacher, batch, 0.5), found.sum())
    soft = KIND.soft_target_loss(student, teacher, batch, 0.5)
    assert torch.isfinite(soft) and soft > 0
    assert float(KIND.soft_target_loss(teacher, teacher, batch)) == pytest.approx(0, abs=1e-6)
    low = KIND.predictions(None, Output(2, 9, 1), batch).bfloat16()
    assert torch.isfinite(KIND.losses(low, batch)).all()


def nbest(scores: Tensor, is_context: Tensor, max_length: int, size: int) -> tuple[Any, ...]:
    """The best answer as `postprocess_qa_predictions` of transformers looks for it."""
    start, end = scores[:, 0].tolist(), scores[:, 1].tolist()
    best: tuple[Any, ...] = ()
    for first in np.argsort(start)[-1 : -size - 1 : -1].tolist():
        for last in np.argsort(end)[-1 : -size - 1 : -1].tolist():
            if not is_context[first] or not is_context[last]:
                continue
            if last < first or last - first + 1 > max_length:
                continue
            if not best or start[first] + end[last] > best[2]:
                best = (first, last, start[first] + end[last])
    return (*best, start[0] + end[0])


@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_the_best_answer_is_that_of_a_search_over_all(max_length: int) -> None:
    generator = torch.Generator().manual_seed(max_length)
    scores = torch.randn(20, 24, 2, generator=generator)
    is_context = torch.zeros(20, 24, dtype=torch.bool)
    for row in range(20):
        is_context[row, row % 7 + 2 : row % 7 + 3 + row] = True
    found = best_spans(scores, is_context, max_length)
    for row in range(20):
        expected = nbest(scores[row], is_context[row], max_length, 24)
        assert found[row].tolist() == pytest.approx(expected)


def answered(made: TokenRows, rows: dict[str, list[Any]], raw: list[list[float]]) -> Answered:
    return Answered(
        raw=np.array(raw, np.float32),
        sample_ids=np.asarray(rows["sample_id"])[list(made.rows)],
        labels=np.asarray(made.labels),
        rows=rows,
        columns={name: np.concatenate(values) for name, values in made.columns.items()},
        offsets=np.cumsum([0, *map(len, made.input_ids)]),
        tokenizer=None,
        options={},
    )


def test_a_question_takes_its_best_window_and_its_least_sure_refusal() -> None:
    first, second = "the end a b c d e f the end", "b d"
    rows = columns(
        ("the", first, [answer(first, "a b"), answer(first, "c d")]), ("end", second, [])
    )
    # Sample ids need not stand in order.
    rows["sample_id"] = [7, 3]
    made = KIND.tokens(rows, bert(), max_length=9, is_training=False, options={"stride": 0})
    assert list(made.rows) == [0, 0, 1]
    # Three tokens, then "the end a b c" and "d e f the end".
    raw = [[5, 6, 1.0, 9.0], [4, 5, 2.5, 3.0], [3, 3, 1.0, 1.5]]
    found = KIND.figures(answered(made, rows, raw))
    assert (found.texts, found.sample_ids.tolist()) == (["e f", "b"], [7, 3])
    assert found.values.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert found.labels.tolist() == [1, 0]
    with_limit = answered(made, rows, raw)
    object.__setattr__(with_limit, "calibration", 0.49)
    found = KIND.figures(with_limit)
    # The gaps are 3 - 2.5, which is not 9 - 2.5, and 1.5 - 1.
    assert found.texts == ["", ""] and found.values.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_the_best_of_several_right_answers_counts() -> None:
    context = "the end of a film"
    rows = columns(("a", context, [answer(context, "of a film"), answer(context, "film")]))
    made = KIND.tokens(rows, bert(), max_length=64, is_training=False)
    place = made.columns["char_start"][0].index(context.index("film"))
    last = len(made.input_ids[0]) - 2
    found = KIND.figures(answered(made, rows, [[place, last, 0.0, 0.0]]))
    assert found.texts == ["film"] and found.values.tolist() == [[1.0, 1.0]]


def test_no_answer_is_given_by_a_threshold_of_training_rows_alone() -> None:
    context = "a b c"
    rows = columns(*[("d", context, [answer(context, "a")])] * 2, *[("e", context, [])] * 2)
    made = KIND.tokens(rows, bert(), max_length=64, is_training=False)
    place = made.columns["is_context"][0].index(1)
    raw = [[place, place, 5.0, none] for none in (1.0, 6.5, 8.0, 9.0)]
    known = answered(made, rows, raw)
    assert KIND.calibrate(known) == pytest.approx(1.5)
    assert KIND.needs_calibration(rows["label"])
    assert not KIND.needs_calibration(rows["label"][:2])


def test_encoded_windows_reach_the_model_with_what_answers_need(tmp_path: Any) -> None:
    rows = random_rows(12, seed=3)
    task = TaskSpec("qa", "question_answering", ("question", "context"))
    samples = [
        Sample(question, context, label, number)
        for number, (question, context, label) in enumerate(
            zip(rows["text_a"], rows["text_b"], rows["label"], strict=True)
        )
    ]
    encoded = encode(
        to_dataset(samples, task),
        bert(),
        max_length=16,
        kind=KIND,
        options={"stride": 2},
        cache_dir=tmp_path,
    )
    assert encoded.labels.shape == (len(encoded), 2) and encoded.labels.dtype == np.int64
    for batch in eval_batches(encoded, batch_size=5):
        shape = batch["input_ids"].shape
        assert batch["is_context"].shape == shape and batch["labels"].shape == (shape[0], 2)
        scores = KIND.predictions(None, Output(*shape), batch)
        padding = batch["attention_mask"] == 0
        assert (scores[padding] == MASKED).all() and (scores[~padding] > MASKED).all()
        found = best_spans(scores, batch["is_context"].bool(), 30)
        for end in (found[:, 0], found[:, 1]):
            assert batch["is_context"].gather(1, end.long().unsqueeze(1)).all()


def test_the_recipes_default_is_the_kinds() -> None:
    assert RECIPE_STRIDE == STRIDE
