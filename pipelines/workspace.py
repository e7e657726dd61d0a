"""What the stages of one chain share: places, data and the start model, each found once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.uris import redact_uri

from .files import open_files
from .fingerprints import path_digest
from .payloads import data_arguments

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TrainConfig
    from moe_dist.data.loaders import Encoded
    from moe_dist.data.sources import Splits
    from moe_dist.tracking import DatasetInput
    from moe_dist.training.driver import RaySession
    from moe_dist.training.payloads import Split

    from .console import Console

COMPARE_DIRECTORY = "compare"


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
        self.files = open_files(config.run_dir)
        self.root = self.files.root

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

    def encoded(self, part: Split, tokenizer: Any) -> Encoded:
        """Tokenise a split in this process, as workers do: the cache entry is theirs too.

        Args:
            part: which split.
            tokenizer: the teacher's.

        Returns:
            The samples.
        """
        from moe_dist.data.loaders import encode

        rows = getattr(self.splits, part)
        assert rows is not None, "who asks for the hold-out has seen that there is one"
        return encode(
            rows,
            tokenizer,
            max_length=self.config.model.max_length,
            cache_dir=None,
            digest=f"{self.splits.digest}-{part}",
        )

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
        return Path(redact_uri(data.train)).name if data.train else data.source

    @cached_property
    def dataset_inputs(self) -> list[DatasetInput]:
        """The data as the tracking server names it."""
        from moe_dist.tracking import DatasetInput

        splits = self.splits
        parts = [("train", "training", splits.train), ("dev", "evaluation", splits.dev)]
        if splits.holdout is not None:
            parts.append(("holdout", "selection", splits.holdout))
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
