"""Time a sweep of small trials, and count what ASHA saves against training all to the end.

The teacher is made first and is not counted: the sweep finds it finished. What is timed is the
command from the start of Ray to the report.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.table import Table

from moe_dist.config import RunConfig, build_config, read_settings
from moe_dist.config.override_texts import parse_overrides
from moe_dist.config.overrides import apply_overrides
from moe_dist.jobs.results import PREDICTIONS, RESULT, load_predictions
from moe_dist.measure.bootstrap import paired_bootstrap
from moe_dist.search.trials import LOG_NAME, rank_trials

from ..chain.chain import run_chain
from ..console import Console
from ..search.results import write_results
from ..search.sweep import SweepResult, search_recipe
from ..search.trial import training_directory
from ..search.trial_watch import TRIALS_DIRECTORY

if TYPE_CHECKING:
    from moe_dist.search.trials import Trial
    from moe_dist.tracking import TrackedRun

ROUTER_RECIPE = Path(__file__).parent.parent / "recipes" / "search" / "router.yaml"
GOAL_RATIO = 2.0
GOAL_STEPS = 0.5


@dataclass(frozen=True)
class SearchBenchmark:
    """What to search.

    Args:
        recipe: with a `search` section, and trials of one worker.
        num_trials: of each sweep, the recipe's own counted.
        num_steps: optimizer steps of one trial.
        batch_size: sentences in one of them.
        max_train_samples: training rows.
        max_dev_samples: rows that each trial is measured on, three times.
        with_asha: compare ASHA with training all to the end.
        overrides: further settings, `key=value`.
    """

    recipe: Path = ROUTER_RECIPE
    num_trials: int = 16
    num_steps: int = 24
    batch_size: int = 16
    max_train_samples: int = 1000
    max_dev_samples: int = 256
    with_asha: bool = True
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepFigures:
    """One sweep.

    Args:
        scheduler: who ended trials early.
        num_trials: trials that were run.
        seconds: of the whole command.
        training_s: in the training loops of all trials together, evaluations included; what a
            trial loads and converts before is not counted.
        num_concurrent: trials at a time.
        steps: optimizer steps taken.
        all_steps: those of all trials to the end.
        result: the sweep itself.
        before_s: until the first trial's worker was there.
        beside_s: in all trials together, beside their training: loading and converting.
        after_s: since the last trial was over.
    """

    scheduler: str
    num_trials: int
    seconds: float
    training_s: float
    num_concurrent: int
    steps: int
    all_steps: int
    result: SweepResult
    before_s: float = 0.0
    beside_s: float = 0.0
    after_s: float = 0.0

    @property
    def ratio(self) -> float:
        """The time over that of the trials alone, perfectly spread."""
        return self.seconds / (self.training_s / self.num_concurrent)


@dataclass(frozen=True)
class SearchFigures:
    """What the benchmark found.

    Args:
        whole: the sweep that trained every trial to the end.
        asha: the one that ended bad ones; None where it was not asked for.
        difference: ASHA's best minus the other's best on the dev rows, with its interval; None
            where both found the same trial or there is one sweep only.
        higher_is_better: which way the metric of the difference is better.
    """

    whole: SweepFigures
    asha: SweepFigures | None = None
    difference: Any = None
    higher_is_better: bool = True

    @property
    def is_as_good(self) -> bool:
        """Whether ASHA's best cannot be told from the best of all."""
        if self.difference is None:
            return True
        found = self.difference
        return bool(found.high >= 0 if self.higher_is_better else found.low <= 0)


def run(settings: SearchBenchmark | None = None) -> SearchFigures:
    """Search the same points with and without early stopping."""
    settings = SearchBenchmark() if settings is None else settings
    with tempfile.TemporaryDirectory(prefix="moe-dist-search-") as name:
        config = _config(settings, Path(name))
        run_chain(config, Console(quiet=True), until="score-importance")
        whole = _sweep(config, "none")
        if not settings.with_asha:
            return SearchFigures(whole)
        asha = _sweep(config, "asha")
        return SearchFigures(
            whole,
            asha,
            _difference(whole.result, asha.result),
            whole.result.task.higher_is_better,
        )


def to_table(figures: SearchFigures) -> Table:
    """Lay the figures out for the console."""
    table = Table(title="sweeps over the same points")
    for heading in (
        "early stopping",
        "trials",
        "at a time",
        "s",
        "s of training",
        "ratio",
        "steps",
    ):
        table.add_column(heading, justify="left" if heading == "early stopping" else "right")
    for one in filter(None, (figures.whole, figures.asha)):
        share = one.steps / figures.whole.steps
        table.add_row(
            one.scheduler,
            str(one.num_trials),
            str(one.num_concurrent),
            f"{one.seconds:.1f}",
            f"{one.training_s:.1f}",
            f"{one.ratio:.2f}",
            f"{one.steps} ({100 * share:.0f} %)",
        )
    return table


