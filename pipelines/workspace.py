"""What the stages of one chain share: places, data and the start model, each found once."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import ConfigError

from .fingerprints import path_digest
from .payloads import data_arguments

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TrainConfig
    from moe_dist.data.sources import Splits
    from moe_dist.tracking import DatasetInput
    from moe_dist.training.driver import RaySession

    from .console import Console

COMPARE_DIRECTORY = "compare"
MINIMUM_FREE_MIB = 256


class Workspace:
    """The places and inputs of one run.

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
        self.root = config.run_dir

    def stage_directory(self, stage: str, label: str = "") -> Path:
        """Return where a stage keeps its files.

        Args:
            stage: the stage's name.
            label: the comparison; empty for the main student.

        Returns:
            An absolute path, which need not exist.
        """
        return self.root / COMPARE_DIRECTORY / label / stage if label else self.root / stage

    @cached_property
    def splits(self) -> Splits:
        """The training and dev data, fetched and read on first use."""
        from moe_dist.data.sources import load_splits

        return load_splits(**self.data_arguments)

    @cached_property
    def data_arguments(self) -> dict[str, Any]:
        """The arguments of `load_splits`, also handed to workers."""
        return data_arguments(self.config)

    @property
    def data_name(self) -> str:
        """What the data are called, without a path of this machine."""
        data = self.config.data
        if data.name:
            return f"{data.name}/{data.subset}" if data.subset else data.name
        return Path(data.train).name if data.train else data.source

    @cached_property
    def dataset_inputs(self) -> list[DatasetInput]:
        """The data as the tracking server names it."""
        from moe_dist.tracking import DatasetInput

        splits = self.splits
        parts = (("train", "training", splits.train), ("dev", "evaluation", splits.dev))
        return [
            DatasetInput(
                f"{self.data_name} ({part})",
                digest=splits.digest,
                source=self.config.data.source,
                context=context,
                num_rows=len(rows),
            )
            for part, context, rows in parts
        ]

    @cached_property
    def start_model(self) -> str:
        """The pre-trained model that the teacher starts from: a directory or a hub name."""
        from moe_dist.data.sources import resolve_model

        model = self.config.model
        return resolve_model(model.teacher, revision=model.revision)

    @cached_property
    def start_model_digest(self) -> str:
        """What identifies the start model: its files' hashes, or the hub name."""
        path = Path(self.start_model)
        if path.exists():
            return path_digest(path)
        return f"hub:{self.start_model}@{self.config.model.revision or 'main'}"

    def num_steps(self, train: TrainConfig) -> int:
        """Return how many optimizer steps a training stage takes.

        Args:
            train: the stage's settings.

        Returns:
            Steps over all epochs, within `max_steps`.
        """
        # As `TrainBatches` cuts an epoch.
        steps = max(1, len(self.splits.train) // train.batch_size) * train.num_epochs
        return min(steps, train.max_steps or steps)

    def prepare(self) -> None:
        """Make the output directory, and check that it takes files, before anything starts.

        Raises:
            ConfigError: if it cannot be written or the disk is almost full.
        """
        remedy = "choose another place with `--set output_dir=DIRECTORY`."
        source = self.config.name
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-") as probe:
                probe.write(b"\0" * (1 << 16))
                probe.flush()
                os.fsync(probe.fileno())
            free_mib = shutil.disk_usage(self.root).free / (1 << 20)
        except OSError as error:
            fault = f"output_dir: cannot write in {self.root} ({error.strerror or error}); {remedy}"
            raise ConfigError([fault], source=source) from error
        if free_mib < MINIMUM_FREE_MIB:
            self.remove_if_empty()
            fault = (
                f"output_dir: only {free_mib:.0f} MiB are free where {self.root} lies, and a run "
                f"needs at least {MINIMUM_FREE_MIB} MiB; free some space, or {remedy}"
            )
            raise ConfigError([fault], source=source)

    def remove_if_empty(self) -> None:
        """Take the run's directory away again where nothing was written into it."""
        for directory in (self.root, self.root.parent):
            try:
                directory.rmdir()
            except OSError:
                return
