"""`moe-dist search`: shared work once, trials on Ray Tune, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig
from moe_dist.config.search_checks import point_settings
from moe_dist.config.search_space import Dimension, parse_space
from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.data.metrics import METRICS, undefined_by_labels
from moe_dist.data.retention import why_no_ratio
from moe_dist.data.tasks import TaskSpec
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.search.early_stopping import Ruling
from moe_dist.search.population import Population
from moe_dist.search.proposers import build_proposer
from moe_dist.search.trials import BASELINE, LOG_NAME, Trial, TrialLog, rank_trials
from moe_dist.search.tune import TrialRoom, find_room, run_sweep
from moe_dist.timeline import mark
from moe_dist.tracking import build_tracker, recipe_hash
from moe_dist.workers.cluster_capacity import read_capacity
from moe_dist.workers.ray_session import RaySession, ray_session
from moe_dist.workers.worker_cpus import trial_cpus

from ..chain.chain import WORKER_IMPORTS, disk_errors, import_heavy, only_one
from ..chain.files import ResultFiles
from ..chain.recording import metric_tags, source_tags
from ..chain.workspace import Workspace
from ..checks.preflight import check_before_start
from .confirming import Confirmation, confirm
from .point_checks import PointChecks
from .rungs import rung_times
from .shared_weights import remove_weights
from .sweep_identity import note_sweep, open_sweep
from .teachers import SharedWork, TeacherFacts
from .trial import TrialRunner, choosing_split
from .trial_watch import TRIALS_DIRECTORY, Supervisor

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

    from ..console import Console

SEARCH_DIRECTORY = "search"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left.

    Attributes:
        config: the recipe, the teacher's settings pinned.
        directory: `output_dir/NAME/search`.
        trials: by number.
        seconds: of the sweep, earlier parts of it included.
        teachers: what trials were measured against, by key.
        task: what they were measured by.
        open_hint: the line that opens the tracking UI.
        num_concurrent: trials at a time.
        confirmed: the best and the recipe as it stands with other seeds; None where not asked for.
        files: where they lie.
    """

    config: RunConfig
    directory: Path
    trials: dict[int, Trial]
    seconds: float
    teachers: dict[str, TeacherFacts]
    task: TaskSpec
    open_hint: str = ""
    num_concurrent: int = 1
    confirmed: Confirmation | None = None
    files: ResultFiles = field(default_factory=lambda: ResultFiles(Path()))


Finish = Callable[[SweepResult, "TrackedRun"], int | None]
"""Writes what a sweep found, and names its best trial."""
Choose = Callable[[SweepResult], Trial | None]
"""Chooses a trial, once Ray is down, where that is not the best by the first objective."""


def search_recipe(
    config: RunConfig, console: Console, finish: Finish, choose: Choose | None = None
) -> SweepResult:
    """Run a sweep, or the rest of an interrupted one.

    Args:
        config: the recipe; its `search` section says what is tried.
        console: where progress is shown.
        finish: writes the results while the sweep's run is open.
        choose: which trial other seeds confirm; the best by the first objective if None.

    Returns:
        What it found.

    Raises:
        ConfigError: if there is no space, or the results cannot lie where they should.
        MoeDistError: if the sweep cannot start or another one lies there.
    """
    if not config.search.space:
        raise ConfigError(
            [
                "search.space is missing, which says what is tried; write one (docs/search.md), "
                "or take one with --space pipelines/recipes/search/router.yaml."
            ],
            source=config.name,
        )
    dimensions, _ = parse_space(config.search.space)
    config = pin_teacher(config)
    workspace = Workspace(config, console)
    with disk_errors(workspace.root):
        workspace.files.prepare(config.name)
        return _search_in(workspace, dimensions, finish, choose)


def pin_teacher(config: RunConfig) -> RunConfig:
    """Write the teacher's settings out, so that no point of the space changes them by `train`."""
    teacher = config.teacher_train
    pinned = {key: getattr(teacher, key) for key in type(config.finetune).model_fields}
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=pinned)})


