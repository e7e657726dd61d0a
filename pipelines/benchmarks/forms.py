"""What benchmarks of models in several forms share: preparing, comparing and telling."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_dist.errors import ConfigError, ConversionError, MissingInputError
from moe_dist.inference import load_model
from moe_dist.inference.backends import ORACLE, Form
from moe_dist.measure.latency import Latency
from moe_dist.measure.screening import TOLERANCE, relative_error, see_that_it_fits

from ..console import PIPED_WIDTH
from ..markdown import markdown_table
from ..report.report_text import MAX_SPREAD
from .models import RandomModels
from .results import write_results

Prepared = dict[tuple[str, Form], Any]
"""Models by name and form."""
ONLY_IN_FILES = ("median ms", "spread")
"""Columns for which a screen has no room."""


@dataclass(frozen=True)
class FormTiming(ABC):
    """One model in one form at one kind of work.

    Attributes:
        model: its name.
        form: as it is written.
        low_ms: a tenth of the passes took no longer.
        median_ms: half of them.
        spread: see `Latency`.
        speed: the first model's time in the same form over this one; NaN if it has none.
        speed_over_oracle: the first model's time in eager float32 over this one.
        error: largest difference of its answers from its own in eager float32, as a part of the
            largest of these.
        distance: of its answers from these, see `relative_error`.
    """

    model: str
    form: str
    low_ms: float
    median_ms: float
    spread: float
    speed: float
    speed_over_oracle: float
    error: float
    distance: float

    @property
    def is_alike(self) -> bool:
        """Whether it answers as the model does; what is no number does not."""
        return self.distance <= TOLERANCE

    @property
    @abstractmethod
    def work(self) -> str:
        """What was timed, in words."""

    @property
    def time(self) -> str:
        """The low time, marked where it varied too much to judge by."""
        return f"{self.low_ms:.2f}" + ("?" if self.spread > MAX_SPREAD else "")

    @property
    def same_form(self) -> str:
        """The speed against the first model in the same form, nothing if it has none."""
        return "" if math.isnan(self.speed) else f"{self.speed:.2f}"


@dataclass(frozen=True)
class FormsReport:
    """What was found of models in several forms.

    Attributes:
        timings: of every form of every model at every kind of work.
        refused: forms that a model does not have, or cannot be timed in, each with the reason.
        num_threads: CPU threads.
        busy: what else the machine did, where that was too much to judge by.
    """

    timings: tuple[FormTiming, ...]
    refused: tuple[str, ...]
    num_threads: int
    busy: str


def load_models(directories: Mapping[str, Path], random: RandomModels | None) -> dict[str, Any]:
    """Load models of directories, or draw them."""
    if random is not None:
        return random.build()
    return {name: load_model(directory) for name, directory in directories.items()}


def source_faults(directories: Mapping[str, Path], random: RandomModels | None) -> list[str]:
    """Say what does not fit of where models are to come from."""
    faults = [] if random is None else random.faults()
    if bool(directories) == bool(random):
        faults.append("give directories of models, or --random, and not both")
    return faults


def prepare_forms(models: dict[str, Any], forms: Sequence[Form]) -> tuple[Prepared, list[str]]:
    """Bring each model into each form; what it does not have is said with the reason.

    Models are taken out of the mapping when their forms are there, so that memory holds no more.
    """
    prepared: Prepared = {}
    refused = []
    for name in list(models):
        model = models.pop(name)
        for form in dict.fromkeys((ORACLE, *forms)):
            try:
                if form != ORACLE:
                    see_that_it_fits(model)
                prepared[name, form] = form.prepare(model)
            except (ConversionError, MissingInputError) as error:
                refused.append(f"{name}, {form}: {error.message}")
    return prepared, refused


def compared(
    times: Mapping[tuple[str, Form], Latency], answers: Mapping[tuple[str, Form], Tensor]
) -> dict[tuple[str, Form], dict[str, Any]]:
    """Give what a `FormTiming` says, by name and form; ratios are to the first model."""
    first = next(iter(times))[0]
    return {
        (name, form): {
            "model": name,
            "form": str(form),
            "low_ms": latency.low_ms,
            "median_ms": latency.median_ms,
            "spread": latency.spread,
            "speed": _ratio(times.get((first, form)), latency),
            "speed_over_oracle": _ratio(times[first, ORACLE], latency),
            "error": _error(answers[name, form], answers[name, ORACLE]),
            "distance": relative_error([answers[name, form]], [answers[name, ORACLE]]),
        }
        for (name, form), latency in times.items()
    }


def fastest(timings: Sequence[FormTiming], model: str, work: str) -> FormTiming:
    """Give the form of a model that takes the least time at a kind of work and answers alike."""
    own = [one for one in timings if (one.model, one.work) == (model, work)]
    alike = [one for one in own if one.is_alike]
    return min(alike or own, key=lambda one: one.low_ms)


def verdicts(timings: Sequence[FormTiming], refused: Sequence[str], busy: str) -> list[str]:
    """Compare the models, each in its fastest form, in a sentence for each kind of work."""
    lines = []
    first, *others = dict.fromkeys(one.model for one in timings)
    for work in dict.fromkeys(one.work for one in timings):
        base = fastest(timings, first, work)
        said = [f"{first} {base.time} ms ({base.form})"]
        for name in others:
            own = fastest(timings, name, work)
            said.append(
                f"{name} {own.time} ms ({own.form}), {base.low_ms / own.low_ms:.2f} × as fast"
            )
        lines.append(f"{work}, each in its fastest form: " + "; ".join(said))
    lines += [f"not there: {reason}" for reason in refused]
    far = dict.fromkeys(f"{one.model} in {one.form}" for one in timings if not one.is_alike)
    if far:
        lines.append(
            f"not counted as the fastest: {', '.join(far)}, whose answers lie more than "
            f"{TOLERANCE:g} of their length away from those of {ORACLE}"
        )
    wide = sum(one.spread > MAX_SPREAD for one in timings)
    if wide:
        lines.append(f"{wide} of {len(timings)} times vary too much to judge by (marked ?)")
    return [*lines, *([busy] if busy else [])]


def show_results(
    name: str,
    report: FormsReport,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    remarks: Sequence[str] = (),
    output: Path | None,
) -> None:
    """Print a table and what follows from it, and write both into a directory, if one is given.

    Args:
        name: of the files.
        report: what was found.
        columns: of the table; those of `ONLY_IN_FILES` do not fit on a screen.
        rows: a timing in each.
        remarks: what is said before models are compared.
        output: the directory, for JSON and Markdown.
    """
    sentences = [*remarks, *verdicts(report.timings, report.refused, report.busy)]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    table = Table(
        title=f"{report.num_threads} threads, {torch.backends.cpu.get_cpu_capability()}; speed is "
        f"{report.timings[0].model}'s time in the same form, and in eager-fp32, over a model's own",
        # Within 80 columns.
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    places = [place for place, column in enumerate(columns) if column not in ONLY_IN_FILES]
    for place in places:
        table.add_column(columns[place].replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[place] for place in places))
    console.print(table)
    for sentence in sentences:
        console.print(sentence)
    if output is not None:
        lines = [*markdown_table(columns, rows), "", *(f"- {sentence}" for sentence in sentences)]
        write_results(output, name, report, "\n".join(lines) + "\n")


def named_directories(directories: Sequence[str], command: str) -> dict[str, Path]:
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
        raise ConfigError(faults, source=command)
    return found


def _stage_name(directory: Path) -> str:
    place = directory.absolute()
    return place.parent.name if place.name == "model" else place.name


def _ratio(other: Latency | None, own: Latency) -> float:
    return float("nan") if other is None else other.low_ms / own.low_ms


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
