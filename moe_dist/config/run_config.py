"""RunConfig: a whole recipe, its comparisons and its plain forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from moe_dist.config.data_section import TASK_KEYS, DataConfig
from moe_dist.config.evaluate_section import EvaluateConfig
from moe_dist.config.moe_section import MoeConfig
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.config.overrides import apply_overrides
from moe_dist.config.search_section import SearchConfig
from moe_dist.config.sections import (
    NAME_PATTERN,
    OBSERVATION,
    PLACEMENT,
    FinetuneConfig,
    Integer,
    ModelConfig,
    ParallelConfig,
    Section,
    TrackingConfig,
    TrainConfig,
)
from moe_dist.config.student import StudentConfig
from moe_dist.errors import ConfigError
from moe_dist.redaction import hide_secrets
from moe_dist.uris import below, is_uri

BUILT_IN_COMPARISONS = ("dense",)
# The teacher, the data and the scores are the same for all students of one chain.
COMPARABLE_SECTIONS = ("student", "moe", "distill", "train", "parallel")


def _names_to_mapping(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        return {str(label): {} for label in value}
    if isinstance(value, Mapping):
        return {label: {} if entry is None else entry for label, entry in value.items()}
    return value


def _path_or_uri(value: Any) -> Path | str:
    if not isinstance(value, str | Path):
        raise PydanticCustomError("path_type", "not a path")
    text = str(value)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text.rstrip("/") if is_uri(text) else Path(value)


PathOrUri = Annotated[Path | str, PlainValidator(_path_or_uri)]
Comparisons = Annotated[dict[str, dict[str, Any]], BeforeValidator(_names_to_mapping)]


class RunConfig(Section):
    """A whole recipe, checked, with every path absolute."""

    name: str = Field(
        json_schema_extra=PLACEMENT,
        pattern=NAME_PATTERN,
        max_length=100,
        description="Name of the run and of its directory under `output_dir`: letters, digits, "
        "dots, dashes and underscores.",
    )
    seed: Integer = Field(
        default=0, ge=0, description="Seed of splits, batches, dropout, routers and new weights."
    )
    output_dir: PathOrUri = Field(
        json_schema_extra=PLACEMENT,
        default=Path("outputs"),
        description="Directory for all results, relative to the working directory; or a URI such "
        "as `s3://bucket/results`. On a cluster it must be storage that outlives the job.",
    )
    compare: Comparisons = Field(
        json_schema_extra=OBSERVATION,
        default_factory=dict,
        description="Other students to train from the same teacher and to report beside the main "
        "one: a list of built-in names (`[dense]`), or a mapping from a name to its overrides, "
        "such as `{gate: {moe.router: token_gate}}`. `dense` is one expert of the same active "
        "size, without routing.",
    )
    model: ModelConfig = Field(description="The dense model to start from.")
    data: DataConfig = Field(description="The sentences to train and measure on.")
    finetune: FinetuneConfig = Field(
        default_factory=FinetuneConfig, description="What differs from `train` for the teacher."
    )
    student: StudentConfig = Field(
        default_factory=StudentConfig,
        description="Depth and width of a student that is smaller than its teacher, before its "
        "neurons become experts. Without these keys it has the teacher's shape.",
    )
    moe: MoeConfig = Field(
        default_factory=MoeConfig, description="How feed-forward neurons become experts."
    )
    distill: ObjectivesConfig = Field(
        default_factory=ObjectivesConfig, description="The loss that the student is trained on."
    )
    train: TrainConfig = Field(
        default_factory=TrainConfig, description="How the student is trained."
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="Workers and how they share the work."
    )
    evaluate: EvaluateConfig = Field(
        default_factory=EvaluateConfig, description="What the measured student must be."
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="Where runs are recorded."
    )
    search: SearchConfig = Field(
        default_factory=SearchConfig,
        description="What `moe-dist search` tries; the other commands do not read it.",
    )

    @property
    def run_dir(self) -> Path | str:
        """Directory of this run, `output_dir/name`: a path, or a URI as text."""
        return below(self.output_dir, self.name)

    @property
    def teacher_train(self) -> TrainConfig:
        """Training settings of the teacher: `train` with what `finetune` changes."""
        changes = {key: value for key, value in self.finetune if value is not None}
        return self.train.model_copy(update=changes)

    def resolve_comparison(self, label: str) -> RunConfig:
        """Give the settings of one student of `compare`; ConfigError if there is none.

        The teacher's settings stay those of the main run, whatever the comparison changes in
        `train`, so that all students share one teacher.
        """
        if label not in self.compare:
            known = ", ".join(self.compare) or "none"
            raise ConfigError([f"compare.{label} is not in the recipe; it has: {known}."])
        return RunConfig.model_validate(merge_comparison(self, label))

    def flatten(self) -> dict[str, str | int | float | bool]:
        """Give settings by dotted key, without secrets; lists and mappings as JSON."""
        return flatten_settings(self._plain())

    def to_yaml(self) -> str:
        """Write the resolved recipe as YAML, without secrets."""
        return yaml.safe_dump(self._plain(), sort_keys=False, allow_unicode=True)

    def _plain(self) -> dict[str, Any]:
        # A recipe without a search says nothing of it.
        left_out = None if self.search.space else {"search"}
        plain: dict[str, Any] = _without_secrets(self.model_dump(mode="json", exclude=left_out))
        if self.data.tasks is None:
            plain["data"] = {k: v for k, v in plain["data"].items() if k not in TASK_KEYS}
        return plain


def flatten_settings(plain: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Give plain settings by dotted key; lists and mappings as JSON, null as "null"."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in plain.items():
        entries = value if isinstance(value, dict) and key != "compare" else {"": value}
        if key == "data":
            entries = dict(entries)
            # Each task's under keys of their own, where a path can be recognised as one.
            for task, own in (entries.pop("tasks", None) or {}).items():
                entries |= {f"tasks.{task}.{name}": entry for name, entry in own.items()}
        for name, entry in entries.items():
            dotted = f"{key}.{name}" if name else key
            is_plain = isinstance(entry, str | int | float | bool)
            flat[dotted] = entry if is_plain else json.dumps(entry, sort_keys=True)
    return flat


def _without_secrets(value: Any) -> Any:
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: _without_secrets(inner) for key, inner in value.items()}
    return [_without_secrets(inner) for inner in value] if isinstance(value, list) else value


def merge_comparison(config: RunConfig, label: str) -> dict[str, Any]:
    """Give the raw settings of one comparison: built-in overrides, then its own on top."""
    teacher = config.teacher_train
    pinned = {key: getattr(teacher, key) for key in FinetuneConfig.model_fields}
    raw = config.model_dump()
    raw["compare"] = {}
    raw["search"] = {}
    raw["finetune"] = pinned
    if not config.moe.fits_output:
        # Or a start that the student does not have would decide who wins.
        raw["moe"]["fit_output"] = False
    if label == "dense":
        apply_overrides(raw, dense_overrides(config.moe))
    apply_overrides(raw, config.compare[label])
    return raw


def dense_overrides(moe: MoeConfig) -> dict[str, Any]:
    """Give what turns a recipe into its pruned dense baseline of the same active size."""
    return {
        "moe.num_experts": 1,
        "moe.expert_size": moe.active_neurons,
        "moe.num_shared_neurons": 0,
        "moe.tie_shared": False,
        "moe.top_k": 1,
        # The strongest dense student there is: the most important neurons, whatever the MoE does.
        "moe.partition": "importance",
        "distill.load_balancing_weight": 0.0,
        "distill.z_loss_weight": 0.0,
        "distill.entropy_weight": 0.0,
        "train.expert_learning_rate_scale": 1.0,
        "parallel.ep_size": 1,
    }
