"""The whole chain: stages in order, for the main student and for each comparison."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.errors import ClusterError, ConfigError, MoeDistError, is_full_disk
from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.tracking import build_tracker, scrub
from moe_dist.whole_files import whole_file, write_json
from moe_dist.workers.driver import runs_here
from moe_dist.workers.ray_session import RaySession, ray_session

from ..checks.preflight import check_before_start
from ..report import report
from ..report.report_text import to_markdown
from ..stages import adapt, distill, evaluate, finetune_teacher, score_importance, shrink
from .recording import chain_tags, log_models, metric_tags
from .stage import StageInputs, StageResult, stage_key
from .stage_job import placed_here
from .stage_recovery import FINISHED
from .workspace import Workspace

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

    from ..console import Console

RunStage = Callable[["RunConfig", StageInputs, "TrackedRun"], StageResult]

STAGES: dict[str, RunStage] = {
    finetune_teacher.NAME: finetune_teacher.run,
    score_importance.NAME: score_importance.run,
    shrink.NAME: shrink.run,
    adapt.NAME: adapt.run,
    distill.NAME: distill.run,
    evaluate.NAME: evaluate.run,
}
RECIPE_NAME = "recipe.yaml"
SHARED_DIRECTORY = "shared"
"""Copies that go to the tracking server in place of files that name this machine."""
PER_STUDENT = (shrink.NAME, adapt.NAME, distill.NAME)
_TRAINING = (finetune_teacher.NAME, distill.NAME)
_HEAVY_IMPORTS = ("torch", "transformers.modeling_layers", "datasets", "mlflow")
"""What the checks before a start need, and the tracker after them."""

WORKER_IMPORTS = (
    "moe_dist.jobs.finetune",
    "moe_dist.jobs.distill",
    "moe_dist.distributed.deepspeed_import",
    "moe_dist.distributed.deepspeed_engine",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "datasets",
)
"""What the chain's jobs need on their workers, wherever it is imported; nothing of Ray."""


@dataclass(frozen=True)
class Step:
    """One stage to run, for one student.

    Attributes:
        stage: the stage's name.
        label: the comparison; empty for the main student.
    """

    stage: str
    label: str = ""

    @property
    def key(self) -> str:
        """The name in reports and mappings."""
        return stage_key(self.stage, self.label)


@dataclass(frozen=True)
class ChainResult:
    """What a chain produced.

    Attributes:
        results: the result of each stage, by key.
        report_path: `report.json`; None where the chain stopped before evaluating.
        open_hint: the line that opens the tracking UI; empty without tracking.
        shown: says where a file of the results lies, as a path or a URI.
    """

    results: dict[str, StageResult]
    report_path: Path | None
    open_hint: str
    shown: Callable[[Path], str] = str


def plan_steps(config: RunConfig, until: str = evaluate.NAME) -> list[Step]:
    """List the stages that lead to one of them, in order.

    Args:
        config: the run's configuration.
        until: the last stage.

    Returns:
        The steps; comparisons are among them only where all students are measured together.

    Raises:
        ConfigError: if a smaller student is wanted and the recipe gives no size.
    """
    if until == shrink.NAME and not config.student.is_smaller:
        fault = "student has no size, so there is nothing to cut; give for example num_layers."
        raise ConfigError([fault], source=config.name)
    names = list(STAGES)
    wanted = names[: names.index(until) + 1]
    steps = [Step(name) for name in wanted if name != evaluate.NAME]
    if until == evaluate.NAME:
        steps += [Step(name, label) for label in config.compare for name in PER_STUDENT]
        steps.append(Step(evaluate.NAME))
    return [step for step in steps if step.stage != shrink.NAME or _is_smaller(config, step.label)]


def _is_smaller(config: RunConfig, label: str) -> bool:
    own = config.resolve_comparison(label) if label else config
    return own.student.is_smaller


def run_chain(config: RunConfig, console: Console, *, until: str = evaluate.NAME) -> ChainResult:
    """Run the chain up to a stage; finished stages are skipped.

    There is a report where everything was measured. Raises MoeDistError if the run cannot start
    or a stage fails.
    """
    workspace = Workspace(config, console)
    with disk_errors(workspace.root):
        return _run_in(workspace, until)


