"""What the user sees while a chain runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from moe_dist.redaction import hide_secrets

CONTINUES = "the same command continues from here"
PIPED_WIDTH = 160
UNDEFINED = "undefined"
"""Shown in place of a metric that has no value."""
PLAIN_LINE_EVERY_S = 10.0
"""Between two plain progress lines at least this long, so that log files stay short."""
TRIALS = "trials"
"""What a sweep is called where a stage would stand."""
RATE_WINDOW_S = 120.0
"""How far back the speed is looked at: a resumed run shows steps that took no time now."""


class Console:
    """Shows stages and their progress.

    Progress goes to standard error and results to standard output, so that results can be piped.

    Args:
        quiet: show errors, warnings and results only.
        live: draw a progress bar; None looks whether standard error is a terminal.
    """

    def __init__(self, *, quiet: bool = False, live: bool | None = None) -> None:
        self.quiet = quiet
        self._err = RichConsole(stderr=True, highlight=False)
        # A file or a pipe has no width of its own; a table must not be folded to 80 columns there.
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        self._out = RichConsole(highlight=False, width=width)
        self._live = (sys.stderr.isatty() if live is None else live) and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._plan: list[str] = []
        self._started_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()
        self._last_line_s = float("-inf")
        self._last_step = -1
        self._titles: dict[str, str] = {}

    def name_metrics(self, titles: Mapping[str, str]) -> None:
        """Show metrics from now on by what people call each, such as `f1 of ok` for `f1`."""
        self._titles = dict(titles)

    def note(self, message: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self._print(escape(message))

    def warn(self, message: str) -> None:
        """Print a warning."""
        self._print(f"[yellow]warning:[/] {escape(message)}")

    def result(self, renderable: Any) -> None:
        """Print text, or anything that rich can draw, to standard output."""
        if isinstance(renderable, str):
            # As it is: a path may hold what rich takes for markup.
            self._out.print(hide_secrets(renderable), soft_wrap=True, markup=False, emoji=False)
        else:
            self._out.print(renderable)

    def document(self, content: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Show what came out: `show` draws for people what `content` holds for programs."""
        show()

    def planned(self, stages: Sequence[str]) -> None:
        """Take note of the stages to come, in order, so that each says how many are left."""
        self._plan = list(stages)

    def output(self, text: str) -> None:
        """Pass on what a job on a cluster printed, lines or parts of them, to standard output."""
        sys.stdout.write(hide_secrets(text))
        sys.stdout.flush()

    def stage_skipped(self, stage: str, seconds: float) -> None:
        """Say that a stage was already finished, and the seconds it took when it ran."""
        self.note(f"{stage}: already finished ({duration(seconds)}), nothing changed; skipped")

    def stage_started(self, stage: str, *, resumed: bool) -> None:
        """Open the progress of a stage."""
        self._begin(stage)
        if not self._live:
            self.note(f"{self._placed(stage)}: {'continuing' if resumed else 'started'}")
            return
        self._draw(self._placed(stage), "continuing" if resumed else "starting")

    def trials(
        self,
        over: int,
        total: int,
        figures: Mapping[str, float],
        running: Mapping[str, float],
    ) -> None:
        """Show how far a sweep is; `close` ends it.

        `over` trials of `total` are over; `running` holds what those under way have
        measured, by their name and rung.
        """
        if self._stage != TRIALS or (self._live and self._progress is None):
            self._begin(TRIALS)
            if self._live:
                self._draw(TRIALS, "starting")
        self.progress(over, total, figures, running)

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._started_s = time.monotonic()
        self._recent.clear()
        self._last_step = -1
        self._last_line_s = float("-inf")

    def _draw(self, description: str, figures: str) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=self._err,
            transient=True,
        )
        self._task = self._progress.add_task(description, total=None, figures=figures)
        self._progress.start()

    def progress(
        self,
        step: int,
        total: int | None,
        figures: Mapping[str, float] | None = None,
        terms: Mapping[str, float] | None = None,
    ) -> None:
        """Show how far the current stage is; `terms` are what the loss is made of."""
        if self.quiet:
            return
        now = time.monotonic()
        if step < self._last_step:
            self._recent.clear()
        self._recent.append((now, step))
        while now - self._recent[0][0] > RATE_WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()
        text = self._figures(now, step, total, figures or {})
        parts = "  ".join(f"{name} {_figure(value)}" for name, value in (terms or {}).items())
        if self._progress is not None and self._task is not None:
            shown = f"{text}\n[dim]{escape(parts)}[/]" if parts else text
            self._progress.update(self._task, completed=step, total=total, figures=shown)
        elif step != self._last_step and now - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = now
            self.note(f"{self._stage}: {text}" + (f"  ({parts})" if parts else ""))
        self._last_step = step

    def stage_finished(self, stage: str, seconds: float, metrics: Mapping[str, float]) -> None:
        """Close the progress of a stage that finished."""
        self.close()
        shown = ", ".join(
            f"{self._titled(name)} {_figure(value)}" for name, value in list(metrics.items())[:4]
        )
        self.note(f"{stage}: done in {duration(seconds)}" + (f"  ({shown})" if shown else ""))

    def close(self) -> None:
        """Remove the progress bar, if one is drawn."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._task = None

    def _placed(self, stage: str) -> str:
        if stage not in self._plan:
            return stage
        return f"{stage} ({self._plan.index(stage) + 1} of {len(self._plan)})"

    def _titled(self, name: str) -> str:
        """Name a figure such as `dev f1` or `student/f1` by what its metric is called."""
        for metric, title in self._titles.items():
            for mark in (" ", "/"):
                if name.endswith(f"{mark}{metric}"):
                    return f"{name.removesuffix(metric)}{title}"
        return self._titles.get(name, name)

    def _print(self, markup: str) -> None:
        target = self._progress.console if self._progress is not None else self._err
        target.print(hide_secrets(markup), soft_wrap=True)

    def _figures(
        self, now: float, step: int, total: int | None, figures: Mapping[str, float]
    ) -> str:
        unit = "trial" if self._stage == TRIALS else "step"
        parts = [f"{unit} {step}/{total}" if total else f"{unit} {step}"]
        parts += [f"{self._titled(name)} {_figure(value)}" for name, value in figures.items()]
        first_s, first_step = self._recent[0]
        if total and step > first_step:
            left_s = (now - first_s) / (step - first_step) * (total - step)
            parts.append(f"ETA {duration(left_s)}")
        return "  ".join(parts)


def _figure(value: float) -> str:
    if math.isnan(value):
        return UNDEFINED
    # Four digits, but never as a power of ten: speeds go into the thousands.
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def signed(*values: float) -> list[str]:
    """Write differences that are read together: to four places, or to three digits if these lie.

    So what is above or below 0 never reads as 0.
    """
    is_hidden = any(value and not round(value, 4) for value in values)
    return [f"{value:+.3g}" if is_hidden else f"{value:+.4f}" for value in values]


def duration(seconds: float) -> str:
    """Return a duration as people write it: `8.4 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def quantity(count: float) -> str:
    """Write a count with a unit prefix, for example `22.7 M`."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f} {prefix}"
    return f"{count:.0f}"
