"""Time a small student against BERT-base, interleaved in one process.

Weights are random: a forward pass takes as long whatever they are. The published speed-up of a
student of 4 layers of width 312 is 9.3×.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_dist.conversion.shrink import plan_shrink, shrink_model
from moe_dist.errors import ConfigError
from moe_dist.measure.latency import measure_latency
from moe_dist.measure.profile import count_parameters, flops_per_token

from .sizes import below_one

PUBLISHED_SPEEDUP = 9.3
PUBLISHED_SIZES = {"num_layers": 4, "hidden_size": 312, "intermediate_size": 1200}


@dataclass(frozen=True)
class StudentBenchmark:
    """What to time. Defaults are the published student and its teacher.

    Args:
        num_layers: of the student.
        hidden_size: of the student.
        intermediate_size: of the student.
        batch_sizes: sentences of one pass.
        seq_len: tokens of a sentence.
        num_repeats: rounds that count.
        num_threads: CPU threads; torch's own choice if None.
        teacher: what differs from BERT-base, as `BertConfig` takes it.
    """

    num_layers: int = 4
    hidden_size: int = 312
    intermediate_size: int = 1200
    batch_sizes: tuple[int, ...] = (1, 32)
    seq_len: int = 128
    num_repeats: int = 9
    num_threads: int | None = None
    teacher: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class StudentTiming:
    """One line of the result.

    Args:
        batch_size: sentences of one pass.
        teacher_ms: median over the rounds.
        student_ms: likewise.
        speedup: median over rounds of the teacher's time over the student's in the same round.
    """

    batch_size: int
    teacher_ms: float
    student_ms: float
    speedup: float


@dataclass(frozen=True)
class StudentReport:
    """What was found.

    Args:
        num_parameters: of teacher and student.
        flops_per_sentence: of teacher and student.
        timings: one for each batch size.
    """

    num_parameters: tuple[int, int]
    flops_per_sentence: tuple[float, float]
    timings: tuple[StudentTiming, ...]


def run(settings: StudentBenchmark | None = None) -> StudentReport:
    """Time both models once in each round, so that a busy machine slows them alike.

    A ConfigError if a setting does not fit.
    """
    settings = StudentBenchmark() if settings is None else settings
    faults = below_one(settings, "num_repeats", "seq_len")
    faults += [f"batch size {size} is less than 1" for size in settings.batch_sizes if size < 1]
    if faults:
        raise ConfigError(faults, source="benchmark students")
    models = _models(settings)
    seconds: dict[int, list[tuple[float, float]]] = {size: [] for size in settings.batch_sizes}
    for _ in range(settings.num_repeats):
        for size, times in seconds.items():
            teacher_ms, student_ms = (_time_ms(model, size, settings) for model in models)
            times.append((teacher_ms, student_ms))
    teacher_flops, student_flops = (
        settings.seq_len * flops_per_token(model, settings.seq_len).total for model in models
    )
    return StudentReport(
        num_parameters=(count_parameters(models[0]).total, count_parameters(models[1]).total),
        flops_per_sentence=(teacher_flops, student_flops),
        timings=tuple(_summary(size, times) for size, times in seconds.items()),
    )


def to_table(report: StudentReport, settings: StudentBenchmark) -> Table:
    """Lay the result out for the console."""
    total, flops = report.num_parameters, report.flops_per_sentence
    table = Table(
        title=f"{settings.num_layers} layers of width {settings.hidden_size}: "
        f"{total[1] / 1e6:.1f} M parameters of {total[0] / 1e6:.1f} M, {flops[1] / 1e9:.2f} of "
        f"{flops[0] / 1e9:.2f} GFLOPs for a sentence of {settings.seq_len} tokens; "
        f"{settings.num_threads or torch.get_num_threads()} threads"
    )
    for heading in ("batch", "teacher, ms", "student, ms", "speed-up"):
        table.add_column(heading, justify="right")
    for timing in report.timings:
        table.add_row(
            str(timing.batch_size),
            f"{timing.teacher_ms:.1f}",
            f"{timing.student_ms:.1f}",
            f"× {timing.speedup:.2f}",
        )
    return table


def main(settings: StudentBenchmark | None = None) -> None:
    """Run the benchmark and print its table; the defaults if None."""
    settings = StudentBenchmark() if settings is None else settings
    report = run(settings)
    console = Console()
    console.print(to_table(report, settings))
    sizes = {name: getattr(settings, name) for name in PUBLISHED_SIZES}
    if sizes == PUBLISHED_SIZES and not settings.teacher:
        console.print(f"published speed-up of this student: × {PUBLISHED_SPEEDUP}")


def _models(settings: StudentBenchmark) -> tuple[Any, Any]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig(**dict(settings.teacher))).eval()
    plan = plan_shrink(
        teacher,
        num_layers=settings.num_layers,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        init="truncate",
    )
    return teacher, shrink_model(teacher, plan)


def _time_ms(model: Any, batch_size: int, settings: StudentBenchmark) -> float:
    found = measure_latency(
        model,
        batch_sizes=(batch_size,),
        seq_len=settings.seq_len,
        repeats=1,
        num_warmups=1,
        threads=settings.num_threads,
    )
    return found[batch_size].median_ms


def _summary(batch_size: int, times: Sequence[tuple[float, float]]) -> StudentTiming:
    return StudentTiming(
        batch_size,
        statistics.median(teacher for teacher, _ in times),
        statistics.median(student for _, student in times),
        statistics.median(teacher / student for teacher, student in times),
    )
