"""Load a task's train and dev rows: from the hub, from files, or from a registry package."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_dist.data.files import Row, read_rows, row_error
from moe_dist.data.holdout import withhold
from moe_dist.data.hub import read_hub, resolve_model
from moe_dist.data.metrics import METRICS, metric_title
from moe_dist.data.packages import fetch_data_package, fetch_model_package
from moe_dist.data.splits import hold_out
from moe_dist.data.tasks import DEFAULT_METRICS, TASKS, Kind, TaskSpec
from moe_dist.errors import DataError
from moe_dist.uris import is_uri, redact_uri

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Source",
    "Splits",
    "fetch_model_package",
    "load_splits",
    "missing_files",
    "resolve_model",
]

Source = Literal["hub", "files", "package"]
_MAX_INFERRED_CLASSES = 1000


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
        num_near_copies: training rows that were left out as near copies of held-out dev rows.
        holdout: training rows that are withheld, for recipes to be chosen on; None without them.
        num_overlapping: training rows that were left out since they share text with these.
    """

    train: Dataset
    dev: Dataset
    task: TaskSpec
    digest: str
    train_digest: str
    source: str
    num_near_copies: int = 0
    holdout: Dataset | None = None
    num_overlapping: int = 0

    @property
    def parts(self) -> dict[str, Splits]:
        """These rows as those of a run of one task, which has no name."""
        return {"": self}

    @property
    def main_metric(self) -> str:
        """The metric that retention and comparisons are about."""
        return self.task.main_metric

    @property
    def metric_titles(self) -> dict[str, str]:
        """What people call each metric, by its name."""
        space = self.task.label_space
        return {name: metric_title(name, space) for name in self.task.metrics}

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return self.task.num_labels


@dataclass(frozen=True)
class _Sample:
    text_a: str
    text_b: str | None
    label: int | float
    sample_id: int

    @property
    def text(self) -> str:
        return self.text_a if self.text_b is None else f"{self.text_a}\n{self.text_b}"


@dataclass(frozen=True)
class _RawSplit:
    origin: Path
    rows: list[Row]
    # Labels are class ids, whatever the names look like: the hub declares them so.
    holds_ids: bool = False


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
    seed: int = 0,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Splits:
    """Load a task's rows, check every one of them, and split where there is no dev set.

    What is not given comes from the TASKS entry called `subset` or `name`, where there is one.

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
            Rows hold names, or ids where no name is a number.
        kind: classification unless given.
        metrics: names out of METRICS, the main one first.
        positive_label: the class that F1 of two classes is about; the second one if None.
        dev_size: rows (int), or share of the training rows (float below 1), to hold out.
        max_train_samples: draw at most so many training rows.
        max_dev_samples: draw at most so many dev rows.
        holdout_samples: withhold so many whole sentences from the training rows, see `withhold`;
            before they are drawn.
        seed: of the draws.
        cache_dir: the cache, or None for `default_cache_dir()`.
        revision: of the hub's data set.

    Returns:
        Checked rows with resolved label names.

    Raises:
        DataError: for whatever is wrong with the data, with file and line.
    """
    task = _task(name, subset, text_columns, label_column, label_names, kind, metrics)
    cache = Path(cache_dir) if cache_dir is not None else None
    if dev is not None and dev_size is not None:
        raise DataError(
            "data.dev and data.dev_size are both given",
            remedy="give one of them: a dev set, or how many training rows to hold out",
        )
    if source == "files":
        raw_train, raw_dev = _read_files(train, dev, column_names, dev_size)
        words = "files " + " and ".join(redact_uri(str(place)) for place in (train, dev) if place)
    elif source == "hub":
        splits = (
            str(train or "train"),
            None if dev_size is not None else str(dev or task.dev_split),
        )
        raw_train, raw_dev, task = _read_hub(name, subset, splits, task, revision)
        words = f"hub {name}" + (f" ({subset})" if subset else "")
    elif source == "package":
        raw_train, task, default_size = _read_package(name, task, cache)
        raw_dev, dev_size = None, default_size if dev_size is None else dev_size
        words = f"package {name}"
    else:
        raise DataError(f"data.source={source!r} is unknown", remedy="use hub, files or package")

    task = _with_positive_label(_with_label_names(task, raw_train), positive_label)
    train_samples = _check_rows(raw_train, task)
    if raw_dev is not None:
        dev_samples, dropped = _check_rows(raw_dev, task), 0
    else:
        assert dev_size is not None, "checked where the rows were read"
        train_rows, dev_rows = hold_out([s.text for s in train_samples], dev_size, seed=seed)
        dropped = len(train_samples) - len(train_rows) - len(dev_rows)
        dev_samples = [train_samples[row] for row in dev_rows]
        train_samples = [train_samples[row] for row in train_rows]
    num_before = len(train_samples)
    train_samples, withheld = _withhold(train_samples, holdout_samples, seed)
    num_overlapping = num_before - len(train_samples) - len(withheld)
    train_samples = _draw(train_samples, max_train_samples, seed)
    dev_samples = _draw(dev_samples, max_dev_samples, seed)
    # Without a hold-out the digest is what it was before there were any.
    parts = [train_samples, dev_samples, *([withheld] if withheld else [])]
    return Splits(
        train=_to_dataset(train_samples, task),
        dev=_to_dataset(dev_samples, task),
        task=task,
        digest=_digest(_measured_by(task), *parts),
        train_digest=_digest([task.kind, task.label_names], train_samples),
        source=words,
        num_near_copies=dropped,
        holdout=_to_dataset(withheld, task) if withheld else None,
        num_overlapping=num_overlapping,
    )


