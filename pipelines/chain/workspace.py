"""What the stages of one chain share: directories, data and the start model, each found once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import DataError
from moe_dist.uris import redact_uri

from .fingerprints import path_digest
from .open_files import open_files

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TaskDataConfig, TrainConfig
    from moe_dist.data.loaders import Encoded
    from moe_dist.data.mixture import Rows
    from moe_dist.data.sources import Splits
    from moe_dist.data.summary import DataSummary
    from moe_dist.data.tasks import Split
    from moe_dist.tracking import DatasetInput
    from moe_dist.workers.ray_session import RaySession

    from ..console import Console

COMPARE_DIRECTORY = "compare"


class Workspace:
    """The directories and inputs of one run.

    Args:
        config: the main run's configuration (not a comparison's).
        console: where progress is shown.
    """

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        # The chain's connection to Ray; without one, each job makes its own.
        self.session: RaySession | None = None
        self.is_cluster_checked = False
        self.console = console
        self.files = open_files(config.run_dir)
        self.root = self.files.root

    def stage_directory(self, stage: str, label: str = "") -> Path:
        """Return where a stage keeps its files; without a label, the main student's."""
        return self.root / COMPARE_DIRECTORY / label / stage if label else self.root / stage

    @cached_property
    def rows(self) -> Rows:
        """The training and dev data of all tasks, fetched and read on first use."""
        from moe_dist.data.mixture import load_rows
        from moe_dist.jobs.job import row_arguments

        return load_rows(row_arguments(self.config.data, self.config.seed))

    @property
    def splits(self) -> Splits:
        """The data of a run of one task.

        Raises:
            DataError: if the run has several.
        """
        from moe_dist.data.sources import Splits

        rows = self.rows
        if not isinstance(rows, Splits):
            raise DataError(
                f"this works on one task, and the recipe has {len(rows.parts)}",
                remedy="give a recipe with one data set",
            )
        return rows

    @cached_property
    def summaries(self) -> dict[str, DataSummary]:
        """What each task's data hold, with what cutting takes from them; "" where there is one."""
        from moe_dist.data.dev_copies import num_near_copies
        from moe_dist.data.summary import (
            measure_cut,
            measure_pieces,
            measure_target_cut,
            measure_windows,
        )
        from moe_dist.inference.start_tokenizer import read_tokenizer

        tokenizer = read_tokenizer(self.start_model, self.config.model.revision)
        max_length = self.config.model.max_length
        train, dev = (self.encoded_tasks(part, tokenizer) for part in ("train", "dev"))
        found = {}
        for name, splits in self.rows.parts.items():
            both = (train[name], dev[name])
            summary = splits.summary.with_cuts(*(measure_cut(part, max_length) for part in both))
            if splits.task.task_kind.needs_all_rows(is_training=True):
                summary = summary.with_pieces(*(measure_pieces(part, max_length) for part in both))
            else:
                summary = summary.with_windows(*map(measure_windows, both))
            limit = splits.task.task_kind.target_limit(splits.task.options)
            if limit is not None:
                summary = summary.with_target_cuts(
                    *(measure_target_cut(part, limit) for part in both)
                )
            if splits.unlabelled is not None:
                joined = self._encode(splits, "distilled", tokenizer)
                cuts = [measure_cut(part, max_length) for part in (joined, train[name])]
                num_cut, num_before = (0 if cut is None else cut.num_cut for cut in cuts)
                summary = summary.with_unlabelled_cut(num_cut - num_before)
            found[name] = summary.with_near_copies(num_near_copies(splits))
        return found

    def encoded(self, part: Split, tokenizer: Any) -> Encoded:
        """Tokenise a split of a run of one task; see `encoded_tasks`."""
        return self._encode(self.splits, part, tokenizer)

    def encoded_tasks(self, part: Split, tokenizer: Any) -> dict[str, Encoded]:
        """Tokenise a split in this process, by task; the cache entry is the workers' too.

        The name of a run's only task is "".
        """
        return {
            name: self._encode(splits, part, tokenizer) for name, splits in self.rows.parts.items()
        }

    def _encode(self, splits: Splits, part: Split, tokenizer: Any) -> Encoded:
        from moe_dist.data.loaders import encode
        from moe_dist.data.tasks import TRAINED_ON

        rows = getattr(splits, part)
        assert rows is not None, "who asks for the hold-out has seen that there is one"
        return encode(
            rows,
            tokenizer,
            max_length=self.config.model.max_length,
            kind=splits.task.kind_on(part),
            options=splits.task.options,
            is_training=part in TRAINED_ON,
            cache_dir=None,
            digest=f"{splits.digest}-{part}",
        )

    @property
    def data_name(self) -> str:
        """What the data are called, without a path of this machine."""
        data = self.config.data
        return "+".join(data.tasks) if data.tasks else _name_of(data)

    @cached_property
    def dataset_inputs(self) -> list[DatasetInput]:
        """The data as the tracking server names it."""
        from moe_dist.tracking import DatasetInput

        found = []
        for task, splits in self.rows.parts.items():
            data = (self.config.data.tasks or {}).get(task, self.config.data)
            name = f"{task}: {_name_of(data)}" if task else _name_of(data)
            parts = [("train", "training", splits.train), ("dev", "evaluation", splits.dev)]
            if splits.unlabelled is not None:
                parts.append(("unlabelled", "training", splits.unlabelled))
            if splits.holdout is not None:
                parts.append(("holdout", "selection", splits.holdout))
            found += [
                DatasetInput(
                    f"{name} ({part})",
                    digest=splits.digest,
                    source=data.source,
                    context=context,
                    num_rows=len(rows),
                )
                for part, context, rows in parts
            ]
        return found

    @cached_property
    def start_model(self) -> str:
        """The pre-trained model that the teacher starts from: a directory or a hub name."""
        from moe_dist.data.sources import resolve_model
        from moe_dist.inference.scratch import SCRATCH_PREFIX, scratch_model

        model = self.config.model
        if model.teacher.startswith(SCRATCH_PREFIX):
            name = model.teacher.removeprefix(SCRATCH_PREFIX)
            return str(scratch_model(name, self.rows, seed=self.config.seed))
        return resolve_model(model.teacher, revision=model.revision)

    @property
    def start_model_address(self) -> str:
        """Where workers find the start model: a directory, a URI or a hub name."""
        path = Path(self.start_model)
        return self.files.address(path) if path.is_dir() else self.start_model

    @cached_property
    def start_model_digest(self) -> str:
        """What identifies the start model: its files' hashes, or the hub name."""
        path = Path(self.start_model)
        if path.exists():
            return path_digest(path)
        return f"hub:{self.start_model}@{self.config.model.revision or 'main'}"

    def num_steps(self, train: TrainConfig, split: Split) -> int:
        """Return the optimizer steps of a training stage over all epochs, within `max_steps`."""
        from moe_dist.data.mixture import mixture_steps

        # As `TrainBatches` cuts an epoch too.
        steps = mixture_steps(self._num_samples(split), train.batch_size) * train.num_epochs
        return min(steps, train.max_steps or steps)

    def _num_samples(self, split: Split) -> list[int]:
        """Count each task's samples to train on."""
        from moe_dist.inference.start_tokenizer import read_tokenizer

        parts = self.rows.parts.values()
        if all(splits.task.kind_on(split).is_one_a_row for splits in parts):
            return [len(getattr(splits, split)) for splits in parts]
        tokenizer = read_tokenizer(self.start_model, self.config.model.revision)
        return [len(encoded) for encoded in self.encoded_tasks(split, tokenizer).values()]


def _name_of(data: TaskDataConfig) -> str:
    if data.name:
        return f"{data.name}/{data.subset}" if data.subset else data.name
    return Path(redact_uri(data.train)).name if data.train else data.source
