"""Rows with their texts and labels checked, as Splits hold them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_dist.data.answers import answers_label, refuse_repeated_ids
from moe_dist.data.labels import UNLABELLED, class_id, encodable, is_missing, regression_value
from moe_dist.data.rows import SourceRow, is_number
from moe_dist.data.tasks import TaskSpec
from moe_dist.tasks.kind import LABEL_TYPES, LabelKind

if TYPE_CHECKING:
    from datasets import Dataset


NO_LABEL: dict[LabelKind, int | float | str] = {
    "class": 0,
    "number": 0.0,
    "text": "",
    "answers": "[]",
    "none": 0,
}
"""What stands in a label column where there is no label."""


@dataclass(frozen=True)
class Sample:
    """One row of a split.

    Attributes:
        text_a: its text.
        text_b: its second one; None for single texts.
        label: class id, value of a regression, or text, as the kind of task has it; 0 for none.
        sample_id: position among the source's rows.
    """

    text_a: str
    text_b: str | None
    label: int | float | str
    sample_id: int

    def numbered(self, sample_id: int) -> Sample:
        """Give the same row under another number."""
        return replace(self, sample_id=sample_id)

    @property
    def text(self) -> str:
        """All of its text."""
        return "\n".join(self.texts)

    @property
    def texts(self) -> list[str]:
        """Its one or two texts."""
        return [self.text_a] if self.text_b is None else [self.text_a, self.text_b]


def column_value(row: SourceRow, column: str) -> Any:
    """Give what a row has in a column; DataError if there is no such column."""
    if column not in row.values:
        raise row.error(
            f"there is no column {column!r}; there are {', '.join(map(repr, row.values))}",
            "check data.text_columns and data.label_column; a file without a header line needs "
            "data.column_names",
        )
    return row.values[column]


def check_rows(
    rows: Sequence[SourceRow],
    task: TaskSpec,
    *,
    holds_ids: bool = False,
    may_be_ids: bool = False,
    drops_incomplete: bool = False,
    needs_labels: bool = True,
) -> tuple[list[Sample], dict[str, int]]:
    """Turn rows into samples.

    Args:
        rows: of one split.
        task: with its label names resolved.
        holds_ids: labels are class ids, whatever the names look like.
        may_be_ids: labels are names, or ids where no name is a number.
        drops_incomplete: leave rows without label or text out; for sources that nobody here can
            mend.
        needs_labels: without, only the texts count, and a label is taken where it is a text; where
            texts are read one by one, a row may have one of two.

    Returns:
        The samples, and the number of rows left out by the reason.

    Raises:
        DataError: for the first row that cannot be used, with its file and line.
    """
    kind, names = task.task_kind, task.label_names or ()
    ids = {str(i) if holds_ids else name: i for i, name in enumerate(names)}
    # Where names are numbers, a number that is none of them is a fault and no id.
    may_be_ids = may_be_ids and not any(map(is_number, names))
    named = task.label_column
    read_label: dict[LabelKind, Callable[..., int | float | str]] = {
        "class": lambda row, label, *texts: class_id(row, label, ids, may_be_ids),
        "number": lambda row, label, *texts: regression_value(row, label),
        "text": lambda row, label, *texts: label_text(row, named, label),
        "answers": lambda row, label, *texts: answers_label(row, named, label, *texts),
        "none": lambda row, label, *texts: 0,
    }
    if kind.label == "answers":
        refuse_repeated_ids(rows)
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    for position, row in enumerate(rows):
        columns = list(task.text_columns)
        if not needs_labels and not kind.reads_pairs:
            columns = [one for one in columns if not is_missing(row.values.get(one))] or columns
        texts = [column_value(row, column) for column in columns]
        has_label = needs_labels or (task.label == "text" and task.label_column in row.values)
        label = None
        if has_label and task.label != "none":
            label = column_value(row, task.label_column)
        if task.label == "text" and not isinstance(label, str):
            texts_of_label = several_texts(label)
            label = texts_of_label[0] if texts_of_label else label
        if drops_incomplete:
            has_no_class = kind.has_classes and str(label) == UNLABELLED not in ids
            if task.label != "none" and (is_missing(label) or has_no_class):
                left_out["without a label"] += 1
                continue
            if None in texts:
                left_out["without a text"] += 1
                continue
        for text_column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise row.error(
                    f"column {text_column!r} holds no text: {text!r}", _text_remedy(text)
                )
            encodable(row, text_column, text)
        value = NO_LABEL[task.label]
        if needs_labels or not is_missing(label):
            value = read_label[task.label](row, label, *texts)
        samples.append(Sample(texts[0], texts[1] if len(texts) == 2 else None, value, position))
    return samples, dict(left_out)


def draw(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Draw `limit` samples at most, which keep their order; None takes all."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(seed).permutation(len(samples))[:limit]
    return [samples[i] for i in sorted(chosen.tolist())]


def to_dataset(samples: list[Sample], task: TaskSpec) -> Dataset:
    """Bring samples into columns text_a, text_b, label and sample_id."""
    from datasets import Dataset, Features, Value

    label = Value(LABEL_TYPES[task.label])
    text = Value("string")
    return Dataset.from_dict(
        {
            "text_a": [s.text_a for s in samples],
            "text_b": [s.text_b for s in samples],
            "label": [s.label for s in samples],
            "sample_id": [s.sample_id for s in samples],
        },
        features=Features(
            {"text_a": text, "text_b": text, "label": label, "sample_id": Value("int64")}
        ),
    )


def rows_digest(task: list[Any], *splits: list[Sample]) -> str:
    """Identify a task with its rows by a SHA-256."""
    digest = hashlib.sha256(json.dumps(task).encode())
    for samples in splits:
        digest.update(b"\nsplit\n")
        for s in samples:
            digest.update(json.dumps([s.text_a, s.text_b, s.label, s.sample_id]).encode())
    return digest.hexdigest()


def several_texts(label: Any) -> list[str]:
    """Give the texts of a label that is a list of them, or SQuAD's answers; none where it is not.

    SQuAD has them as a mapping whose `text` is a list.
    """
    found = label.get("text") if isinstance(label, Mapping) else label
    is_list = isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)
    return list(found) if is_list and found is not None else []


def label_text(row: SourceRow, column: str, label: Any) -> str:
    """Give the text that a row is labelled with; a DataError if it is none."""
    if not isinstance(label, str) or not label.strip():
        raise row.error(f"column {column!r} holds no text: {label!r}", _text_remedy(label))
    return encodable(row, column, label)


def _text_remedy(value: Any) -> str:
    if isinstance(value, list):
        return "join its parts to one text before"
    if isinstance(value, dict):
        return "write its fields as columns of their own"
    return "mend it"