def missing_files(
    train: str | Path | None, dev: str | Path | None, section: str = "data"
) -> list[str]:
    """Name the data files that are not on this machine; one at a URI is not looked for.

    Args:
        train: the training file.
        dev: the dev file; None where dev rows are held out of the training file.
        section: path of the two keys in the recipe.

    Returns:
        Key and path of each, such as `data.train=/home/me/train.tsv`.
    """
    given = ((f"{section}.train", train), (f"{section}.dev", dev))
    return [
        f"{key}={path}"
        for key, path in given
        if path and not is_uri(path) and not Path(path).expanduser().exists()
    ]


def _task(
    name: str | None,
    subset: str | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
    kind: Kind | None,
    metrics: Sequence[str] | None,
) -> TaskSpec:
    known = TASKS.get(subset or "") or TASKS.get(name or "")
    if known is None:
        known = TaskSpec(subset or name or "task", "classification", ())
        known = replace(known, metrics=DEFAULT_METRICS[kind or known.kind])
    elif kind is not None and kind != known.kind:
        known = replace(known, label_names=None, metrics=DEFAULT_METRICS[kind])
    task = replace(
        known,
        kind=kind or known.kind,
        text_columns=tuple(text_columns) if text_columns else known.text_columns,
        label_column=label_column or known.label_column,
        label_names=tuple(map(str, label_names)) if label_names else known.label_names,
        metrics=tuple(metrics) if metrics else known.metrics,
    )
    if task.kind == "regression" and task.label_names:
        raise DataError(
            "data.label_names is given for a regression", remedy="drop it, or set data.kind"
        )
    if task.label_names and len(set(task.label_names)) < max(2, len(task.label_names)):
        raise DataError(
            f"data.label_names={list(task.label_names)} is no list of distinct classes",
            remedy="name two classes or more, each once",
        )
    unknown = [metric for metric in task.metrics if metric not in METRICS]
    if unknown:
        raise DataError(
            f"data.metrics: unknown {', '.join(unknown)}",
            remedy=f"choose from {', '.join(METRICS)}",
        )
    return task


