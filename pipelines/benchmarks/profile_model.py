"""Where a model's forward pass spends its time: a table by part, one by operator, and a trace."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConfigError
from moe_dist.inference import load_model
from moe_dist.inference.backends import ORACLE, Form
from moe_dist.measure.latency import any_task, random_batch, wait_for, watch_other_work
from moe_dist.measure.parts import REST, PartTimer, timed_parts
from moe_dist.training.parts import PREFIX

from .profile_tables import MAX_OPERATORS, Share, shares, show
from .sizes import below_one, cpu_threads

SOURCE = "profile"


@dataclass(frozen=True)
class ModelToProfile:
    """What to look at.

    Args:
        directory: of the model.
        shape: sentences and tokens of a pass.
        form: that it answers in.
        num_passes: that are timed; as many more are made without anyone looking on.
        num_threads: CPU threads; torch's own choice if None.
    """

    directory: Path
    shape: tuple[int, int] = (1, 128)
    form: Form = ORACLE
    num_passes: int = 20
    num_threads: int | None = None


@dataclass(frozen=True)
class ModelProfile:
    """What was found; times are medians over the passes, in milliseconds.

    Attributes:
        model: its directory.
        form: as it is written.
        shape: sentences, tokens.
        num_threads: CPU threads.
        pass_ms: a pass that nobody looks at.
        watched_ms: one whose parts are timed.
        parts: what each part takes by itself, longest first.
        operators: of torch, by their own time under the profiler, which slows many short ones.
        remarks: what makes these figures doubtful.
    """

    model: str
    form: str
    shape: tuple[int, int]
    num_threads: int
    pass_ms: float
    watched_ms: float
    parts: tuple[Share, ...]
    operators: tuple[Share, ...]
    remarks: tuple[str, ...] = ()


def run(settings: ModelToProfile, trace: Path | None = None) -> ModelProfile:
    """Profile a model; a ConfigError if a setting does not fit.

    Args:
        settings: what to look at.
        trace: where to write a trace that chrome://tracing and Perfetto read.

    Returns:
        What was found.
    """
    faults = below_one(settings, "num_passes")
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads")
    batch_size, seq_len = settings.shape
    faults += [f"shape {batch_size} × {seq_len} has nothing in it"] * (min(settings.shape) < 1)
    if faults:
        raise ConfigError(faults, source=SOURCE)
    loaded = load_model(settings.directory)
    limit = position_limit(loaded)
    if limit is not None and seq_len > limit:
        fault = f"the shape has {seq_len} tokens, and the model reads at most {limit}; give fewer"
        raise ConfigError([fault], source=SOURCE)
    model = settings.form.prepare(loaded)
    batch = random_batch(model, batch_size, seq_len, device=next(model.parameters()).device)
    with cpu_threads(settings.num_threads), torch.inference_mode(), any_task(model):
        num_threads = torch.get_num_threads()
        with watch_other_work() as look:
            plain = _passes(model, batch, settings.num_passes)
            times, calls = _by_part(model, batch, settings.num_passes)
            work = look()
        operators = _by_operator(model, batch, settings.num_passes, trace)
    remarks = []
    if work.disturbs(num_threads):
        remarks.append(
            f"other work kept {work.busy_cores:.1f} of {work.num_cores} cores busy meanwhile"
        )
    if set(times) == {REST}:
        remarks.append(f"the parts of a model in the form {settings.form} cannot be told apart")
    return ModelProfile(
        model=str(settings.directory),
        form=str(settings.form),
        shape=settings.shape,
        num_threads=num_threads,
        pass_ms=statistics.median(plain),
        watched_ms=sum(times.values()),
        parts=shares(times, calls),
        operators=operators,
        remarks=tuple(remarks),
    )


def _passes(model: Any, batch: dict[str, torch.Tensor], number: int) -> list[float]:
    """Time passes that nobody looks at, after one that warms up."""
    timer = PartTimer(next(model.parameters()).device)
    times = []
    model(**batch)
    for _ in range(number):
        timer.milliseconds.clear()
        timer.enter(REST)
        model(**batch)
        timer.leave()
        times.append(timer.milliseconds[REST])
    return times


def _by_part(
    model: Any, batch: dict[str, torch.Tensor], number: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Give each part's median time and calls in a pass."""
    found: dict[str, list[float]] = defaultdict(list)
    with timed_parts(model) as timer:
        model(**batch)
        for _ in range(number):
            timer.milliseconds.clear()
            timer.calls.clear()
            model(**batch)
            for name, passed_ms in timer.milliseconds.items():
                found[name].append(passed_ms)
        calls = {name: float(count) for name, count in timer.calls.items()}
    return {name: statistics.median(times) for name, times in found.items()}, calls


def _by_operator(
    model: Any, batch: dict[str, torch.Tensor], number: int, trace: Path | None
) -> tuple[Share, ...]:
    device = next(model.parameters()).device
    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler, timed_parts(model):
        for _ in range(number):
            model(**batch)
        wait_for(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return operator_shares(profiler, number, on_gpu=device.type == "cuda")


def operator_shares(profiler: Any, number: int, *, on_gpu: bool = False) -> tuple[Share, ...]:
    """Give the operators that took longest, for each of so many passes or steps."""
    figure = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for one in profiler.key_averages():
        # A GPU's kernels stand there once more, beside the operators that launch them.
        is_operator = one.device_type == DeviceType.CPU
        if is_operator and not one.key.startswith((PREFIX, "ProfilerStep")):
            times[one.key] += getattr(one, figure) / 1e3 / number
            calls[one.key] += one.count
    found = shares(times, {name: count / number for name, count in calls.items()})
    return found[:MAX_OPERATORS]


def main(settings: ModelToProfile, output: Path | None = None) -> None:
    """Profile a model and show it; what `moe-dist profile DIR` calls.

    Args:
        settings: what to look at.
        output: a directory for the same as JSON and Markdown, and for the trace.
    """
    report = run(settings, None if output is None else output / "trace.json")
    batch_size, seq_len = report.shape
    show(
        f"{report.model}, {report.form}, {batch_size} × {seq_len} texts × tokens, "
        f"{report.num_threads} threads",
        {"part": report.parts, "operator": report.operators},
        [
            f"a pass takes {report.pass_ms:.2f} ms, and {report.watched_ms:.2f} ms while its parts "
            "are timed",
            *report.remarks,
        ],
        report,
        output,
    )