def _search_in(
    workspace: Workspace,
    dimensions: tuple[Dimension, ...],
    finish: Finish,
    choose: Choose | None,
) -> SweepResult:
    config, console = workspace.config, workspace.console
    tracking = config.tracking
    directory = workspace.root / SEARCH_DIRECTORY
    with ExitStack() as stack:
        is_nested = _is_nested(config, dimensions)
        session = stack.enter_context(ray_session(dashboard=is_nested, preload=WORKER_IMPORTS))
        try:
            room = _find_room(config, dimensions, session)
            mark("Ray")
            check_before_start(config, workspace)
            config = workspace.config = directed(config, workspace)
            check_metrics(config, workspace)
            mark("checks")
            tracker = build_tracker(
                tracking.uri, experiment=tracking.experiment, enabled=tracking.enabled
            )
        except BaseException:
            workspace.files.remove_if_empty()
            raise
        stack.enter_context(only_one(workspace.root))
        stack.enter_context(workspace.files.opened())
        console.note(f"room for {room}")
        seconds_before = open_sweep(workspace, directory)
        log = TrialLog(directory / LOG_NAME)
        _check_population(config, directory, log)
        tags = sweep_tags(config)
        with tracker.chain(
            f"{config.name} search",
            directory,
            params=config.flatten(),
            identity=settings_of_kind(config),
            tags={
                **tags,
                **metric_tags(workspace.rows),
                "moe_dist.kind": "search",
                "chosen_on": choosing_split(config),
            },
        ) as run:
            for dataset in workspace.dataset_inputs:
                run.log_dataset(dataset)
            workspace.session = session
            teachers = SharedWork(workspace, run).prepare(dimensions)
            check_retention(config, teachers)
            mark("teachers")
            over = [trial for trial in log.trials.values() if trial.is_over]
            checks = PointChecks(workspace, log)
            supervisor = Supervisor(
                config,
                directory,
                log,
                build_proposer(dimensions, config, checks, over),
                run,
                console,
                workspace.files,
                seconds_before=seconds_before,
                in_place=room.in_place,
                tags=tags,
            )
            if over:
                console.note(f"{len(over)} trials are finished already; they are not run again")
                if config.search.is_population:
                    console.note("no trial can join a population that is trained to its end")
            try:
                _run_trials(workspace, directory, teachers, supervisor, room, session, over)
            finally:
                supervisor.close()
                note_sweep(config, workspace, directory, supervisor.seconds)
            mark("trials")
            if supervisor.ran_out:
                tried = sum(number != BASELINE for number in log.trials)
                console.warn(checks.ran_out(tried, config.search.num_trials))
            result = SweepResult(
                config,
                directory,
                dict(sorted(log.trials.items())),
                supervisor.seconds,
                teachers,
                workspace.splits.task,
                run.open_hint(),
                room.num_concurrent,
                files=workspace.files,
            )
            chosen = best_trial(result)
            if choose is not None:
                # What it measures, Ray's idle processes would disturb.
                session.close()
                chosen = choose(result)
            confirmed = confirm(workspace, directory, teachers, chosen, room, session, run, tags)
            session.close()
            result = replace(result, confirmed=confirmed, seconds=supervisor.seconds)
            mark("end of Ray")
            best = finish(result, run)
            mark("report")
            if best is not None:
                supervisor.mark_best(best)
            return result


def best_trial(result: SweepResult) -> Trial | None:
    """Find the best trial by the first objective; None if none was trained to the end."""
    metric, mode = next(iter(result.config.search.wanted.items()))
    ranked = rank_trials(list(result.trials.values()), metric, mode)
    return ranked[0] if ranked else None


def directed(config: RunConfig, workspace: Workspace) -> RunConfig:
    """Say which way `quality` is better, which the task's main metric decides."""
    higher = workspace.splits.task.higher_is_better
    return config.model_copy(update={"search": config.search.directed(higher_is_better=higher)})


def check_metrics(config: RunConfig, workspace: Workspace) -> None:
    """Refuse, with a ConfigError, what the task does not measure or the data leave undefined.

    So it does with a metric that is searched for the wrong way.
    """
    task, split = workspace.splits.task, choosing_split(config)
    rows = getattr(workspace.splits, split)
    _check_directions(config, task)
    for name in config.search.wanted:
        metric = task.main_metric if name in ("quality", "retention") else name
        if metric in task.metrics:
            labels = rows["label"] if METRICS[metric].reads_labels else ()
            why = undefined_by_labels(metric, labels, task.label_space)
            if why is not None:
                raise ConfigError(
                    [
                        f"search: {metric} is undefined on the {split} rows, whatever a trial "
                        f"predicts, since {why}; give other rows, or search for another metric."
                    ],
                    source=config.name,
                )
    missing = [
        name for name in config.search.wanted if name in METRICS and name not in task.metrics
    ]
    if missing:
        raise ConfigError(
            [
                f"search: {name} is no metric of these data, which have {', '.join(task.metrics)}; "
                "add it to data.metrics, or search for another."
                for name in missing
            ],
            source=config.name,
        )


def _check_directions(config: RunConfig, task: TaskSpec) -> None:
    place = "search.objectives" if config.search.objectives else "search.mode"
    faults = []
    for name, mode in config.search.wanted.items():
        metric = task.main_metric if name == "quality" else name
        if metric in METRICS and (mode == "max") != METRICS[metric].higher_is_better:
            said = metric if metric == name else f"{name}, here {metric},"
            better = "higher" if METRICS[metric].higher_is_better else "lower"
            faults.append(
                f"{place}: {said} is better the {better}, and {mode} is asked for; set it to auto."
            )
    if faults:
        raise ConfigError(faults, source=config.name)