def _read_files(
    train: str | Path | None,
    dev: str | Path | None,
    column_names: Sequence[str] | None,
    dev_size: int | float | None,
) -> tuple[_RawSplit, _RawSplit | None]:
    if train is None:
        raise DataError("data.source is files, but data.train is not given", remedy="name a file")
    if dev is None and dev_size is None:
        raise DataError(
            "there is no dev set", remedy="give data.dev a file, or data.dev_size a number of rows"
        )
    missing = missing_files(train, dev)
    if missing:
        raise DataError(
            f"no such data file: {' and '.join(missing)}",
            remedy="give your files with --set data.train=FILE and --set data.dev=FILE, or in the "
            "recipe; paths are relative to the working directory",
        )
    splits = [_read_place(given, column_names) for given in (train, dev) if given is not None]
    return splits[0], splits[1] if len(splits) == 2 else None


def _read_place(place: str | Path, column_names: Sequence[str] | None) -> _RawSplit:
    if is_uri(place):
        from moe_dist.storage import local_file

        with local_file(str(place)) as path:
            return _RawSplit(Path(path.name), read_rows(path, column_names))
    path = Path(place).expanduser()
    return _RawSplit(path, read_rows(path, column_names))


def _read_hub(
    name: str | None,
    subset: str | None,
    splits: tuple[str, str | None],
    task: TaskSpec,
    revision: str | None,
) -> tuple[_RawSplit, _RawSplit | None, TaskSpec]:
    if not name:
        raise DataError("data.source is hub, but data.name is not given", remedy="name a data set")
    parts = []
    for split in splits:
        if split is None:
            continue
        rows, class_names = read_hub(
            name, subset, split, (*task.text_columns, task.label_column), revision
        )
        if not rows:
            raise DataError(
                f"the split {split!r} of the hub's {name!r} holds no rows",
                remedy="choose another split with data.train or data.dev",
            )
        if class_names and task.kind == "classification" and task.label_names is None:
            task = replace(task, label_names=tuple(class_names))
        origin = Path(f"{name}/{subset}/{split}" if subset else name)
        parts.append(_RawSplit(origin, rows, holds_ids=class_names is not None))
    return parts[0], parts[1] if len(parts) == 2 else None, task


def _read_package(
    name: str | None, task: TaskSpec, cache_dir: Path | None
) -> tuple[_RawSplit, TaskSpec, int]:
    entry, folder = fetch_data_package(name or "", cache_dir)
    rows: list[Row] = [
        (number, {"sentence": text, "label": label})
        for number, (text, label) in enumerate(entry.read(folder), start=1)
    ]
    task = replace(
        task,
        kind="classification",
        text_columns=("sentence",),
        label_column="label",
        label_names=entry.label_names,
    )
    return _RawSplit(folder, rows), task, entry.dev_size


def _with_label_names(task: TaskSpec, split: _RawSplit) -> TaskSpec:
    if not 1 <= len(task.text_columns) <= 2:
        raise DataError(
            f"data.text_columns={list(task.text_columns)}: one or two columns are needed",
            remedy=f"choose from {', '.join(split.rows[0][1])}",
        )
    if task.kind == "regression" or task.label_names is not None:
        return task
    found = {
        _class_key(split.origin, line, _value(split.origin, line, row, task.label_column))
        for line, row in split.rows
    }
    if not 2 <= len(found) <= _MAX_INFERRED_CLASSES:
        raise DataError(
            f"{split.origin}: column {task.label_column!r} holds {len(found)} different labels",
            remedy="check data.label_column; for numbers to be predicted set data.kind=regression",
        )
    try:
        names = sorted(found, key=lambda name: (int(name), name))
    except ValueError:
        names = sorted(found)
    return replace(task, label_names=tuple(names))


