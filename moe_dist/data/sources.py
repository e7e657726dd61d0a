"""Load a task's train and dev rows: from the hub, from files, or from a registry package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_dist.data.documents import join_rows
from moe_dist.data.files import Texts
from moe_dist.data.holdout import withhold
from moe_dist.data.hub import resolve_model
from moe_dist.data.metrics import metric_title
from moe_dist.data.packages import fetch_model_package
from moe_dist.data.reading import (
    RawSplit,
    missing_files,
    missing_unlabelled,
    read_files,
    read_hub_splits,
    read_package,
)
from moe_dist.data.samples import (
    Sample,
    check_rows,
    draw,
    rows_digest,
    several_texts,
    to_dataset,
)
from moe_dist.data.splits import hold_out, hold_out_contexts
from moe_dist.data.summary import DataSummary, summarise
from moe_dist.data.task_settings import (
    named_task,
    with_dev_rows,
    with_label_names,
    with_options,
    with_positive_label,
)
from moe_dist.data.tasks import Kind, TaskSpec
from moe_dist.data.unlabelled import read_unlabelled
from moe_dist.errors import DataError
from moe_dist.uris import redact_uri

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Source",
    "Splits",
    "fetch_model_package",
    "load_splits",
    "missing_files",
    "missing_unlabelled",
    "resolve_model",
]

Source = Literal["hub", "files", "package"]


@dataclass(frozen=True)
class Splits:
    """The rows to train on and those to measure on.

    Attributes:
        train: columns text_a, text_b (None for single texts), label (class id or float) and
            sample_id (position in the source's training rows).
        dev: the same columns; where held out of train, sample_id counts in the training rows.
        task: with its label names resolved.
        digest: SHA-256 over task and rows.
        train_digest: SHA-256 over kind, label names and training rows: what training sees, and
            not what is measured.
        source: where the rows came from, in words.
        summary: what was found.
        num_near_copies: training rows that were left out as near copies of held-out dev rows.
        holdout: training rows that are withheld, for recipes to be chosen on; None without them.
        num_overlapping: training rows that were left out since they share text with these.
        is_held_out: the dev rows are some of the source's training rows.
        unlabelled: rows of which a student sees the texts alone, beside the training rows; None
            without them.
        unlabelled_digest: SHA-256 over them; empty without them.
    """

    train: Dataset
    dev: Dataset
    task: TaskSpec
    digest: str
    train_digest: str
    source: str
    summary: DataSummary
    num_near_copies: int = 0
    holdout: Dataset | None = None
    num_overlapping: int = 0
    is_held_out: bool = False
    unlabelled: Dataset | None = None
    unlabelled_digest: str = ""

    @cached_property
    def distilled(self) -> Dataset:
        """What a student is distilled on: training rows, and those without labels."""
        if self.unlabelled is None:
            return self.train
        from datasets import concatenate_datasets

        return concatenate_datasets([self.train, self.unlabelled])

    @property
    def finetuned(self) -> Dataset:
        """What a teacher is fine-tuned on: the training rows."""
        return self.train

    @property
    def distill_digest(self) -> str:
        """SHA-256 over what a distillation sees."""
        if not self.unlabelled_digest:
            return self.train_digest
        both = f"{self.train_digest} {self.unlabelled_digest}"
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def parts(self) -> dict[str, Splits]:
        """These rows as those of a run of one task, which has no name."""
        return {"": self}

    @property
    def main_metric(self) -> str:
        """The metric that retention and comparisons are about."""
        return self.task.main_metric

    @property
    def higher_is_better(self) -> bool:
        """Which way the main metric is better."""
        return self.task.higher_is_better

    @property
    def metric_titles(self) -> dict[str, str]:
        """What people call each metric, by its name."""
        space = self.task.label_space
        return {name: metric_title(name, space) for name in self.task.metrics}

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return self.task.num_labels


def load_splits(
    *,
    source: Source,
    name: str | None = None,
    subset: str | None = None,
    train: str | Path | None = None,
    dev: str | Path | None = None,
    column_names: Sequence[str] | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    kind: Kind | None = None,
    metrics: Sequence[str] | None = None,
    positive_label: str | None = None,
    dev_size: int | float | None = None,
    max_train_samples: int | None = None,
    max_dev_samples: int | None = None,
    holdout_samples: int = 0,
    unlabelled: Sequence[str | Path] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> Splits:
    """Load a task's rows, check every one of them, and split where there is no dev set.

    What is not given comes from what is known of the set (`known_task`), where something is.

    Args:
        source: hub (Hugging Face), files, or package (a key of DATA_PACKAGES).
        name: hub repository or package; for files only a TASKS entry.
        subset: configuration of the hub's data set.
        train: training file, or the hub's split ("train" unless given).
        dev: dev file, or the hub's split; without one, `dev_size` rows are held out of train.
        column_names: columns of a TSV or CSV file that has no header line.
        text_columns: one or two columns of text.
        label_column: "label" unless given.
        label_names: class names in id order; inferred from the training rows (sorted) if None.
            Rows hold names; ids too where names are given here or by the task, and none is a
            number.
        kind: classification unless given.
        metrics: names out of METRICS, the main one first.
        positive_label: the class that F1 of two classes is about; the second one if None.
        dev_size: rows (int), or share of the training rows (float below 1), to hold out.
        max_train_samples: draw at most so many training rows.
        max_dev_samples: draw at most so many dev rows.
        holdout_samples: withhold so many whole sentences from the training rows, see `withhold`;
            before they are drawn.
        unlabelled: files whose rows a student is distilled on beside the training rows; of those
            that repeat a dev row or one withheld none is used.
        seed: of the draws.
        cache_dir: the cache, or None for `default_cache_dir()`.
        revision: of the hub's data set.
        **options: what the kind of task reads beside (`TaskKind.option_names`); None for its own
            default.

    Returns:
        Checked rows with resolved label names.

    Raises:
        DataError: for whatever is wrong with the data, with file and line.
    """
    task = named_task(name, subset, text_columns, label_column, label_names, kind, metrics)
    task = with_options(task, options)
    task = with_dev_rows(task, label_column, metrics)
    notes: list[str] = []
    cache = Path(cache_dir) if cache_dir is not None else None
    if dev is not None and dev_size is not None:
        raise DataError(
            "data.dev and data.dev_size are both given",
            remedy="give one of them: a dev set, or how many training rows to hold out",
        )
    texts = None
    if "documents" in task.task_kind.option_names:
        texts = Texts(task.options.get("documents"))
    if source == "files":
        raw_train, raw_dev = read_files(
            train,
            dev,
            column_names=column_names,
            label_column=task.label_column,
            dev_size=dev_size,
            say=notes.append,
            texts=texts,
        )
        words = "files " + " and ".join(redact_uri(str(place)) for place in (train, dev) if place)
    elif source == "hub":
        splits = (
            str(train or "train"),
            None if dev_size is not None else str(dev or task.dev_split),
        )
        raw_train, raw_dev, task = read_hub_splits(name, subset, splits, task, revision)
        if how := task.options.get("documents"):
            (column,) = task.text_columns
            raw_train = replace(raw_train, rows=join_rows(raw_train.rows, column, how))
            if raw_dev is not None:
                raw_dev = replace(raw_dev, rows=join_rows(raw_dev.rows, column, how))
        words = f"hub {name}" + (f" ({subset})" if subset else "")
    elif source == "package":
        raw_train, default_size = read_package(name, cache)
        raw_dev, dev_size = None, default_size if dev_size is None else dev_size
        words = f"package {name}"
    else:
        raise DataError(f"data.source={source!r} is unknown", remedy="use hub, files or package")

    gives_names = task.label_names is not None
    task = with_positive_label(with_label_names(task, raw_train), positive_label)

    def checked(split: RawSplit, own: TaskSpec) -> tuple[list[Sample], dict[str, int]]:
        found = check_rows(
            split.rows,
            own,
            holds_ids=split.holds_ids,
            may_be_ids=gives_names,
            drops_incomplete=split.drops_incomplete,
        )
        labels = (row.values.get(task.label_column) for row in split.rows)
        num_padded = sum(isinstance(label, str) and label != label.strip() for label in labels)
        if num_padded and task.task_kind.has_classes:
            where = "dev labels" if split is raw_dev else "labels"
            notes.append(f"{num_padded} {where} have blanks around them, which were dropped")
        if own.label == "text":
            values = (row.values.get(task.label_column) for row in split.rows)
            num_several = sum(len(several_texts(value)) > 1 for value in values)
            if num_several:
                where = "dev rows" if split is raw_dev else "rows"
                notes.append(
                    f"{num_several} {where} have several texts in {task.label_column!r}: the first "
                    "is what is to be written, and what is compared with"
                )
        return found

    train_samples, left_out = checked(raw_train, task)
    left_out_dev: dict[str, int] = {}
    num_near_copies = 0
    if raw_dev is not None:
        dev_samples, left_out_dev = checked(raw_dev, task.on_dev)
    else:
        assert dev_size is not None, "checked where the rows were read"
        by_context = task.task_kind.holds_out_contexts
        train_rows, dev_rows = (
            hold_out_contexts([s.text_b or "" for s in train_samples], dev_size, seed=seed)
            if by_context
            else hold_out([s.text for s in train_samples], dev_size, seed=seed)
        )
        if by_context:
            num_contexts = len({train_samples[row].text_b for row in dev_rows})
            notes.append(f"the dev rows are all questions of {num_contexts} contexts, held out")
        num_near_copies = len(train_samples) - len(train_rows) - len(dev_rows)
        dev_samples = [train_samples[row] for row in dev_rows]
        if task.dev_rows is not None:
            wanted = {sample.sample_id for sample in dev_samples}
            dev_samples = [s for s in checked(raw_train, task.on_dev)[0] if s.sample_id in wanted]
        train_samples = [train_samples[row] for row in train_rows]
    for samples in (train_samples, dev_samples):
        if not samples:
            raise DataError(
                f"{words}: no row of a split has a label and a text",
                remedy="choose another split with data.train or data.dev",
            )
    num_before = len(train_samples)
    train_samples, withheld = _withhold(train_samples, holdout_samples, seed, task)
    num_overlapping = num_before - len(train_samples) - len(withheld)
    drawn = draw(train_samples, max_train_samples, seed)
    drawn_dev = draw(dev_samples, max_dev_samples, seed)
    left_out |= {
        "near copies": num_near_copies,
        "that share text with those withheld": num_overlapping,
        "not drawn": len(train_samples) - len(drawn),
    }
    left_out_dev["not drawn"] = len(dev_samples) - len(drawn_dev)
    further: list[Sample] = []
    left_out_further: dict[str, int] = {}
    if unlabelled:
        further, left_out_further = read_unlabelled(
            unlabelled,
            task,
            column_names=column_names,
            first_id=len(raw_train.rows),
            dev=dev_samples,
            withheld=withheld,
            say=notes.append,
            texts=texts,
            cache_dir=cache,
        )
    # Without a hold-out the digest is what it was before there were any.
    parts = [drawn, drawn_dev, *([withheld] if withheld else [])]
    return Splits(
        train=to_dataset(drawn, task),
        dev=to_dataset(drawn_dev, task.on_dev),
        task=task,
        digest=rows_digest(_measured_by(task), *parts),
        train_digest=rows_digest(_trained_by(task), drawn),
        source=words,
        summary=summarise(
            words,
            task,
            drawn,
            drawn_dev,
            withheld,
            unlabelled=further,
            left_out={"train": left_out, "dev": left_out_dev, "unlabelled": left_out_further},
            notes=notes,
        ),
        num_near_copies=num_near_copies,
        holdout=to_dataset(withheld, task) if withheld else None,
        num_overlapping=num_overlapping,
        is_held_out=raw_dev is None,
        unlabelled=to_dataset(further, task) if further else None,
        unlabelled_digest=rows_digest(_trained_by(task), further) if further else "",
    )


def _measured_by(task: TaskSpec) -> list[Any]:
    """What a digest covers of a task; as it was before a positive class could be chosen."""
    chosen = [task.positive_label] if task.label_space.positive != 1 else []
    options = [sorted(task.options.items())] if task.options else []
    return [task.kind, task.label_names, task.metrics, *chosen, *options]


def _trained_by(task: TaskSpec) -> list[Any]:
    """What the digest of training rows covers of a task."""
    unread = task.task_kind.measuring_options
    options = sorted((name, value) for name, value in task.options.items() if name not in unread)
    return [task.kind, task.label_names, *([options] if options else [])]


def _withhold(
    samples: list[Sample], num_samples: int, seed: int, task: TaskSpec
) -> tuple[list[Sample], list[Sample]]:
    if not num_samples:
        return samples, []
    if task.task_kind.holds_out_contexts:
        contexts = [s.text_b or "" for s in samples]
        kept, held = hold_out_contexts(contexts, num_samples, seed=seed, key="holdout_samples")
    else:
        kept, held = withhold([(s.text_a, s.text_b) for s in samples], num_samples, seed=seed)
    return [samples[row] for row in kept], [samples[row] for row in held]
