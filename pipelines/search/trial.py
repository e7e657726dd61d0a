"""One trial of a search: from a point of the space to a trained and measured student.

It runs on a worker. What trials share (rows, tokens, the teacher, its scores) is kept there from
one trial to the next.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.config import RunConfig
from moe_dist.config.search_checks import point_settings
from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.data.metrics import METRICS
from moe_dist.data.retention import ratio
from moe_dist.errors import StorageError
from moe_dist.timeline import mark
from moe_dist.uris import below, is_uri

from ..chain.training_settings import training_settings
from ..stages.adapt import adapt_settings, convert, fits_output
from .rungs import rung_steps
from .shared_weights import checkpoint_at, shared_checkpoints, take_over
from .trial_stages import ADAPT, DISTILL, EVALUATE, StageLog

if TYPE_CHECKING:
    from moe_dist.data.tasks import Split
    from moe_dist.jobs.distill import DistillJob
    from moe_dist.jobs.job_data import JobData

LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 5
LATENCY_REPEATS = 2
Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher that trials share, and what its students are measured against.

    Args:
        model: its directory, a path or a URI.
        scores: the file with its neurons' importance, a path or a URI.
        quality: its main metric on the dev rows.
        holdout_quality: the same on the rows that recipes are chosen on; None without such.
        latency_ms: measured alone; None where latency is not asked for.
    """

    model: str
    scores: str
    quality: float
    holdout_quality: float | None = None
    latency_ms: float | None = None

    def quality_on(self, split: Split) -> float:
        """Give its main metric on `dev`, or on `holdout` where there is one."""
        if split == "holdout":
            assert self.holdout_quality is not None, "measured where there is a hold-out"
            return self.holdout_quality
        return self.quality


def choosing_split(config: RunConfig) -> Split:
    """Name the rows that trials are ranked on: the hold-out where the recipe has one, else dev."""
    return "holdout" if config.data.holdout_samples else "dev"


@dataclass
class TrialRunner:
    """Runs trials; it is sent to workers as it is, and stays there.

    Args:
        config: the recipe.
        directory: where trials keep their files, seen by all workers; a path or a URI.
        rungs: times at which a trial is measured; see `rung_times`.
        teachers: by key, which a task names.
        split: what trials are measured on.
    """

    config: RunConfig
    directory: str
    rungs: tuple[int, ...]
    teachers: dict[str, TeacherFacts]
    split: Split = "dev"
    _warm: dict[str, _Warm] = field(default_factory=dict, repr=False)

    def __call__(self, task: Mapping[str, Any], say: Say) -> None:
        """Run one trial.

        Args:
            task: ``number``, ``overrides``, ``teacher`` (a key), ``in_place``, ``seed`` where the
                student's is another than the recipe's, ``is_ruled``, and in a population
                ``resume``, the checkpoint to go on from, which may be another trial's.
            say: takes what it measures at each rung.
        """
        import torch

        from moe_dist.training.hardware import return_free_memory
        from moe_dist.workers.worker_cpus import trial_cpus

        mark("first trial on a worker")
        config = RunConfig.model_validate(point_settings(self.config, task["overrides"]))
        torch.set_num_threads(trial_cpus(config.parallel.cpus_per_worker))
        key = task["teacher"]
        warm = self._warm.get(key)
        if warm is None:
            # Another teacher's data would only fill the memory.
            self._warm.clear()
            warm = self._warm[key] = _Warm.load(config, self.teachers[key])
            mark("rows and teacher on a worker")
        seed = task.get("seed", config.seed)
        # Another seed of the student: rows and teacher stay those of the recipe's.
        student = config.model_copy(update={"seed": seed})
        facts = self.teachers[key]
        trial = _OneTrial(student, config.seed, warm, facts, self.rungs, self.split, say)
        if self.config.search.is_population and task["is_ruled"]:
            trial = replace(trial, is_member=True, resume=task.get("resume", ""))
        trials = self.directory if is_uri(self.directory) else Path(self.directory)
        try:
            trial.run(below(trials, trial_name(task["number"])), in_place=task["in_place"])
        finally:
            # The process stays for the next trial, which brings sizes of its own.
            return_free_memory()


def trial_name(number: int) -> str:
    """Name a trial's directory and run, for example `trial-0007`."""
    return f"trial-{number:04d}"


def training_directory(trials: Path, number: int) -> Path:
    """Name the place of what a trial's training left: metric log, figures, dev predictions."""
    return trials / trial_name(number) / DISTILL


