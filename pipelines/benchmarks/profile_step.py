"""Where a distillation step spends its time: a table by part, one by operator, and a trace.

The job is the recipe's own, in this process alone and without Ray.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe_dist.errors import ConfigError
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.distill import DistillJob, distill
from moe_dist.measure.latency import watch_other_work
from moe_dist.measure.parts import REST, self_times
from moe_dist.training.hardware import pick_device
from moe_dist.training.parts import PREFIX, STEP
from moe_dist.training.step import freeze
from moe_dist.workers.worker_cpus import worker_cpus

from ..stages import adapt, finetune_teacher
from ..stages.distill import distill_job
from .profile_model import operator_shares
from .profile_tables import Share, shares, show
from .sizes import cpu_threads

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..chain.stage import StageInputs
    from ..chain.workspace import Workspace

NUM_STEPS = 5
NUM_WARMUPS = 2
EMBEDDING_GRADIENTS = "embedding gradients"
_EMBEDDING_BACKWARD = "aten::embedding_dense_backward"


@dataclass(frozen=True)
class StepProfile:
    """What was found, for one step; times are means, in milliseconds.

    Attributes:
        name: the recipe's.
        num_steps: that were looked at.
        batch_size: samples of a step.
        num_threads: CPU threads.
        step_ms: the median step.
        parts: what each part takes by itself, longest first.
        operators: of torch, by their own time.
        remarks: what differs from the recipe, and what makes these figures doubtful.
    """

    name: str
    num_steps: int
    batch_size: int
    num_threads: int
    step_ms: float
    parts: tuple[Share, ...]
    operators: tuple[Share, ...]
    remarks: tuple[str, ...]


class _EnoughError(Exception):
    """Ends the training: all steps that are wanted were taken."""


def run(
    config: RunConfig,
    inputs: StageInputs,
    *,
    num_steps: int,
    num_threads: int | None = None,
    trace: Path | None = None,
) -> StepProfile:
    """Profile the steps of a distillation, after two that warm up.

    Args:
        config: the recipe.
        inputs: results of the stages before `distill`.
        num_steps: to look at.
        num_threads: CPU threads; those of a worker of the recipe if None.
        trace: where to write a trace that chrome://tracing and Perfetto read.

    Returns:
        What was found.
    """
    threads = worker_cpus(config.parallel) if num_threads is None else num_threads
    here = alone(config, NUM_WARMUPS + num_steps)
    with tempfile.TemporaryDirectory() as scratch, cpu_threads(threads):
        job = _at_hand(distill_job(here, inputs, scratch), inputs)
        with watch_other_work() as look:
            profiler = _profiled(job)
            work = look()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    times, calls, step_ms = step_parts(profiler.events())
    on_gpu = pick_device(config.parallel.use_gpu).type == "cuda"
    remarks = [*_differences(config), *_doubts(work.disturbs(threads), work)]
    return StepProfile(
        name=config.name,
        num_steps=num_steps,
        batch_size=config.train.batch_size,
        num_threads=threads,
        step_ms=statistics.median(step_ms),
        parts=shares(times, calls),
        operators=operator_shares(profiler, NUM_WARMUPS + num_steps, on_gpu=on_gpu),
        remarks=tuple(remarks),
    )


def alone(config: RunConfig, num_steps: int) -> RunConfig:
    """Place a recipe's training in this process, for so many steps."""
    parallel = {"num_workers": 1, "ep_size": 1, "zero_stage": 0, "launcher": "local"}
    train = {"max_steps": num_steps, "eval_every": None, "checkpoint_every": None}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "train": config.train.model_copy(update=train),
        }
    )


