"""Questions whose answer is a part of a context, or that have none (SQuAD 1.1 and 2.0).

A context that is too long for the model is cut into windows that overlap; each window is a sample.

Shapes: B windows, S positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from moe_dist.errors import DataError
from moe_dist.losses.distillation import prediction_kl, soft_targets
from moe_dist.tasks.answer_spans import MASKED, BestAnswers, best_spans
from moe_dist.tasks.context_windows import OWN_COLUMNS, TOKEN_COLUMNS, Whole
from moe_dist.tasks.kind import Answered, Figures, LabelKind, TaskKind, TokenRows
from moe_dist.tasks.text_scores import ANSWER_COLUMNS, answer_figures, best_threshold
from moe_dist.tasks.tokens import tokenise

STRIDE, MAX_ANSWER_LENGTH = 128, 30
NO_ANSWER = "[]"
"""The label of a question without an answer."""
_SERVED_WINDOWS = 32


class QuestionAnswering(TaskKind):
    """Labels are the answers of each question, in JSON; samples are windows of its context."""

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    label: ClassVar[LabelKind] = "answers"
    metrics = ("exact_match", "answer_f1")
    default_metrics = ("answer_f1", "exact_match")
    prediction_term = "prediction_kl"
    distance = "mean of both ends' symmetric KL divergences"
    unit = "question"
    columns = ANSWER_COLUMNS
    option_names = ("stride", "max_answer_length")
    measuring_options = ("max_answer_length",)
    text_columns = ("question", "context")
    label_column = "answers"
    served_columns: ClassVar[Mapping[str, str]] = {"answer": "text", "score": "number"}
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
        made: dict[str, list[Any]] = {name: [] for name in ("rows", "labels", *TOKEN_COLUMNS)}
        for row, label in enumerate(rows["label"]):
            whole = Whole.of({key: values[row] for key, values in tokens.items()}, questions[row])
            answer = next(iter(json.loads(label)), None)
            for window in whole.windows(max_length, stride):
                for name in TOKEN_COLUMNS:
                    made[name].append(whole.cut(name, window))
                made["rows"].append(row)
                made["labels"].append(whole.label(answer, window))
        return TokenRows(
            input_ids=made["input_ids"],
            rows=made["rows"],
            labels=made["labels"],
            token_type_ids=made["token_type_ids"] if "token_type_ids" in tokens else None,
            columns={name: made[name] for name in OWN_COLUMNS},
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
        scores_BS2 = self.predictions(model, self.run(model, batch), batch)
        length = int(options.get("max_answer_length", MAX_ANSWER_LENGTH))
        return best_spans(scores_BS2, batch["is_context"].bool(), length)

    def needs_calibration(self, labels: Sequence[Any]) -> bool:
        """Only where some questions have no answer is there a threshold to find."""
        return NO_ANSWER in labels

    def calibrate(self, answered: Answered) -> float | None:
        """Find how much more likely no answer must be than the best one, to be given."""
        best = BestAnswers.of(answered)
        has_answer = np.array([bool(right) for right in best.right])
        f1 = answer_figures(best.texts, best.right)[:, 1]
        return best_threshold(best.gaps, np.where(has_answer, f1, 0.0), has_answer)[0]

    def figures(self, answered: Answered) -> Figures:
        """Exact match and F1 of each question, whose label is whether it has an answer."""
        best = BestAnswers.of(answered)
        texts = best.given(answered.calibration)
        return Figures(
            answer_figures(texts, best.right).astype(np.float32),
            np.array([bool(right) for right in best.right], np.int64),
            np.asarray(answered.rows["sample_id"], np.int64),
            texts,
        )

    def serve(
        self,
        model: Any,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        *,
        max_length: int,
        label_names: Sequence[str] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
        calibration: float | None = None,
    ) -> list[dict[str, Any]]:
        """Answer questions from their contexts; the score is the best answer's less that of none.

        Arguments are those of `TaskKind.serve`; a text too few is a DataError.
        """
        if len(columns) != 2:
            raise DataError(
                "the model reads a question and a context",
                remedy='send for example {"inputs": [{"question": "Who?", "context": "Ada."}]}',
            )
        num_rows = len(columns[0])
        rows = {
            "text_a": columns[0],
            "text_b": columns[1],
            "label": [NO_ANSWER] * num_rows,
            "sample_id": range(num_rows),
        }
        made = self.tokens(
            rows, tokenizer, max_length=max_length, is_training=False, options=options
        )
        batches = _batches(made, tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            raw = torch.cat([self.answer(model, batch, options).cpu() for batch in batches])
        best = BestAnswers.of(
            Answered(
                raw=raw.numpy(),
                sample_ids=np.asarray(made.rows, np.int64),
                labels=np.asarray(made.labels),
                rows=rows,
                columns={name: np.concatenate(made.columns[name]) for name in OWN_COLUMNS},
                offsets=np.cumsum([0, *map(len, made.input_ids)]),
                tokenizer=tokenizer,
                options=options,
            )
        )
        return [
            {"answer": text, "score": -gap}
            for text, gap in zip(best.given(calibration), best.gaps.tolist(), strict=True)
        ]

    def served_limit(self, model: Any, max_length: int) -> None:
        """A long context is read in windows, and a question that is too long is refused."""


def _batches(
    made: TokenRows, pad_token_id: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Pad windows to batches, as `answer` takes them."""
    columns = {"input_ids": made.input_ids, **made.columns}
    if made.token_type_ids is not None:
        columns["token_type_ids"] = made.token_type_ids
    for first in range(0, len(made.input_ids), _SERVED_WINDOWS):
        rows = slice(first, first + _SERVED_WINDOWS)
        batch = {
            name: pad_sequence(
                [torch.tensor(values) for values in column[rows]],
                batch_first=True,
                padding_value=pad_token_id if name == "input_ids" else 0,
            )
            for name, column in columns.items()
        }
        lengths_B = torch.tensor(list(map(len, made.input_ids[rows])))
        positions_S = torch.arange(int(lengths_B.max()))
        batch["attention_mask"] = (positions_S < lengths_B.unsqueeze(1)).long()
        yield {name: value.to(device) for name, value in batch.items()}


def _by_end(predictions: Tensor) -> Tensor:
    """(B, S, 2) as two distributions over positions for each sample, (2 B, S)."""
    return predictions.transpose(1, 2).flatten(0, 1)
