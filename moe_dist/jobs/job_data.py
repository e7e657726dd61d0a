"""The data that a job works on: the rows of one task or of several, tokenised on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_dist.config.sections import TrainConfig
from moe_dist.conversion.heads import TaskHead
from moe_dist.data.loaders import Encoded, TrainBatches, encode
from moe_dist.data.metrics import compute_metrics
from moe_dist.data.mixture import Mixture, MixtureBatches, Rows, joined_metrics
from moe_dist.data.sources import Splits
from moe_dist.data.tasks import TRAINED_ON, Split
from moe_dist.errors import DataError
from moe_dist.jobs.results import save_predictions
from moe_dist.measure.evaluation import Predictions, add_by_layer
from moe_dist.moe.routing import use_task
from moe_dist.tasks import Answered, Figures, TaskKind, head_kind
from moe_dist.training.collectives import num_ranks, own_rank


class Predict(Protocol):
    """Runs a model over samples, as `moe_dist.measure.evaluation.predict` does."""

    def __call__(self, encoded: Encoded, *, options: Mapping[str, Any]) -> Predictions:
        """Answer; `options` are the task's."""


@dataclass(frozen=True)
class Measured:
    """How well a model does on a split.

    Args:
        metrics: by name; see `joined_metrics`.
        split: what it was measured on.
        tokens_per_expert: as in `Predictions`, of all tasks together.
        figures: of each task's units, by its name ("" where there is one task).
        calibrations: what each task's answers were read with, by its name; none where nothing is
            chosen.
        routing_sums: as in `Predictions`, of all tasks together.
    """

    metrics: dict[str, float]
    split: Split
    tokens_per_expert: dict[str, Tensor]
    figures: dict[str, Figures] = field(default_factory=dict)
    calibrations: dict[str, float] = field(default_factory=dict)
    routing_sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class JobData:
    """The data of one task.

    Args:
        splits: rows and task.
        tokenizer: the model's own.
        max_length: tokens per sample; longer ones are cut.
        cache_dir: where tokenised data is cached; None for the default.
    """

    splits: Splits
    tokenizer: Any
    max_length: int
    cache_dir: str | None = None

    @cached_property
    def train(self) -> Encoded:
        """The training split."""
        return self._encode(self.splits.train, "train")

    @cached_property
    def dev(self) -> Encoded:
        """The split that is measured on."""
        return self._encode(self.splits.dev, "dev")

    @cached_property
    def holdout(self) -> Encoded:
        """The training rows that recipes are chosen on; only where the data have some."""
        assert self.splits.holdout is not None, "who asks for it has seen that there is one"
        return self._encode(self.splits.holdout, "holdout")

    @cached_property
    def distilled(self) -> Encoded:
        """What a student is distilled on: the training split, and rows without labels."""
        if self.splits.unlabelled is None:
            return self.train
        return self._encode(self.splits.distilled, "distilled")

    @cached_property
    def finetuned(self) -> Encoded:
        """What a teacher is fine-tuned on: the training rows, perhaps in other samples."""
        task = self.splits.task
        if task.kind_on("finetuned") is task.task_kind:
            return self.train
        return self._encode(self.splits.finetuned, "finetuned")

    def part(self, name: Split) -> Encoded:
        """Give a split by its name."""
        encoded: Encoded = getattr(self, name)
        return encoded

    @property
    def parts(self) -> dict[str, JobData]:
        """This data as that of a run of one task, which has no name."""
        return {"": self}

    @property
    def pad_token_id(self) -> int:
        """What fills up shorter samples."""
        return int(self.tokenizer.pad_token_id)

    def batches(self, section: TrainConfig, *, seed: int, split: Split = "train") -> TrainBatches:
        """Cut what is trained on into this rank's steps."""
        encoded = self.part(split)
        kind = self.splits.task.task_kind
        smallest = min(section.batch_size, len(encoded))
        compares = (kind.finetuning if split == "finetuned" else kind).compares_samples
        if compares and smallest < 2 * section.accumulation:
            raise DataError(
                f"{len(encoded)} training pairs in steps of {smallest} with an accumulation of "
                f"{section.accumulation} leave a pair alone in its micro-batch, where its texts "
                "are to be found among those of others",
                remedy="give more training pairs, or lower finetune.accumulation",
            )
        return TrainBatches(
            encoded,
            batch_size=section.batch_size,
            world_size=num_ranks(),
            rank=own_rank(),
            accumulation=section.accumulation,
            seed=seed,
            pad_token_id=self.pad_token_id,
        )

    def figures(
        self, answers: torch.Tensor, split: Split, calibration: float | None = None
    ) -> Figures:
        """Bring a model's answers, (N, C), into what metrics read."""
        kind, rows = self.splits.task.task_kind, getattr(self.splits, split)
        return kind.figures(self._answered(answers, self.part(split), rows, calibration))

    def calibrate(self, predict: Callable[[Encoded], Predictions], seed: int = 0) -> float | None:
        """Choose what answers are read with, on training rows; collective, None where nothing is.

        A model's answers to training rows are read as if they were to be measured on.
        """
        kind = self.splits.task.task_kind
        if not kind.calibration_samples:
            return None
        rows = self.splits.train.shuffle(seed=seed)
        rows = rows.select(range(min(len(rows), kind.calibration_samples)))
        if not kind.needs_calibration(rows["label"]):
            return None
        encoded = self._encode(rows, "calibration")
        return kind.calibrate(self._answered(predict(encoded).answers, encoded, rows, None))

    def _answered(
        self, answers: torch.Tensor, encoded: Encoded, rows: Any, calibration: float | None
    ) -> Answered:
        return Answered(
            raw=answers.numpy(),
            sample_ids=encoded.sample_ids,
            labels=encoded.labels,
            rows={name: rows[name] for name in rows.column_names},
            columns=encoded.columns,
            offsets=encoded.offsets,
            tokenizer=self.tokenizer,
            options=self.splits.task.options,
            calibration=calibration,
        )

    def metrics(self, figures: Figures) -> dict[str, float]:
        """Compute the task's metrics, the main one first; NaN where one is undefined."""
        task = self.splits.task
        return compute_metrics(task.metrics, figures.values, figures.labels, task.label_space)

    def remarks(self, figures: Figures) -> list[str]:
        """Say what figures show that no metric does, a line each."""
        task = self.splits.task
        return task.task_kind.remarks(figures.values, task.options)

    def save_figures(self, figures: Figures, path: Path) -> None:
        """Write what a model says about a split."""
        save_predictions(
            path,
            logits=figures.values,
            predictions=self.splits.task.task_kind.said(figures.values),
            labels=figures.labels,
            sample_ids=figures.sample_ids,
            texts=figures.texts,
        )

    def _encode(self, rows: Any, split: str) -> Encoded:
        return encode(
            rows,
            self.tokenizer,
            max_length=self.max_length,
            kind=self.splits.task.kind_on(split),
            options=self.splits.task.options,
            is_training=split in TRAINED_ON,
            cache_dir=Path(self.cache_dir) if self.cache_dir else None,
            digest=f"{self.splits.digest}-{split}",
        )