def main(settings: SearchBenchmark | None = None) -> None:
    """Run the benchmark and print its table; what `moe-dist benchmark search` calls."""
    figures = run(settings)
    console = RichConsole(highlight=False)
    console.print(to_table(figures))
    for one in filter(None, (figures.whole, figures.asha)):
        console.print(
            f"{one.scheduler}: {one.before_s:.1f} s before the first trial, "
            f"{one.beside_s:.1f} s in trials beside their training, "
            f"{one.after_s:.1f} s after the last"
        )
    ratio = figures.whole.ratio
    verdict = "reached" if ratio <= GOAL_RATIO else "missed"
    console.print(
        f"{ratio:.2f} × the training time over trials at a time, start-up included; the goal of "
        f"{GOAL_RATIO:g} × is {verdict}"
    )
    if figures.asha is None:
        return
    share = figures.asha.steps / figures.whole.steps
    is_reached = share <= GOAL_STEPS and figures.is_as_good
    console.print(
        f"ASHA took {100 * share:.0f} % of the steps; its best {_said(figures)}; the goal of "
        f"{100 * GOAL_STEPS:.0f} % with a best that cannot be told from the other is "
        f"{'reached' if is_reached else 'missed'}"
    )


def _said(figures: SearchFigures) -> str:
    if figures.difference is None:
        return "is the same trial"
    found = figures.difference
    return (
        f"minus the best of all is {found.difference:+.4f} on the dev rows (95 % interval "
        f"{found.low:+.4f} to {found.high:+.4f})"
    )


def _config(settings: SearchBenchmark, directory: Path) -> RunConfig:
    raw = read_settings(settings.recipe)
    own = (
        f"output_dir={directory}",
        "tracking.enabled=false",
        "compare={}",
        f"data.max_train_samples={settings.max_train_samples}",
        f"data.max_dev_samples={settings.max_dev_samples}",
        f"train.batch_size={settings.batch_size}",
        f"train.max_steps={settings.num_steps}",
        "train.num_epochs=1000",
        "finetune.num_epochs=1",
        # A pass over rows for each trial, which has nothing to do with the search.
        "moe.fit_output=false",
        # The same points in both sweeps: nothing may learn from what was found.
        "search.algorithm=random",
        f"search.num_trials={settings.num_trials - 1}",
        *settings.overrides,
    )
    apply_overrides(raw, parse_overrides(own))
    return build_config(raw, source=str(settings.recipe))


def _sweep(config: RunConfig, scheduler: str) -> SweepFigures:
    # The same rungs for both, so that evaluations cost the same.
    search = config.search.model_copy(update={"scheduler": scheduler})
    config = config.model_copy(update={"search": search})

    def finish(result: SweepResult, run: TrackedRun) -> int | None:
        summary = write_results(result, run)
        return None if summary["best"] is None else int(summary["best"]["trial"])

    begin = time.time()
    result = search_recipe(config, Console(quiet=True), finish)
    end = time.time()
    log = (result.directory / LOG_NAME).read_text(encoding="utf-8")
    times = [float(json.loads(line)["time"]) for line in log.splitlines()]
    target = result.directory.with_name(f"search-{scheduler}")
    result.directory.rename(target)
    result = replace(result, directory=target)
    trials = list(result.trials.values())
    training_s = sum(_loop_seconds(result, trial) for trial in trials)
    return SweepFigures(
        scheduler,
        len(trials),
        end - begin,
        training_s,
        result.num_concurrent,
        sum(trial.steps_done for trial in trials),
        sum(trial.num_steps for trial in trials),
        result,
        before_s=times[0] - begin,
        beside_s=sum(trial.seconds for trial in trials) - training_s,
        after_s=end - times[-1],
    )


def _loop_seconds(result: SweepResult, trial: Trial) -> float:
    """Read what a trial's training loop took; of one that was ended early, all of its time."""
    path = training_directory(result.directory / TRIALS_DIRECTORY, trial.number) / RESULT
    if not path.exists():
        return trial.seconds
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])


def _difference(whole: SweepResult, asha: SweepResult) -> Any:
    ours, theirs = _best(asha), _best(whole)
    if ours.number == theirs.number:
        return None
    answers = [
        load_predictions(
            training_directory(result.directory / TRIALS_DIRECTORY, trial.number) / PREDICTIONS
        )
        for result, trial in ((asha, ours), (whole, theirs))
    ]
    metric, space = whole.task.main_metric, whole.task.label_space
    first, second = answers
    return paired_bootstrap(metric, first.labels, first.logits, second.logits, space)


def _best(result: SweepResult) -> Trial:
    metric, mode = next(iter(result.config.search.wanted.items()))
    return rank_trials(list(result.trials.values()), metric, mode)[0]
