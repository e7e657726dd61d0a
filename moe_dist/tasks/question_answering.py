"""Questions whose answer is a part of a context, or that have none (SQuAD 1.1 and 2.0).

A context that is too long for the model is cut into windows that overlap; each window is a sample.

Shapes: B or N windows, S positions, M questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_dist.errors import DataError
from moe_dist.losses.distillation import prediction_kl, soft_targets
from moe_dist.tasks.kind import Answered, Figures, LabelKind, TaskKind, TokenRows
from moe_dist.tasks.text_scores import ANSWER_COLUMNS, answer_figures, best_threshold
from moe_dist.tasks.tokens import tokenise

STRIDE, MAX_ANSWER_LENGTH = 128, 30
NO_ANSWER = "[]"
"""The label of a question without an answer."""
MASKED = -1e9
"""The logit of padding: no probability in 32-bit floats, and finite after a temperature."""
_BEST_START, _BEST_END, _BEST, _NONE = range(4)
"""What is kept of each window: the best answer's first and last token and its score, and the
score of there being none."""


class QuestionAnswering(TaskKind):
    """Labels are the answers of each question, in JSON; samples are windows of its context."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    label: ClassVar[LabelKind] = "answers"
    metrics = ("exact_match", "answer_f1")
    default_metrics = ("answer_f1", "exact_match")
    prediction_term = "prediction_kl"
    unit = "question"
    columns = ANSWER_COLUMNS
    option_names = ("stride", "max_answer_length")
    measuring_options = ("max_answer_length",)
    text_columns = ("question", "context")
    label_column = "answers"
    calibration_samples = 1024
    is_one_a_row = False
    holds_out_contexts = True

    def owns(self, architecture: str, config: Any) -> bool:
        """Every model that answers questions with a part of the context."""
        return architecture.endswith("ForQuestionAnswering")

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """A score as first token, and one as last."""
        return 2

    def own_head(self, classifier: str) -> str:
        """The layer that gives both scores."""
        return "qa_outputs"

    def model_settings(
        self, label_names: Sequence[str] | None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """Two outputs, under the names that transformers gives them."""
        names = {0: "LABEL_0", 1: "LABEL_1"}
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Cut question and context into windows, each with the whole question.

        Labels are the first and last token of the answer, and the window's first token where it
        holds none, as published code for SQuAD has it. Of several right answers the first counts.
        """
        stride = int(options.get("stride", STRIDE))
        # Some of SQuAD's questions begin with thousands of blanks.
        questions = [question.lstrip() for question in rows["text_a"]]
        tokens = tokenise(tokenizer, questions, rows["text_b"], max_length=None, with_offsets=True)
        made: dict[str, list[Any]] = {name: [] for name in ("rows", "labels", *_TOKEN_COLUMNS)}
        for row, label in enumerate(rows["label"]):
            whole = _Whole.of({key: values[row] for key, values in tokens.items()})
            answer = next(iter(json.loads(label)), None)
            for window in whole.windows(max_length, stride, questions[row]):
                for name in _TOKEN_COLUMNS:
                    made[name].append(whole.cut(name, window))
                made["rows"].append(row)
                made["labels"].append(whole.label(answer, window))
        return TokenRows(
            input_ids=made["input_ids"],
            rows=made["rows"],
            labels=made["labels"],
            token_type_ids=made["token_type_ids"] if "token_type_ids" in tokens else None,
            columns={name: made[name] for name in _OWN_COLUMNS},
        )

    def predictions(self, model: Any, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Scores of each token as first and as last one, (B, S, 2) float32; padding masked.

        Published code masks no padding, so that its loss depends on how long a batch is.
        """
        logits_BS2 = torch.stack((output.start_logits, output.end_logits), dim=-1).float()
        return logits_BS2.masked_fill(~batch["attention_mask"].bool().unsqueeze(-1), MASKED)

    def losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean of the cross entropies of first and last token, (B,)."""
        both_B2 = functional.cross_entropy(
            predictions.float(), batch["labels"].long(), reduction="none"
        )
        return both_B2.mean(dim=-1)

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Symmetric Kullback-Leibler divergence over positions: the mean of first and last."""
        return prediction_kl(_by_end(student), _by_end(teacher), temperature) / 2

    def prediction_errors(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """The same of each sample, (B,)."""
        return torch.func.vmap(lambda own, other: prediction_kl(own.T, other.T, temperature) / 2)(
            student, teacher
        )

    def soft_target_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """See `soft_targets`: the mean of first and last."""
        return soft_targets(_by_end(student), _by_end(teacher), temperature) / 2

    def answer(self, model: Any, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """The best answer in each window and its score, and the score of no answer: (B, 4)."""
        scores_BS2 = self.predictions(model, model(**self.inputs(model, batch)), batch)
        length = int(options.get("max_answer_length", MAX_ANSWER_LENGTH))
        return best_spans(scores_BS2, batch["is_context"].bool(), length)

    def needs_calibration(self, labels: Sequence[Any]) -> bool:
        """Only where some questions have no answer is there a threshold to find."""
        return NO_ANSWER in labels

    def calibrate(self, answered: Answered) -> float | None:
        """Find how much more likely no answer must be than the best one, to be given.

        Of the thresholds that give the highest sum of F1 it is the one nearest to 0, which is what
        published code takes.
        """
        best = _best_of_questions(answered)
        f1 = answer_figures(best.texts, best.right)[:, 1]
        has_answer = np.array([bool(right) for right in best.right])
        return best_threshold(best.gaps, f1 * has_answer, has_answer)[0]

    def figures(self, answered: Answered) -> Figures:
        """Exact match and F1 of each question, whose label is whether it has an answer."""
        best = _best_of_questions(answered)
        limit = np.inf if answered.calibration is None else answered.calibration
        texts = [
            "" if gap > limit else text for text, gap in zip(best.texts, best.gaps, strict=True)
        ]
        return Figures(
            answer_figures(texts, best.right).astype(np.float32),
            np.array([bool(right) for right in best.right], np.int64),
            np.asarray(answered.rows["sample_id"], np.int64),
            texts,
        )


_OWN_COLUMNS = ("is_context", "char_start", "char_end")
_TOKEN_COLUMNS = ("input_ids", "token_type_ids", *_OWN_COLUMNS)


@dataclass(frozen=True)
class _Whole:
    """A question with its context, not cut yet.

    Args:
        columns: lists as long as the tokens, by name.
        first: where the context begins.
        last: its last token.
    """

    columns: Mapping[str, list[int]]
    first: int
    last: int

    @classmethod
    def of(cls, tokens: Mapping[str, list[int]]) -> _Whole:
        """Find the context among a row's tokens."""
        is_context = [int(text == 1) for text in tokens["text"]]
        columns = {
            "input_ids": tokens["input_ids"],
            "token_type_ids": tokens.get("token_type_ids", []),
            "is_context": is_context,
            "char_start": tokens["start"],
            "char_end": tokens["end"],
        }
        length = sum(is_context)
        first = is_context.index(1) if length else 0
        return cls(columns, first, first + length - 1)

    def windows(self, max_length: int, stride: int, question: str) -> Iterator[tuple[int, int]]:
        """Say from where to where of the context each window goes; a DataError if none can be."""
        num_context = self.last - self.first + 1
        shown = question if len(question) <= 60 else f"{question[:59]}…"
        if num_context < 1:
            raise DataError(
                f"the context of {shown!r} gives no tokens", remedy="mend or drop the question"
            )
        num_others = len(self.columns["input_ids"]) - num_context
        room = max_length - num_others
        if num_context > room <= stride:
            raise DataError(
                f"model.max_length={max_length} leaves {max(0, room)} tokens for the context of "
                f"{shown!r}, whose question has {num_others} with its special tokens, and windows "
                f"overlap by data.stride={stride}",
                remedy="raise model.max_length, or lower data.stride",
            )
        start = 0
        while True:
            end = min(start + room, num_context)
            yield self.first + start, self.first + end
            if end == num_context:
                return
            start = end - stride

    def cut(self, name: str, window: tuple[int, int]) -> list[int]:
        """The part of a column that goes with a window: the question is in each."""
        column = self.columns[name]
        return column[: self.first] + column[slice(*window)] + column[self.last + 1 :]

    def label(self, answer: Mapping[str, Any] | None, window: tuple[int, int]) -> tuple[int, int]:
        """Find the first and last token of an answer in a window; 0 where it is not whole there."""
        if answer is None:
            return 0, 0
        start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        starts = self.columns["char_start"][slice(*window)]
        ends = self.columns["char_end"][slice(*window)]
        if starts[0] > start or ends[-1] < end:
            return 0, 0
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(ends, end, side="left"))
        return self.first + first, self.first + last


def best_spans(scores_BS2: Tensor, is_context_BS: Tensor, max_length: int) -> Tensor:
    """Find the best answer of each window among all that the context allows.

    Args:
        scores_BS2: of each token as first and as last one.
        is_context_BS: where an answer may be.
        max_length: tokens of the longest answer.

    Returns:
        (B, 4): position of the first and last token, the sum of their scores, and that of the
        first token of all, which stands for no answer.
    """
    masked_BS2 = scores_BS2.masked_fill(~is_context_BS.unsqueeze(-1), MASKED)
    start_BS, end_BS = masked_BS2.unbind(-1)
    ends_BSL = functional.pad(end_BS, (0, max_length - 1), value=MASKED).unfold(1, max_length, 1)
    sums_BSL = start_BS.unsqueeze(-1) + ends_BSL
    best_B, index_B = sums_BSL.flatten(1).max(dim=1)
    first_B = index_B // max_length
    last_B = first_B + index_B % max_length
    return torch.stack((first_B, last_B, best_B, scores_BS2[:, 0].sum(dim=-1)), dim=1)


@dataclass(frozen=True)
class _Best:
    """The best answer to each question, over its windows.

    Args:
        texts: (M,) of text.
        gaps: (M,) how much higher no answer scores than that.
        right: (M,) the right answers; none where there is none.
    """

    texts: list[str]
    gaps: NDArray[np.float64]
    right: list[list[str]]


def _best_of_questions(answered: Answered) -> _Best:
    raw, sample_ids = answered.raw.astype(np.float64), answered.sample_ids
    ids = np.asarray(answered.rows["sample_id"], np.int64)
    by_id = np.argsort(ids)
    questions = by_id[np.searchsorted(ids, sample_ids, sorter=by_id)]
    # The last window of each question in this order is its best one.
    order = np.lexsort((-np.arange(len(raw)), raw[:, _BEST], questions))
    last = np.flatnonzero(np.diff(questions[order], append=-1))
    best = order[last]
    none = np.full(len(ids), np.inf)
    np.minimum.at(none, questions, raw[:, _NONE])
    places = answered.offsets[best]
    starts = answered.columns["char_start"][places + raw[best, _BEST_START].astype(np.int64)]
    ends = answered.columns["char_end"][places + raw[best, _BEST_END].astype(np.int64)]
    return _Best(
        texts=[
            context[start:end]
            for context, start, end in zip(answered.rows["text_b"], starts, ends, strict=True)
        ],
        gaps=none - raw[best, _BEST],
        right=[[one["text"] for one in json.loads(label)] for label in answered.rows["label"]],
    )


def _by_end(predictions: Tensor) -> Tensor:
    """(B, S, 2) as two distributions over positions for each sample, (2 B, S)."""
    return predictions.transpose(1, 2).flatten(0, 1)