def check_retention(config: RunConfig, teachers: Mapping[str, TeacherFacts]) -> None:
    """Refuse, with a ConfigError, to search for a part of what no teacher has."""
    if "retention" not in config.search.wanted:
        return
    values = [facts.quality_on(choosing_split(config)) for facts in teachers.values()]
    faults = [
        f"search: retention is undefined: {why}; train a better teacher, or search for quality."
        for why in (why_no_ratio(1.0, value, higher_is_better=True) for value in values)
        if why is not None
    ]
    if faults:
        raise ConfigError(faults, source=config.name)


def _run_trials(
    workspace: Workspace,
    directory: Path,
    teachers: dict[str, TeacherFacts],
    supervisor: Supervisor,
    room: TrialRoom,
    session: RaySession,
    over: list[Trial],
) -> None:
    config, search = workspace.config, workspace.config.search
    num_left = supervisor.num_left
    if num_left == 0 or (over and search.is_population):
        return
    metric, mode = next(iter(search.wanted.items()))
    times = rung_times(search)
    split = choosing_split(config)
    trials = workspace.files.address(directory / TRIALS_DIRECTORY)
    runner = TrialRunner(config, trials, times, teachers, split)
    ruling = Ruling(search.chosen_scheduler, metric, mode, times[-1], search.reduction_factor)
    room = replace(room, num_concurrent=min(room.num_concurrent, num_left))
    if not config.search.is_population:
        run_sweep(runner, supervisor, ruling, room, session, num_trials=num_left, past=over)
        return
    population = Population(supervisor.breed, directory, config.seed)
    try:
        run_sweep(
            runner,
            supervisor,
            ruling,
            room,
            session,
            num_trials=num_left,
            population=population,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "a population cannot go on in its middle: start it anew with another `name`"
        ) from None
    finally:
        remove_weights(directory / TRIALS_DIRECTORY)


def _check_population(config: RunConfig, directory: Path, log: TrialLog) -> None:
    """Refuse to go on with a population in its middle: its trials live on each other's weights."""
    if not config.search.is_population or not log.trials:
        return
    states = {trial.status for trial in log.trials.values()}
    # A trial ends after the last rung only, which the whole population has reached by then.
    if "running" in states or "finished" not in states:
        raise MoeDistError(
            f"{directory} holds a population that was not trained to its end, and its trials "
            "cannot go on without each other.",
            remedy="start it anew: choose another `name` with --set name=NAME, or move that "
            "directory away.",
        )


def _is_nested(config: RunConfig, dimensions: tuple[Dimension, ...]) -> bool:
    return _most_workers(config, dimensions) > 1


def _most_workers(config: RunConfig, dimensions: tuple[Dimension, ...]) -> int:
    values = _possible(config, dimensions, "num_workers")
    return max(max(value) if isinstance(value, list | tuple) else value for value in values)


def _possible(config: RunConfig, dimensions: tuple[Dimension, ...], key: str) -> list[Any]:
    """List what trials may have of a `parallel` key; of a range its ends."""
    values = [getattr(config.parallel, key)]
    for dimension in dimensions:
        if dimension.path == f"parallel.{key}":
            values += [*dimension.values, *dimension.otherwise]
    return values


def _find_room(
    config: RunConfig, dimensions: tuple[Dimension, ...], session: RaySession
) -> TrialRoom:
    # Ray mostly waits for its own processes while it starts.
    session.connect(beside=import_heavy)
    parallel = config.parallel
    return find_room(
        read_capacity(),
        _most_workers(config, dimensions),
        max(map(trial_cpus, _possible(config, dimensions, "cpus_per_worker"))),
        None if parallel.use_gpu == "auto" else parallel.use_gpu,
        config.search.max_concurrent,
    )


def sweep_tags(config: RunConfig) -> dict[str, str]:
    """Give the tags that a sweep and its trials share: source, and the same hash as its chains."""
    return {**source_tags(), "recipe_hash": recipe_hash(settings_of_kind(config))}


def best_settings(config: RunConfig, trial: Trial, num_teacher_steps: int) -> dict[str, Any]:
    """Give the recipe of one trial, for `compress`; `config` has the teacher's settings pinned."""
    point = RunConfig.model_validate(point_settings(config, trial.overrides))
    finetune = point.finetune
    if finetune.max_steps is None and point.train.max_steps is not None:
        # Else `train.max_steps` would cut the teacher too.
        finetune = finetune.model_copy(update={"max_steps": num_teacher_steps})
    settings: dict[str, Any] = point.model_copy(update={"finetune": finetune}).model_dump(
        mode="json", exclude={"search", "compare"}
    )
    return settings