def step_parts(events: Any) -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Read a profiler's events: each part's mean time and calls in a step, and all steps' times.

    Times are of the CPU, where on a GPU work is only launched. Steps that warm up are left out. The
    gradients of embedding tables are a part of their own, taken out of the backward pass that they
    are in.
    """
    spans = [
        (one.name.removeprefix(PREFIX), one.time_range.start / 1e3, one.time_range.end / 1e3)
        for one in events
        # A GPU's timeline repeats the ranges, each as long as its kernels take there.
        if one.device_type == DeviceType.CPU
        and (one.name.startswith(PREFIX) or one.name == _EMBEDDING_BACKWARD)
    ]
    steps = sorted(span[1:] for span in spans if span[0] == STEP)[NUM_WARMUPS:]
    own = [
        (EMBEDDING_GRADIENTS if name == _EMBEDDING_BACKWARD else name, begin, end)
        for name, begin, end in spans
        if any(first <= begin and end <= last for first, last in steps)
    ]
    times = {name: passed / len(steps) for name, passed in self_times(own).items()}
    calls = Counter(name for name, _, _ in own)
    per_step = {name: count / len(steps) for name, count in calls.items()}
    for found in (times, per_step):
        found[REST] = found.pop(STEP)
    return times, per_step, [last - first for first, last in steps]


def check_steps(workspace: Workspace, num_steps: int, num_threads: int | None) -> None:
    """See that a recipe trains so many steps, before anything starts; else a ConfigError."""
    config = workspace.config
    numbers = {"--steps": num_steps} | ({} if num_threads is None else {"--threads": num_threads})
    faults = [
        f"{name} is {value}; it must be at least 1" for name, value in numbers.items() if value < 1
    ]
    if not faults:
        planned = 0
        if config.train.num_epochs:
            planned = workspace.num_steps(config.train, "distilled")
        else:
            faults.append("this recipe does not train its student; set train.num_epochs above 0")
        if not faults and planned < NUM_WARMUPS + num_steps:
            faults.append(
                f"the recipe trains {planned} steps, and {NUM_WARMUPS} that warm up and "
                f"{num_steps} to look at are wanted; give --steps less or train.num_epochs more"
            )
    if faults:
        raise ConfigError(faults, source="profile")


def _at_hand(job: DistillJob, inputs: StageInputs) -> DistillJob:
    """Name local copies of models that lie in a store."""
    fetch = inputs.workspace.files.fetch
    teacher, student = (
        inputs.result(stage).outputs["model"] for stage in (finetune_teacher.NAME, adapt.NAME)
    )
    return replace(job, teacher=str(fetch(teacher)), student=str(fetch(student)))


def _profiled(job: DistillJob) -> Any:
    """Take a job's steps under the profiler; nothing is kept of what they train."""
    student = load_model(Path(job.student))
    data = job.tokenised(job.rows(), load_tokenizer(Path(job.student)))
    device = pick_device(job.parallel.use_gpu)
    teacher = freeze(load_model(Path(job.teacher), device))

    def report(step: int, _: dict[str, float]) -> None:
        if step == job.train.max_steps:
            raise _EnoughError

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler, suppress(_EnoughError):
        distill(student, teacher, data, job, report=report, keep=False)
    return profiler


def _differences(config: RunConfig) -> list[str]:
    parallel = config.parallel
    said = []
    if parallel.max_workers > 1 or parallel.zero_stage > 0:
        said.append(
            f"one process takes the whole step here, where the recipe's {parallel.max_workers} "
            "workers share it: it sends no messages"
        )
    return said


def _doubts(disturbs: bool, work: Any) -> list[str]:
    if not disturbs:
        return []
    return [f"other work kept {work.busy_cores:.1f} of {work.num_cores} cores busy meanwhile"]


def main(
    config: RunConfig,
    inputs: StageInputs,
    *,
    num_steps: int,
    num_threads: int | None = None,
    output: Path | None = None,
) -> None:
    """Profile a recipe's step and show it; what `moe-dist profile RECIPE` calls.

    Args:
        config: the recipe.
        inputs: results of the stages before `distill`.
        num_steps: to look at.
        num_threads: CPU threads; those of a worker of the recipe if None.
        output: a directory for the same as JSON and Markdown, and for the trace.
    """
    trace = None if output is None else output / "trace.json"
    report = run(config, inputs, num_steps=num_steps, num_threads=num_threads, trace=trace)
    show(
        f"{report.name}: a distillation step of {report.batch_size} samples, "
        f"{report.num_threads} threads, mean of {report.num_steps}",
        {"part": report.parts, "operator": report.operators},
        [f"the median step takes {report.step_ms:.1f} ms", *report.remarks],
        report,
        output,
    )
