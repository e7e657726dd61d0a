"""Time models in every form that they answer in, in turn, so that a busy machine slows all alike.

Times are those below which a tenth of the passes lies: what a model costs where nothing disturbs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConfigError, ConversionError, MissingInputError
from moe_dist.inference import load_model
from moe_dist.inference.backends import ORACLE, QUICK_FORMS, Form
from moe_dist.measure.latency import (
    Latency,
    OtherWork,
    Rounds,
    any_task,
    measure_in_turn,
    random_batch,
    watch_other_work,
)

from ..markdown import markdown_table
from ..report.report_text import MAX_SPREAD
from .models import RandomModels
from .results import write_results
from .sizes import below_one, cpu_threads

SHAPES = ((1, 16), (1, 64), (1, 128), (32, 64))


OPTIONS = {"num_rounds": "--rounds", "num_threads": "--threads"}
"""What the command calls fields of `InferenceBenchmark`."""


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to time.

    Args:
        directories: of models by name; ratios are to the first.
        random: models to draw in place of those.
        shapes: sentences and tokens of a pass.
        forms: to bring each model into; eager in float32 is always among them.
        num_rounds: in each every form of every model is timed.
        num_threads: CPU threads; torch's own choice if None.
    """

    directories: Mapping[str, Path] = field(default_factory=dict)
    random: RandomModels | None = None
    shapes: tuple[tuple[int, int], ...] = SHAPES
    forms: tuple[Form, ...] = QUICK_FORMS
    num_rounds: int = 15
    num_threads: int | None = None


@dataclass(frozen=True)
class Timing:
    """One model in one form at one shape.

    Attributes:
        model: its name.
        form: as it is written.
        shape: sentences, tokens.
        low_ms: a tenth of the passes took no longer.
        median_ms: half of them.
        spread: see `Latency`.
        speed: the first model's time in the same form over this one; NaN if it has none.
        speed_over_oracle: the first model's time in eager float32 over this one.
        error: largest difference of its answers from its own in eager float32, as a part of the
            largest of these.
    """

    model: str
    form: str
    shape: tuple[int, int]
    low_ms: float
    median_ms: float
    spread: float
    speed: float
    speed_over_oracle: float
    error: float


@dataclass(frozen=True)
class InferenceReport:
    """What was found.

    Attributes:
        timings: of every form of every model at every shape.
        refused: forms that a model does not have, each with the reason.
        num_threads: CPU threads.
        busy: what else the machine did, where that was too much to judge by.
    """

    timings: tuple[Timing, ...]
    refused: tuple[str, ...]
    num_threads: int
    busy: str = ""

    def fastest(self, model: str, shape: tuple[int, int]) -> Timing:
        """The form of a model that takes the least time at a shape and gives answers."""
        own = [one for one in self.timings if (one.model, one.shape) == (model, shape)]
        sound = [one for one in own if math.isfinite(one.error)]
        return min(sound or own, key=lambda one: one.low_ms)

    @property
    def models(self) -> list[str]:
        """Names in their order."""
        return list(dict.fromkeys(one.model for one in self.timings))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes in their order."""
        return list(dict.fromkeys(one.shape for one in self.timings))


def run(settings: InferenceBenchmark) -> InferenceReport:
    """Load, bring into forms, and time. A ConfigError if a setting does not fit."""
    faults = below_one(settings, "num_rounds", called=OPTIONS)
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads", called=OPTIONS)
    faults += [f"shape {b} × {s} has nothing in it" for b, s in settings.shapes if min(b, s) < 1]
    if settings.random is not None:
        faults += settings.random.faults()
    if bool(settings.directories) == bool(settings.random):
        faults.append("give directories of models, or --random, and not both")
    models = {} if faults else _load(settings)
    longest = max((seq_len for _, seq_len in settings.shapes), default=0)
    for name, model in models.items():
        limit = position_limit(model)
        if limit is not None and longest > limit:
            faults.append(
                f"a shape has {longest} tokens, and {name} reads at most {limit}; give shorter "
                "ones with --shape"
            )
    if faults:
        raise ConfigError(faults, source="benchmark inference")
    # Sessions of ONNX Runtime keep the threads that they are made with.
    with cpu_threads(settings.num_threads):
        prepared, refused = _prepare(models, settings.forms)
        num_threads = torch.get_num_threads()
        with watch_other_work() as look:
            timings = [one for shape in settings.shapes for one in _time(prepared, shape, settings)]
            work = look()
    return InferenceReport(tuple(timings), tuple(refused), num_threads, _busy(work, num_threads))


def _prepare(
    models: Mapping[str, Any], forms: Sequence[Form]
) -> tuple[dict[tuple[str, Form], Any], list[str]]:
    """Bring each model into each form; what it does not have is said with the reason."""
    prepared: dict[tuple[str, Form], Any] = {}
    refused = []
    for name, model in models.items():
        for form in dict.fromkeys((ORACLE, *forms)):
            try:
                prepared[name, form] = form.prepare(model)
            except (ConversionError, MissingInputError) as error:
                refused.append(f"{name}, {form}: {error.message}")
    return prepared, refused


def _load(settings: InferenceBenchmark) -> dict[str, Any]:
    if settings.random is not None:
        return settings.random.build()
    return {name: load_model(directory) for name, directory in settings.directories.items()}


def _time(
    prepared: Mapping[tuple[str, Form], Any],
    shape: tuple[int, int],
    settings: InferenceBenchmark,
) -> list[Timing]:
    batch_size, seq_len = shape
    rounds = Rounds(settings.num_rounds)
    found = measure_in_turn(prepared, rounds, batch_sizes=(batch_size,), seq_len=seq_len)
    times = {key: by_size[batch_size] for key, by_size in found.items()}
    first = next(iter(prepared))[0]
    answers = {key: _answer(model, shape) for key, model in prepared.items()}
    timings = []
    for (name, form), latency in times.items():
        timings.append(
            Timing(
                model=name,
                form=str(form),
                shape=shape,
                low_ms=latency.low_ms,
                median_ms=latency.median_ms,
                spread=latency.spread,
                speed=_ratio(times.get((first, form)), latency),
                speed_over_oracle=_ratio(times[first, ORACLE], latency),
                error=_error(answers[name, form], answers[name, ORACLE]),
            )
        )
    return timings


def _ratio(other: Latency | None, own: Latency) -> float:
    return float("nan") if other is None else other.low_ms / own.low_ms


@torch.inference_mode()
def _answer(model: Any, shape: tuple[int, int]) -> Tensor:
    """Logits, or what else a model's first output is, of random texts."""
    with any_task(model):
        answer: Tensor = model(**random_batch(model, *shape))[0]
    return answer.float()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _busy(work: OtherWork, num_threads: int) -> str:
    if not work.disturbs(num_threads):
        return ""
    return (
        f"other work kept {work.busy_cores:.1f} of {work.num_cores} cores busy meanwhile: times "
        "are too high, and ratios a hint"
    )


