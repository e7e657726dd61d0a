"""Time models in every form that they answer in, in turn, so that a busy machine slows all alike.

Times are those below which a tenth of the passes lies: what a model costs where nothing disturbs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConfigError
from moe_dist.inference.backends import QUICK_FORMS, Form
from moe_dist.measure.latency import (
    Rounds,
    any_task,
    measure_in_turn,
    random_batch,
    watch_other_work,
)

from .forms import (
    FormsReport,
    FormTiming,
    Prepared,
    compared,
    load_models,
    prepare_forms,
    show_results,
    source_faults,
)
from .models import RandomModels
from .results import busy_line, check_output
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
        padded: whether the sentences of a pass have all lengths, padded to the longest.
    """

    directories: Mapping[str, Path] = field(default_factory=dict)
    random: RandomModels | None = None
    shapes: tuple[tuple[int, int], ...] = SHAPES
    forms: tuple[Form, ...] = QUICK_FORMS
    num_rounds: int = 15
    num_threads: int | None = None
    padded: bool = False


@dataclass(frozen=True)
class Timing(FormTiming):
    """One model in one form at one shape.

    Attributes:
        shape: sentences, tokens.
        padded: whether these are the tokens of the longest sentence.
    """

    shape: tuple[int, int]
    padded: bool = False

    @property
    def work(self) -> str:
        """The shape, as it is written."""
        return f"{self.shape[0]} × {'up to ' if self.padded else ''}{self.shape[1]}"


@dataclass(frozen=True)
class InferenceReport(FormsReport):
    """What was found, of every shape."""

    timings: tuple[Timing, ...]


def run(settings: InferenceBenchmark) -> InferenceReport:
    """Load, bring into forms, and time. A ConfigError if a setting does not fit."""
    faults = below_one(settings, "num_rounds", called=OPTIONS)
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads", called=OPTIONS)
    faults += [f"shape {b} × {s} has nothing in it" for b, s in settings.shapes if min(b, s) < 1]
    faults += source_faults(settings.directories, settings.random)
    models = {} if faults else load_models(settings.directories, settings.random)
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
        prepared, refused = prepare_forms(models, settings.forms)
        num_threads = torch.get_num_threads()
        with watch_other_work() as look:
            timings = [one for shape in settings.shapes for one in _time(prepared, shape, settings)]
            work = look()
    return InferenceReport(
        tuple(timings), tuple(refused), num_threads, busy_line(work, num_threads)
    )


def _time(prepared: Prepared, shape: tuple[int, int], settings: InferenceBenchmark) -> list[Timing]:
    batch_size, seq_len = shape
    rounds = Rounds(settings.num_rounds)
    found = measure_in_turn(
        prepared, rounds, batch_sizes=(batch_size,), seq_len=seq_len, padded=settings.padded
    )
    times = {key: by_size[batch_size] for key, by_size in found.items()}
    answers = {key: _answer(model, shape, settings.padded) for key, model in prepared.items()}
    said = compared(times, answers).values()
    return [Timing(**one, shape=shape, padded=settings.padded) for one in said]


@torch.inference_mode()
def _answer(model: Any, shape: tuple[int, int], padded: bool) -> Tensor:
    """Logits, or what else a model's first output is, of random texts; 0 where it is of padding."""
    batch = random_batch(model, *shape, padded=padded)
    with any_task(model):
        answer: Tensor = model(**batch)[0]
    if answer.shape[:2] == shape:
        mask = batch["attention_mask"].bool()
        answer = answer.masked_fill(~mask.view(*shape, *[1] * (answer.dim() - 2)), 0)
    return answer.float()


COLUMNS = (
    "shape", "model", "form", "ms", "median ms", "spread",
    "× same form", "× eager-fp32", "differs",
)  # fmt: skip


def to_rows(report: InferenceReport) -> list[list[str]]:
    """Lay the timings out, a row each, in the order of `COLUMNS`."""
    return [
        [
            one.work,
            one.model,
            one.form,
            one.time,
            f"{one.median_ms:.2f}",
            f"{one.spread:.2f}",
            one.same_form,
            f"{one.speed_over_oracle:.2f}",
            f"{one.error:.0e}",
        ]
        for one in report.timings
    ]


def main(settings: InferenceBenchmark, output: Path | None = None) -> None:
    """Run the benchmark and print it; what `moe-dist benchmark inference` calls.

    Args:
        settings: what to measure.
        output: a directory for the same as JSON and Markdown.
    """
    check_output(output)
    report = run(settings)
    show_results("inference", report, COLUMNS, to_rows(report), output=output)