@dataclass(frozen=True)
class _Warm:
    """What trials of one teacher share on a worker."""

    data: JobData
    teacher: Any
    dense: Any
    scores: list[Any]

    @classmethod
    def load(cls, config: RunConfig, facts: TeacherFacts) -> _Warm:
        from moe_dist.data.sources import load_splits
        from moe_dist.inference.saving import load_model, load_tokenizer
        from moe_dist.jobs.job import row_arguments
        from moe_dist.jobs.job_data import JobData
        from moe_dist.jobs.results import load_scores
        from moe_dist.storage import local_copy, local_file
        from moe_dist.training.hardware import pick_device
        from moe_dist.training.step import freeze

        device = pick_device(config.parallel.use_gpu)
        with local_copy(facts.model) as model:
            dense = load_model(model)
            teacher = freeze(dense if device.type == "cpu" else load_model(model, device))
            tokenizer = load_tokenizer(model)
        with local_file(facts.scores) as path:
            scores = load_scores(path)
        splits = load_splits(**row_arguments(config.data, config.seed))
        data = JobData(splits, tokenizer, config.model.max_length)
        return cls(data, teacher, dense, scores)


@dataclass(frozen=True)
class _OneTrial:
    config: RunConfig
    data_seed: int
    warm: _Warm
    facts: TeacherFacts
    rungs: tuple[int, ...]
    split: Split
    say: Say
    is_member: bool = False
    resume: str = ""

    def run(self, directory: Path | str, *, in_place: bool) -> None:
        """Make a student, count what it costs, and train it: each a stage of the trial."""
        stages = StageLog(directory, goes_on=bool(self.resume), may_go_on=self.is_member)
        with stages.stage(ADAPT, adapt_settings(self.config)):
            student = self._student()
        with stages.stage(EVALUATE, {"seq_len": self._seq_len}):
            costs = self._costs(student)
        train = self._train_here if in_place else self._train_on_workers
        settings = training_settings(self.config, self.config.train)
        settings["distill"] = settings_of_kind(self.config.distill)
        with stages.stage(DISTILL, settings) as place:
            train(student, costs, place)

    def _train_here(self, student: Any, costs: Mapping[str, float], directory: Path | str) -> None:
        """Train in this process: no checkpoints, no saved model, only figures and answers."""
        from moe_dist.jobs.distill import distill

        from .trial_directories import written_here

        steps = self._steps()
        with written_here(directory) as (place, upload):
            job = self._job(place, steps)
            held: dict[int, Mapping[str, Any]] = {}
            shared: list[int] = []
            if self.is_member:
                shared = sorted(steps)[:-1]
                take_over(self.resume, place)
                job = shared_checkpoints(job, shared, max(steps))

            def report(step: int, metrics: Mapping[str, float]) -> None:
                if step in steps:
                    # Who hears of a measure finds the log that led to it.
                    upload()
                measured = self._measured(step, metrics, steps, costs)
                if step in held:
                    # The line after it says that the checkpoint is on disk.
                    self.say({**held.pop(step), "checkpoint": str(checkpoint_at(place, step))})
                elif measured and step in shared:
                    held[step] = measured
                elif measured:
                    self.say(measured)

            distill(student, self.warm.teacher, self.warm.data, job, report=report, keep=False)

    def _train_on_workers(
        self, student: Any, costs: Mapping[str, float], directory: Path | str
    ) -> None:
        """Train with the normal driver; what the first rank measures comes by its metric log."""
        from moe_dist.jobs.job import run
        from moe_dist.workers.driver import run_on_workers
        from moe_dist.workers.worker_cpus import trial_cpus

        from .trial_directories import STUDENT, student_for_workers

        steps = self._steps()
        parallel = self.config.parallel
        job = self._job(directory, steps)
        with student_for_workers(student, self.warm.data.tokenizer, directory) as poll:

            def tell() -> None:
                for record in poll():
                    if measured := self._measured(record.step, record.metrics, steps, costs):
                        self.say(measured)

            def on_poll() -> None:
                with suppress(StorageError):  # The next call reads what this one could not.
                    tell()

            run_on_workers(
                run,
                replace(job, student=str(below(directory, STUDENT))),
                num_workers=parallel.num_workers,
                cpus_per_worker=trial_cpus(parallel.cpus_per_worker),
                use_gpu=None if parallel.use_gpu == "auto" else parallel.use_gpu,
                max_failures=parallel.max_failures,
                step_timeout_s=self.config.train.step_timeout_s,
                wait_s=parallel.wait_s,
                storage_path=directory,
                name="ray",
                launcher="ray",
                on_poll=on_poll,
            )
            tell()

    def _student(self) -> Any:
        import torch

        from moe_dist.jobs.fit_outputs import draw_tasks, fit_start

        # A converted gate is drawn anew: from the trial's seed, whatever ran here before.
        torch.manual_seed(self.config.seed)
        warm = self.warm
        rows = warm.data.train
        student = convert(self.config, warm.dense, warm.scores, lambda: {"": rows})[1]
        if fits_output(self.config):
            batches = draw_tasks(
                [rows],
                num_samples=self.config.moe.importance_samples,
                seed=self.config.seed,
                pad_token_id=warm.data.pad_token_id,
            )
            fit_start(student, warm.teacher, batches, self.config.train.precision)
        return student

    def _steps(self) -> dict[int, int]:
        from moe_dist.jobs.distill import DistillJob
        from moe_dist.training.loop import planned_steps

        # Samples, of which a row may make several, or several rows one.
        train, split = self.config.train, DistillJob.TRAINS_ON
        batches = self.warm.data.batches(train, seed=self.config.seed, split=split)
        total = planned_steps(
            batches.steps_per_epoch, num_epochs=train.num_epochs, max_steps=train.max_steps
        )
        return rung_steps(self.rungs, total)

    def _job(self, directory: Path | str, steps: Collection[int]) -> DistillJob:
        from moe_dist.jobs.distill import DistillJob

        return DistillJob.of(
            self.config,
            str(directory),
            student="",
            teacher=self.facts.model,
            train=self.config.train.model_copy(update={"eval_every": None}),
            eval_at=tuple(steps),
            row_seed=self.data_seed,
            keep_predictions=True,
            eval_split=self.split,
        )

    @property
    def _seq_len(self) -> int:
        return min(LATENCY_SEQ_LEN, self.config.model.max_length)

    def _costs(self, student: Any) -> dict[str, float]:
        """Count what the student costs; its weights do not matter for that."""
        from moe_dist.measure.profile import count_parameters, flops_per_token

        parameters = count_parameters(student)
        costs = {
            "flops": float(flops_per_token(student, self._seq_len).total),
            "parameters": float(parameters.total),
            "active_parameters": float(parameters.active),
        }
        if self.facts.latency_ms is not None:
            batch_size = self.config.search.latency_batch_size
            device = next(self.warm.teacher.parameters()).device
            ratio = latency_ratio(student.to(device), self.warm.teacher, batch_size, self._seq_len)
            costs["latency"] = self.facts.latency_ms * ratio
        return costs

    def _measured(
        self,
        step: int,
        metrics: Mapping[str, float],
        steps: Mapping[int, int],
        costs: Mapping[str, float],
    ) -> dict[str, Any]:
        """Say what a line of the metric log has of a rung; empty if it has nothing."""
        prefix = f"{self.split}/"
        found = {
            name.removeprefix(prefix): value
            for name, value in metrics.items()
            if name.startswith(prefix)
        }
        if step not in steps or not found:
            return {}
        main_metric, quality = next(iter(found.items()))
        measured = {"quality": quality, **found, **costs}
        retention = ratio(
            quality,
            self.facts.quality_on(self.split),
            higher_is_better=METRICS[main_metric].higher_is_better,
        )
        if retention is not None:
            measured["retention"] = retention
        return {"rung": steps[step], "step": step, "num_steps": max(steps), "metrics": measured}


def latency_ratio(student: Any, teacher: Any, batch_size: int, seq_len: int) -> float:
    """Time a student and its teacher in turn, so that a busy machine slows both alike.

    Both must be on the device to measure on. Returns the median, over rounds, of the student's
    time over the teacher's.
    """
    from moe_dist.measure.latency import Rounds, measure_in_turn

    timed = measure_in_turn(
        {"student": student, "teacher": teacher},
        Rounds(LATENCY_ROUNDS, least=2, budget_s=2.0, repeats=LATENCY_REPEATS),
        batch_sizes=(batch_size,),
        seq_len=seq_len,
    )
    own, others = timed["student"][batch_size], timed["teacher"][batch_size]
    return statistics.median(a / b for a, b in zip(own.times_ms, others.times_ms, strict=True))