def _with_positive_label(task: TaskSpec, label: str | None) -> TaskSpec:
    if label is None:
        return task
    names = task.label_names or ()
    if len(names) != 2:
        what = f"{len(names)} classes" if names else "regression"
        raise DataError(
            f"data.positive_label={label} chooses one of two classes, and these data are {what}",
            remedy="remove it; F1 of more classes is the mean over all of them",
        )
    if label not in names:
        raise DataError(
            f"data.positive_label={label} is no class of these data",
            remedy=f"choose from {', '.join(names)}",
        )
    if "f1" not in task.metrics:
        raise DataError(
            f"data.positive_label={label} is read by f1, and data.metrics has "
            f"{', '.join(task.metrics)}",
            remedy="add f1 to data.metrics, or remove data.positive_label",
        )
    return replace(task, positive_label=label)


def _measured_by(task: TaskSpec) -> list[Any]:
    """What a digest covers of a task; as it was before a positive class could be chosen."""
    chosen = [task.positive_label] if task.label_space.positive != 1 else []
    return [task.kind, task.label_names, task.metrics, *chosen]


def _check_rows(split: _RawSplit, task: TaskSpec) -> list[_Sample]:
    names = task.label_names or ()
    ids = {str(i) if split.holds_ids else name: i for i, name in enumerate(names)}
    # Where names are numbers, a number that is none of them is a fault and no index.
    may_be_index = not any(map(_is_number, names))
    samples = []
    for position, (line, row) in enumerate(split.rows):
        texts = [_value(split.origin, line, row, column) for column in task.text_columns]
        for column, text in zip(task.text_columns, texts, strict=True):
            if not isinstance(text, str):
                raise row_error(
                    split.origin, line, f"column {column!r} holds no text: {text!r}", "mend it"
                )
        label = _value(split.origin, line, row, task.label_column)
        number = (
            _regression_label(split.origin, line, label)
            if task.kind == "regression"
            else _class_id(split.origin, line, label, ids, may_be_index)
        )
        samples.append(_Sample(texts[0], texts[1] if len(texts) == 2 else None, number, position))
    return samples


def _value(origin: Path, line: int, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise row_error(
            origin,
            line,
            f"there is no column {column!r}; there are {', '.join(map(repr, row))}",
            "check data.text_columns and data.label_column; a file without a header line needs "
            "data.column_names",
        )
    return row[column]


def _class_key(origin: Path, line: int, label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    missing = label is None or (isinstance(label, float) and math.isnan(label))
    key = "" if missing else str(label).strip()
    if not key:
        raise row_error(origin, line, "the label is missing", "fill it in or drop the line")
    return key


def _class_id(origin: Path, line: int, label: Any, ids: dict[str, int], may_be_index: bool) -> int:
    key = _class_key(origin, line, label)
    if key in ids:
        return ids[key]
    if may_be_index and key.isdecimal() and int(key) < len(ids):
        return int(key)
    raise row_error(
        origin,
        line,
        f"label {key!r} is not in the list {', '.join(map(repr, ids))}",
        "mend the line, or set data.label_names",
    )


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _regression_label(origin: Path, line: int, label: Any) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise row_error(
            origin, line, f"label {label!r} is not a finite number", "mend or drop the line"
        )
    return number


def _withhold(
    samples: list[_Sample], num_samples: int, seed: int
) -> tuple[list[_Sample], list[_Sample]]:
    if not num_samples:
        return samples, []
    kept, held = withhold([(s.text_a, s.text_b) for s in samples], num_samples, seed=seed)
    return [samples[row] for row in kept], [samples[row] for row in held]


def _draw(samples: list[_Sample], limit: int | None, seed: int) -> list[_Sample]:
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(seed).permutation(len(samples))[:limit]
    return [samples[i] for i in sorted(chosen.tolist())]


def _to_dataset(samples: list[_Sample], task: TaskSpec) -> Dataset:
    from datasets import Dataset, Features, Value

    label = Value("float64" if task.kind == "regression" else "int64")
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


def _digest(task: list[Any], *splits: list[_Sample]) -> str:
    digest = hashlib.sha256(json.dumps(task).encode())
    for samples in splits:
        digest.update(b"\nsplit\n")
        for s in samples:
            digest.update(json.dumps([s.text_a, s.text_b, s.label, s.sample_id]).encode())
    return digest.hexdigest()