def _run_in(workspace: Workspace, until: str) -> ChainResult:
    config = workspace.config
    files = workspace.files
    files.prepare(config.name)
    tracking = config.tracking
    steps = plan_steps(config, until)
    with ExitStack() as stack:
        session = stack.enter_context(ray_session(preload=WORKER_IMPORTS))
        try:
            _start_early(workspace, steps, session)
            check_before_start(config, workspace)
            tracker = build_tracker(
                tracking.uri, experiment=tracking.experiment, enabled=tracking.enabled
            )
        except BaseException:
            files.remove_if_empty()
            raise
        stack.enter_context(only_one(workspace.root))
        stack.enter_context(files.opened())
        write_resolved_recipe(config, workspace.root)
        tags = chain_tags(config) | metric_tags(workspace.rows)
        with tracker.chain(
            config.name,
            workspace.root,
            params=config.flatten(),
            identity=settings_of_kind(config),
            tags=tags,
        ) as chain:
            chain.log_artifact(write_shared_recipe(config, workspace.root))
            for dataset in workspace.dataset_inputs:
                chain.log_dataset(dataset)
            workspace.console.planned([step.key for step in steps])
            results = _run_steps(workspace, chain, steps, session)
            log_models(config, workspace, chain, results)
            report_path = None
            if evaluate.NAME in results:
                report_path = _report(config, workspace, chain, results)
            return ChainResult(results, report_path, chain.open_hint(), files.shown)


def write_resolved_recipe(config: RunConfig, root: Path) -> None:
    """Write the recipe with every default filled in, a password in `tracking.uri` masked."""
    with whole_file(root / RECIPE_NAME) as beside:
        beside.write_text(config.to_yaml(), encoding="utf-8")


def write_shared_recipe(config: RunConfig, root: Path) -> Path:
    """Write the recipe as it may leave this machine: without paths and secrets of its own.

    Returns the file. The recipe that runs again here is the one in `root` itself; there too a
    password in `tracking.uri` is masked.
    """
    import yaml

    path = root / SHARED_DIRECTORY / RECIPE_NAME
    content = scrub(yaml.safe_load(config.to_yaml()))
    with whole_file(path) as beside:
        beside.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
    return path


def _start_early(workspace: Workspace, steps: list[Step], session: RaySession) -> None:
    """Start a local Ray, which mostly waits for its processes, beside the slow imports."""
    needs_ray = any(
        not (workspace.stage_directory(step.stage, step.label) / FINISHED).exists()
        for step in steps
        if step.stage in _TRAINING and _runs_on_ray(workspace.config, step)
    )
    if not needs_ray or "RAY_ADDRESS" in os.environ:
        return
    # The checks come first: what is wrong with Ray is said when a job needs it.
    with suppress(ClusterError):
        session.connect(beside=import_heavy)


def _runs_on_ray(config: RunConfig, step: Step) -> bool:
    """Tell whether a training stage has Ray's workers; a model that is kept is short."""
    own = config.resolve_comparison(step.label) if step.label else config
    train = own.teacher_train if step.stage == finetune_teacher.NAME else own.train
    parallel = (own if train.num_epochs else placed_here(own)).parallel
    return not runs_here(parallel.launcher, parallel.num_workers)


def import_heavy() -> None:
    """Import what the driver of a training needs, once and for all."""
    for name in _HEAVY_IMPORTS:
        importlib.import_module(name)


def _run_steps(
    workspace: Workspace, chain: TrackedRun, steps: list[Step], session: RaySession
) -> dict[str, StageResult]:
    config = workspace.config
    results: dict[str, StageResult] = {}

    def run(step: Step) -> None:
        own = config.resolve_comparison(step.label) if step.label else config
        inputs = StageInputs(workspace, results, step.label)
        results[step.key] = STAGES[step.stage](own, inputs, chain)

    workspace.session = session
    with session:
        for step in steps:
            if step.stage != evaluate.NAME:
                run(step)
    workspace.session = None
    # Ray is down by now: its idle processes would disturb the latencies.
    for step in steps:
        if step.stage == evaluate.NAME:
            run(step)
    return results


def _report(
    config: RunConfig, workspace: Workspace, chain: TrackedRun, results: dict[str, StageResult]
) -> Path:
    content = report.build_report(config, results, run_id=chain.run_id)
    path = workspace.root / report.JSON_NAME
    write_json(path, content)
    text = workspace.root / report.MARKDOWN_NAME
    text.write_text(to_markdown(content), encoding="utf-8")
    # The same chain may report again; its points stay single.
    MetricLog(workspace.root / METRIC_LOG).truncate_after(-1)
    chain.log_metrics(0, report.headline_metrics(content))
    for artifact in (path, text):
        chain.log_artifact(artifact)
    for key, result in results.items():
        for plot in sorted(result.directory.glob("*.png")):
            chain.log_artifact(plot, folder=f"plots/{key}")
    return path


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Keep a second process from writing the same run meanwhile; a MoeDistError if one does."""
    with (root / ".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                # Some shared file systems know no locks; they are no reason not to run.
                yield
                return
            raise MoeDistError(
                f"another moe-dist process is working in {root}.",
                remedy="wait until it ends, or give this run another `name`.",
            ) from None
        yield


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn the error of a full disk into a MoeDistError in plain words."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise MoeDistError(
            f"the disk is full: {error.filename or root} could not be written whole.",
            remedy="free some space and start the same command again; finished stages are kept.",
        ) from error
