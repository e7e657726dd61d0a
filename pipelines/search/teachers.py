"""What trials share, made once: a teacher and its scores for all trials that agree on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig
from moe_dist.config.search_checks import changes_teacher, point_settings
from moe_dist.config.search_space import Dimension, value_of
from moe_dist.whole_files import write_json
from moe_dist.workers.worker_cpus import trial_cpus

from ..chain.fingerprints import stage_fingerprint, value_digest
from ..chain.stage import StageInputs, StageResult
from ..chain.workspace import Workspace
from ..stages import finetune_teacher, score_importance
from .trial import LATENCY_SEQ_LEN, TeacherFacts, choosing_split

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

OWN = "own"
"""The key of the recipe's own teacher."""
SHARED_DIRECTORY = "shared"
HOLDOUT_DIRECTORY = "holdout"
"""A file for each teacher: what it reaches on the rows that its students are chosen on."""


def teacher_key(config: RunConfig, overrides: Mapping[str, Any]) -> str:
    """Name the teacher of a point: `OWN`, or a short digest of what it changes of the teacher."""
    changed = {
        path: value
        for path, value in overrides.items()
        if changes_teacher(path) and value != value_of(config, path)
    }
    return value_digest(changed)[:12] if changed else OWN


def teacher_points(
    config: RunConfig, dimensions: tuple[Dimension, ...]
) -> Iterator[dict[str, Any]]:
    """List what trials may change of the teacher, once each; the checks keep these few."""
    concerned = [one for one in dimensions if changes_teacher(one.path)]
    if config.search.baseline and concerned:
        yield {}
    values = []
    for one in concerned:
        resting = one.otherwise or (value_of(config, one.path),)
        values.append([*(one.choices or ()), *(resting if one.conditions else ())])
    for chosen in itertools.product(*values):
        yield {one.path: value for one, value in zip(concerned, chosen, strict=True)}


@dataclass(frozen=True)
class SharedWork:
    """Runs the stages that trials share.

    Args:
        workspace: the sweep's own.
        tracker: the sweep's run.
    """

    workspace: Workspace
    tracker: TrackedRun

    def prepare(self, dimensions: tuple[Dimension, ...]) -> dict[str, TeacherFacts]:
        """Make every teacher that trials may need, facts by key; finished ones are skipped."""
        config = self.workspace.config
        needed = {
            teacher_key(config, overrides): overrides
            for overrides in teacher_points(config, dimensions)
        }
        return {key: self._make(key, overrides) for key, overrides in needed.items()}

    def _make(self, key: str, overrides: Mapping[str, Any]) -> TeacherFacts:
        workspace = self.workspace
        if key != OWN:
            workspace = self._beside(key, overrides)
        results: dict[str, StageResult] = {}
        for stage in (finetune_teacher, score_importance):
            inputs = StageInputs(workspace, results)
            results[stage.NAME] = stage.run(workspace.config, inputs, self.tracker)
        teacher = results[finetune_teacher.NAME]
        model = teacher.outputs["model"]
        has_holdout = choosing_split(workspace.config) == "holdout"
        address = workspace.files.address
        return TeacherFacts(
            model=address(model),
            scores=address(results[score_importance.NAME].outputs["scores"]),
            quality=teacher.metrics[workspace.splits.task.main_metric],
            holdout_quality=self._holdout_quality(key, workspace, teacher) if has_holdout else None,
            latency_ms=self._latency(address(model)) if self._wants_latency else None,
        )

    def _beside(self, key: str, overrides: Mapping[str, Any]) -> Workspace:
        """Open a place for another teacher, below the sweep's directory."""
        config = self.workspace.config
        changed = {path: value for path, value in overrides.items() if changes_teacher(path)}
        own = RunConfig.model_validate(
            point_settings(config, changed)
            | {"name": key, "output_dir": self.workspace.root / "search" / SHARED_DIRECTORY}
        )
        workspace = Workspace(own, self.workspace.console)
        workspace.session = self.workspace.session
        # What lies below the sweep's directory goes where the sweep's files go.
        workspace.files = self.workspace.files
        workspace.root.mkdir(parents=True, exist_ok=True)
        return workspace

    def _holdout_quality(self, key: str, workspace: Workspace, teacher: StageResult) -> float:
        """Give a teacher's quality on the rows that its students are chosen on; measured once."""
        metric, max_length = workspace.splits.task.main_metric, workspace.config.model.max_length
        inputs = {"model": teacher.digests["model"], "rows": workspace.splits.digest}
        settings = {"metric": metric, "max_length": max_length}
        fingerprint = stage_fingerprint("holdout", settings=settings, inputs=inputs)
        path = self.workspace.root / "search" / HOLDOUT_DIRECTORY / f"{key}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["fingerprint"] == fingerprint:
                return float(known[metric])
        model = workspace.files.fetch(teacher.outputs["model"])
        quality = self._measure(workspace, model, metric)
        write_json(path, {"fingerprint": fingerprint, metric: quality})
        self.workspace.files.publish(path.parent)
        return quality

    def _measure(self, workspace: Workspace, model: Path, metric: str) -> float:
        from moe_dist.inference.saving import load_model, load_tokenizer
        from moe_dist.jobs.job_data import job_data, measure
        from moe_dist.measure.evaluation import predict
        from moe_dist.training.hardware import pick_device

        config = workspace.config
        device = pick_device(config.parallel.use_gpu)
        data = job_data(workspace.splits, load_tokenizer(model), max_length=config.model.max_length)
        answer = partial(
            predict,
            load_model(model, device),
            batch_size=config.train.eval_batch_size,
            pad_token_id=data.pad_token_id,
            device=device,
        )
        return measure(data, answer, "holdout").metrics[metric]

    @property
    def _wants_latency(self) -> bool:
        return "latency" in self.workspace.config.search.wanted

    def _latency(self, model: str) -> float:
        """Time a teacher while nothing else of ours runs."""
        from moe_dist.inference import load_model
        from moe_dist.measure.latency import measure_latency

        config = self.workspace.config
        size = config.search.latency_batch_size
        timed = measure_latency(
            load_model(model),
            batch_sizes=(size,),
            seq_len=min(LATENCY_SEQ_LEN, config.model.max_length),
            threads=trial_cpus(config.parallel.cpus_per_worker),
        )
        return timed[size].median_ms