@dataclass(frozen=True)
class MixtureData:
    """The data of several tasks.

    Args:
        parts: each task's, by name, in the order of the tasks' numbers.
        shares: how often each task is drawn.
    """

    parts: Mapping[str, JobData]
    shares: tuple[float, ...]

    @property
    def tokenizer(self) -> Any:
        """The model's own."""
        return next(iter(self.parts.values())).tokenizer

    @property
    def pad_token_id(self) -> int:
        """What fills up shorter samples."""
        return int(self.tokenizer.pad_token_id)

    def batches(self, section: TrainConfig, *, seed: int, split: Split = "train") -> MixtureBatches:
        """Cut the training splits into this rank's steps, each of one task."""
        parts = {
            name: part.batches(section, seed=seed, split=split) for name, part in self.parts.items()
        }
        return MixtureBatches(parts, self.shares, seed=seed)


AnyJobData = JobData | MixtureData


def job_data(
    rows: Rows, tokenizer: Any, *, max_length: int, cache_dir: str | None = None
) -> AnyJobData:
    """Join rows with what a job needs to tokenise them; samples are cut at `max_length` tokens."""
    parts = {
        name: JobData(part, tokenizer, max_length, cache_dir) for name, part in rows.parts.items()
    }
    return MixtureData(parts, rows.shares) if isinstance(rows, Mixture) else parts[""]


def task_heads(mixture: Mixture) -> tuple[TaskHead, ...]:
    """Give a head to each task of a mixture, in the order of the tasks' numbers."""
    return tuple(TaskHead(name, splits.task.label_names) for name, splits in mixture.parts.items())


def label_names(rows: Rows) -> tuple[str, ...] | None:
    """Name a model's outputs for one task or several, in their order; None for regression."""
    if isinstance(rows, Mixture):
        return tuple(name for head in task_heads(rows) for name in head.output_names)
    return rows.task.label_names


def shared_kind(rows: Rows) -> TaskKind:
    """Say what kind of model answers the rows: a classifier for those of several tasks."""
    return head_kind(("",)) if isinstance(rows, Mixture) else rows.task.task_kind


def shared_options(rows: Rows) -> Mapping[str, Any]:
    """Give what the one task's kind reads beside; several tasks have nothing of the sort."""
    return {} if isinstance(rows, Mixture) else rows.task.options


def measure(data: AnyJobData, predict: Predict, split: Split = "dev") -> Measured:
    """Measure a model on a split, task by task."""
    figures: dict[str, Figures] = {}
    calibrations: dict[str, float] = {}
    loads: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    parts = data.parts
    for number, (name, part) in enumerate(parts.items()):
        answer = partial(predict, options=part.splits.task.options)
        with use_task(number if name else None):
            found = answer(part.part(split))
            calibration = part.calibrate(answer)
        if calibration is not None:
            calibrations[name] = calibration
        figures[name] = part.figures(found.answers, split, calibration)
        add_by_layer(loads, found.tokens_per_expert)
        add_by_layer(gates, found.routing_sums)
    metrics = {name: parts[name].metrics(one) for name, one in figures.items()}
    return Measured(joined_metrics(metrics), split, loads, figures, calibrations, gates)


def count_use(data: AnyJobData, predict: Predict, split: Split) -> dict[str, Tensor]:
    """Count each expert's tokens on a split, (E,) by layer; training rows need not be measurable.

    Those of all tasks together.
    """
    loads: dict[str, Tensor] = {}
    for number, (name, part) in enumerate(data.parts.items()):
        with use_task(number if name else None):
            found = predict(part.part(split), options=part.splits.task.options)
            add_by_layer(loads, found.tokens_per_expert)
    return loads


def save_answers(data: AnyJobData, measured: Measured, path: Path) -> None:
    """Write a model's answers; with several tasks, a file for each with its name added."""
    for name, part in data.parts.items():
        file = path.with_stem(f"{path.stem}-{name}") if name else path
        part.save_figures(measured.figures[name], file)
