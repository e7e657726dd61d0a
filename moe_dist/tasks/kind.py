"""What a kind of task is to the rest of the library.

Shapes: B or N samples, S positions, C outputs, M units (what an interval resamples).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_dist.losses.total import CountKind
from moe_dist.tasks.tokens import tokenise

LabelKind = Literal["class", "number", "text", "answers", "none"]
LABEL_TYPES: dict[LabelKind, str] = {
    "class": "int64",
    "number": "float64",
    "text": "string",
    "answers": "string",
    "none": "int64",
}
"""The type of the label column; answers are JSON, and a label that is none is 0."""

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Columns of a batch that every encoder takes."""

IGNORED = -100
"""Fills up targets, as transformers has it."""


Ragged = Sequence[Sequence[int] | NDArray[np.int32]]
"""Whole numbers for each token of each sample."""


@dataclass(frozen=True)
class TokenRows:
    """Samples made of some rows, in their order.

    Args:
        input_ids: tokens of each sample.
        rows: of each sample the position of the row it was made of.
        labels: of each sample a number, or equally many numbers.
        token_type_ids: as long as the tokens; None where the tokenizer has none.
        columns: further whole numbers for each token, by name; 0 fills them up in a batch.
        targets: further tokens of each sample, which are to be written.
        num_targets: of each sample, what its task loss is a sum over; 1 by default.
        full_lengths: tokens of each sample before it was cut; None where nothing is cut.
        full_target_lengths: the same of targets.
    """

    input_ids: Ragged
    rows: Sequence[int]
    labels: Sequence[Any]
    token_type_ids: Ragged | None = None
    columns: Mapping[str, Ragged] = field(default_factory=dict)
    targets: Ragged | None = None
    num_targets: Sequence[int] | None = None
    full_lengths: Sequence[int] | None = None
    full_target_lengths: Sequence[int] | None = None


@dataclass(frozen=True)
class Answered:
    """What a model says about a split's samples, and what the answers are read with.

    Args:
        raw: (N, C) float32, what `TaskKind.answer` gave for each sample.
        sample_ids: (N,) of each sample.
        labels: (N, ...) of each sample.
        rows: the split's, by column: text_a, text_b, label, sample_id.
        columns: further whole numbers for each token of all samples, by name.
        offsets: (N+1,) where samples begin among tokens.
        tokenizer: the model's.
        options: of the task.
        calibration: what `TaskKind.calibrate` found; None without.
    """

    raw: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    labels: NDArray[Any]
    rows: Mapping[str, Sequence[Any]]
    columns: Mapping[str, NDArray[Any]]
    offsets: NDArray[np.int64]
    tokenizer: Any
    options: Mapping[str, Any]
    calibration: float | None = None


@dataclass(frozen=True)
class Figures:
    """What is kept of a model's answers, a row for each unit, in an order of the data alone.

    Args:
        values: (M, C) float32: logits, or the columns that `TaskKind.columns` names.
        labels: (M,).
        sample_ids: (M,).
        texts: (M,) of text, where the answers are some.
    """

    values: NDArray[np.float32]
    labels: NDArray[Any]
    sample_ids: NDArray[np.int64]
    texts: Sequence[str] | None = None


@dataclass(frozen=True)
class DevRows:
    """What dev rows hold where they are others than training rows.

    Args:
        text_columns: one or two.
        label: what their label column holds.
        metrics: what suits them, the main one first.
    """

    text_columns: tuple[str, ...]
    label: LabelKind
    metrics: tuple[str, ...]