COLUMNS = (
    "shape", "model", "form", "ms", "median ms", "spread",
    "× same form", "× eager-fp32", "differs",
)  # fmt: skip
ON_CONSOLE = (0, 1, 2, 3, 6, 7, 8)
"""The columns that fit."""


def to_rows(report: InferenceReport) -> list[list[str]]:
    """Lay the timings out, a row each, in the order of `COLUMNS`."""
    return [
        [
            f"{one.shape[0]}×{one.shape[1]}",
            one.model,
            one.form,
            _marked(one),
            f"{one.median_ms:.2f}",
            f"{one.spread:.2f}",
            "" if math.isnan(one.speed) else f"{one.speed:.2f}",
            f"{one.speed_over_oracle:.2f}",
            f"{one.error:.0e}",
        ]
        for one in report.timings
    ]


def _marked(timing: Timing) -> str:
    return f"{timing.low_ms:.2f}" + ("?" if timing.spread > MAX_SPREAD else "")


def verdicts(report: InferenceReport) -> list[str]:
    """Compare the models, each in its fastest form, in a sentence for each shape."""
    lines = []
    first, *others = report.models
    for shape in report.shapes:
        base = report.fastest(first, shape)
        said = [f"{first} {_marked(base)} ms ({base.form})"]
        for name in others:
            own = report.fastest(name, shape)
            said.append(
                f"{name} {_marked(own)} ms ({own.form}), {base.low_ms / own.low_ms:.2f} × as fast"
            )
        lines.append(f"{shape[0]} × {shape[1]}, each in its fastest form: " + "; ".join(said))
    lines += [f"not there: {reason}" for reason in report.refused]
    wide = sum(one.spread > MAX_SPREAD for one in report.timings)
    if wide:
        lines.append(f"{wide} of {len(report.timings)} times vary too much to judge by (marked ?)")
    return [*lines, *([report.busy] if report.busy else [])]


def main(settings: InferenceBenchmark, output: Path | None = None) -> None:
    """Run the benchmark and print it; what `moe-dist benchmark inference` calls.

    Args:
        settings: what to measure.
        output: a directory for the same as JSON and Markdown.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise ConfigError([f"--output {output} is a file; name a directory."], source="--output")
    report = run(settings)
    console = Console(highlight=False)
    table = Table(
        title=f"{report.num_threads} threads, {torch.backends.cpu.get_cpu_capability()}; speed is "
        f"{report.models[0]}'s time in the same form, and in eager-fp32, over a model's own"
    )
    for place in ON_CONSOLE:
        table.add_column(COLUMNS[place], justify="right", no_wrap=True)
    for row in to_rows(report):
        table.add_row(*(row[place] for place in ON_CONSOLE))
    console.print(table)
    for sentence in verdicts(report):
        console.print(sentence)
    if output is not None:
        lines = markdown_table(COLUMNS, to_rows(report))
        lines += ["", *(f"- {sentence}" for sentence in verdicts(report))]
        write_results(output, "inference", report, "\n".join(lines) + "\n")


def named_directories(directories: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=DIR` or `DIR`, which is then called by its stage; faults are a ConfigError."""
    found: dict[str, Path] = {}
    faults = []
    for text in directories:
        name, equals, path = "", "", text
        if not Path(text).is_dir():
            name, equals, path = text.partition("=")
            path = path if equals else text
        place = Path(path)
        own = name if equals else _stage_name(place)
        if not (path and own and place.is_dir()):
            faults.append(f"{text} is no directory; give one that holds a model, or NAME=DIR")
        elif own in found:
            faults.append(f"two models are called {own}; name them: NAME={path}")
        found[own] = place
    if faults:
        raise ConfigError(faults, source="benchmark inference")
    return found


def _stage_name(directory: Path) -> str:
    place = directory.absolute()
    return place.parent.name if place.name == "model" else place.name