class TaskKind(ABC):
    """One kind of task; whoever trains, scores, measures or serves asks it and no label's type.

    Attributes:
        name: as recipes say it.
        auto_class: the class of transformers that loads a start model.
        label: what the label column holds.
        metrics: those that suit it.
        default_metrics: what it is measured by where a recipe says nothing, the main one first.
        unit: what an interval resamples.
        prediction_term: the name of its distance from the teacher's predictions among the loss
            terms.
        distance: what `prediction_errors` measure, in words.
        count_kind: what sums of its losses are divided by.
        columns: names of the figures that metrics read; none where they read logits and labels.
        option_names: keys of a recipe's data section that it reads, beyond those of every kind.
        text_columns: where its texts are, unless a recipe says otherwise; none if it must.
        label_column: the same of its label.
        holds_out_contexts: rows with one second text are held out together.
        measuring_options: those of them that nothing but measuring reads.
        calibration_samples: training rows that `calibrate` looks at; 0 for none.
        is_one_a_row: each row of a data set makes one training sample.
        reads_pairs: the two texts of a row are read together.
        joins_tasks: several of its tasks may share one model.
        takes_encoder_decoders: models with two stacks can answer it.
        served_columns: what `serve` answers with, and what that is: `text`, a `number`,
            `numbers`, or `named numbers`.
        reads_nothing: it serves a text without tokens, too.
        takes_encoders: models that see later tokens can answer it.
        pads_right: whatever side a start model's tokenizer pads on.
        writes: a decoder writes its answers, token by token; targets are what it is to write.
        compares_samples: the loss of a sample depends on the others of its micro-batch, so that
            `losses` is given those of all ranks; predictions are one tensor, (B, ...).
        answers_once: predictions are one tensor, (B, ...), of one size whatever the batch, and a
            sample's depend on it alone.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    label: ClassVar[LabelKind]
    metrics: ClassVar[tuple[str, ...]]
    default_metrics: ClassVar[tuple[str, ...]]
    prediction_term: ClassVar[str]
    distance: ClassVar[str]
    unit: ClassVar[str] = "sample"
    count_kind: ClassVar[CountKind] = "samples"
    columns: ClassVar[tuple[str, ...]] = ()
    option_names: ClassVar[tuple[str, ...]] = ()
    text_columns: ClassVar[tuple[str, ...]] = ()
    label_column: ClassVar[str] = "label"
    holds_out_contexts: ClassVar[bool] = False
    measuring_options: ClassVar[tuple[str, ...]] = ()
    calibration_samples: ClassVar[int] = 0
    is_one_a_row: ClassVar[bool] = True
    reads_pairs: ClassVar[bool] = True
    joins_tasks: ClassVar[bool] = False
    takes_encoder_decoders: ClassVar[bool] = True
    served_columns: ClassVar[Mapping[str, str]]
    reads_nothing: ClassVar[bool] = False
    takes_encoders: ClassVar[bool] = True
    pads_right: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False
    answers_once: ClassVar[bool] = False

    @property
    def finetuning(self) -> TaskKind:
        """Whose samples and loss a teacher is fine-tuned with; its own, unless there are others."""
        return self

    @property
    def has_classes(self) -> bool:
        """Whether labels are ids of named classes."""
        return self.label == "class"

    @abstractmethod
    def owns(self, architecture: str, config: Any) -> bool:
        """Whether a dense model's class and configuration are those of this kind of task."""

    def num_outputs(self, label_names: Sequence[str] | None) -> int:
        """Outputs of a head that belongs to the task; 0 where it has none of its own."""
        return 0

    def own_head(self, classifier: str) -> str:
        """Where the layer is that may be drawn anew; `classifier` is where classifiers have it.

        Empty where a start model must have all that the task needs.
        """
        return ""

    def model_settings(
        self, label_names: Sequence[str] | None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """What a transformers configuration says of such a model."""
        return {}

    def model_arguments(self, parameters: Sequence[str]) -> dict[str, Any]:
        """What the model's class is given beside a configuration, of the `parameters` it takes."""
        return {}

    def dev_rows(self, options: Mapping[str, Any], *, has_labels: bool) -> DevRows | None:
        """What dev rows hold; None where they are like training rows.

        `has_labels`: a label column or a metric that reads labels was asked for. What options
        lack is a DataError.
        """
        return None

    def check_model(self, model: Any, tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
        """See that a start model has what the task needs, or raise a ConversionError.

        Weights are not read. Gives what is worth saying, a line each.
        """
        return []

    def target_limit(self, options: Mapping[str, Any]) -> int | None:
        """Tokens after which targets are cut; None where nothing is written."""
        return None

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Make samples of rows: one of each, from its one or two texts.

        Args:
            rows: equally long columns text_a, text_b (None, or texts) and label.
            tokenizer: of the model.
            max_length: longer samples are cut (of a pair, the longer text first).
            is_training: whether they are to train on, and not to measure on.
            options: of the task.

        Returns:
            The samples.
        """
        pair = list(rows["text_b"]) if rows["text_b"][0] is not None else None
        tokens = tokenise(tokenizer, rows["text_a"], pair, max_length=max_length)
        return TokenRows(
            input_ids=tokens["input_ids"],
            rows=range(len(rows["text_a"])),
            labels=rows["label"],
            token_type_ids=tokens.get("token_type_ids"),
            full_lengths=full_lengths(
                tokenizer, rows["text_a"], pair, tokens["input_ids"], max_length
            ),
        )

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a forward call takes of a batch; `model` may be wrapped by an engine's module."""
        return {name: batch[name] for name in MODEL_INPUTS if name in batch}

    def run(self, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
        """Run a model on a batch; `options` are what its forward takes beside."""
        return model(**self.inputs(model, batch), **options)

    def predictions(self, model: nn.Module, output: Any, batch: Mapping[str, Tensor]) -> Any:
        """What the losses compare, from a forward's output: its logits, (B, ...)."""
        return output.logits

    @abstractmethod
    def losses(self, predictions: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's own loss of each sample, a sum over its targets; (B,) float32."""

    def scored_losses(self, predictions: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What neurons are scored on, (B,): `losses`, the mean over a sample's targets."""
        losses_B = self.losses(predictions, batch)
        counts_B = batch.get("num_targets")
        return losses_B if counts_B is None else losses_B / counts_B.clamp(min=1)

    def prediction_loss(
        self,
        student: Any,
        teacher: Any,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Distance of the student's predictions from the teacher's, summed over `count_kind`."""
        return self.prediction_errors(student, teacher, batch, temperature).sum()

    @abstractmethod
    def prediction_errors(
        self,
        student: Any,
        teacher: Any,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """The same distance of each sample, summed over its targets; (B,) float32."""

    def soft_target_loss(
        self,
        student: Any,
        teacher: Any,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Distance from the teacher's softened predictions, summed over `count_kind`.

        That of `prediction_loss`, unless a kind of task has another for it.
        """
        return self.prediction_loss(student, teacher, batch, temperature)

    def bounded(self, predictions: Any) -> Tensor | None:
        """The prediction in a fixed range, as a discriminator sees it; (B, C) float32.

        None where there is no such thing, so that nobody plays against the student.
        """
        return None

    def answer(
        self, model: nn.Module, batch: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> Tensor:
        """What a model in eval mode says about a batch, equally many numbers a sample: (B, C)."""
        answers: Tensor = self.predictions(model, self.run(model, batch), batch).float()
        return answers

    def generation(self, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Settings by which `model.generate()` writes what is measured; none where nothing is."""
        return {}

    def needs_all_rows(self, *, is_training: bool) -> bool:
        """Whether samples are made of several rows, so that `tokens` is given all at once."""
        return False

    def needs_calibration(self, labels: Sequence[Any]) -> bool:
        """Whether there is anything to choose on training rows with such labels."""
        return True

    def calibrate(self, answered: Answered) -> float | None:
        """Choose what answers are read with, on training rows."""
        return None

    def figures(self, answered: Answered) -> Figures:
        """Bring answers into what metrics read."""
        return Figures(answered.raw, answered.labels, answered.sample_ids)

    def remarks(self, values: NDArray[np.float32], options: Mapping[str, Any]) -> list[str]:
        """Say what figures, (M, C), show that no metric does, a line each."""
        return []

    @abstractmethod
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
        """Answer texts in the columns that `served_columns` names.

        Args:
            model: in eval mode.
            tokenizer: of the model.
            columns: one or two, equally long, of texts.
            max_length: tokens that the model is given at once.
            label_names: the classes; none where there are none.
            options: of the task.
            calibration: what `calibrate` found.

        Returns:
            A value by column for each text.
        """

    def served_lengths(
        self,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Count the tokens of each text that `serve` is given, before anything is cut."""
        return list(map(len, tokenise(tokenizer, *columns, max_length=None)["input_ids"]))

    def served_limit(self, model: Any, max_length: int) -> int | None:
        """Say after how many tokens `serve` cuts a text; None where it reads all of them."""
        return max_length

    def said(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """What stands beside labels in a file of answers, (M,): the first of the values."""
        return values[:, 0]


def full_lengths(
    tokenizer: Any,
    texts: Sequence[str],
    pair: Sequence[str] | None,
    input_ids: Sequence[Sequence[int]],
    max_length: int,
    *,
    is_target: bool = False,
) -> list[int]:
    """Count the tokens that samples had before they were cut; only whole rows can have been."""
    lengths = list(map(len, input_ids))
    full = [row for row, length in enumerate(lengths) if length >= max_length]
    if full:
        own_pair = None if pair is None else [pair[row] for row in full]
        own = [texts[row] for row in full]
        again = tokenise(tokenizer, own, own_pair, max_length=None, is_target=is_target)
        for row, ids in zip(full, again["input_ids"], strict=True):
            lengths[row] = len(ids)
    return lengths


def num_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """What each sample's task loss is a sum over, (B,)."""
    counts_B = batch.get("num_targets")
    return torch.ones(len(batch["labels"])) if counts_B is None else counts_B
