"""The best trial and the recipe as it stands once more, with other seeds of the student.

The best of many trials is in part the luckiest. Other seeds (order of the rows, dropout, new gates)
on the same rows and from the same teacher tell what of its margin is left. They are measured on the
dev rows: where trials are chosen on a hold-out of the training rows, these decide only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from moe_dist.search.early_stopping import Ruling
from moe_dist.search.trials import BASELINE, Trial
from moe_dist.search.tune import TrialRoom, run_sweep
from moe_dist.workers.ray_session import RaySession

from ..console import signed
from .rerun import Rerun
from .teachers import TeacherFacts, teacher_key
from .trial import TrialRunner, training_directory

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.tasks import TaskSpec
    from moe_dist.tracking import TrackedRun

    from ..chain.workspace import Workspace

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Confirmation:
    """What other seeds say.

    Attributes:
        metric: the objective.
        best: the trial's number.
        best_values: its measures, one for each seed.
        baseline_values: those of the recipe as it stands, by the same seeds.
        difference: mean of best minus baseline, seed by seed.
        low: lower end of its interval (Student's t over seeds).
        high: upper end.
        on_examples: the same difference on a metric of the task, with the interval of the paired
            bootstrap over examples and seeds or that of Student's t over seeds, whichever is wider
            (`metric`, `title`, `num_examples` and what `Interval` holds, or why it is
            `undefined`); None where the answers are not there.
        num_asked: how many different best trials the dev rows have judged so far.
    """

    metric: str
    best: int
    best_values: tuple[float, ...]
    baseline_values: tuple[float, ...]
    difference: float
    low: float
    high: float
    on_examples: dict[str, Any] | None = None
    num_asked: int = 1

    def __str__(self) -> str:
        """Say it in a few sentences."""
        best, baseline = (
            f"{fmean(values):.4f} ± {stdev(values):.4f}"
            for values in (self.best_values, self.baseline_values)
        )
        claim = "it cannot be told from the noise of seeds"
        if self.low > 0 or self.high < 0:
            claim = "it is more than the noise of seeds"
        difference, low, high = signed(self.difference, self.low, self.high)
        lines = [
            f"With {len(self.best_values)} other seeds trial {self.best} has {self.metric} {best} "
            f"on the dev rows, the recipe as it stands {baseline}; difference "
            f"{difference}, {round(100 * CONFIDENCE)} % interval over seeds "
            f"{low} to {high}: {claim}."
        ]
        found = self.on_examples
        if found is not None and "undefined" in found:
            lines.append(
                f"Over {found['num_examples']} dev rows {found['title']} is undefined: "
                f"{found['undefined']}."
            )
        elif found is not None:
            is_clear = found["low"] > 0 or found["high"] < 0
            difference, low, high = signed(found["difference"], found["low"], found["high"])
            lines.append(
                f"Over {found['num_examples']} dev rows and the seeds together (the wider one of "
                f"paired bootstrap and Student's t over seeds): {found['title']} "
                f"{difference}, "
                f"{round(100 * found['confidence'])} % interval {low} to "
                f"{high}, which {'leaves out' if is_clear else 'holds'} zero."
            )
        if self.num_asked > 1:
            lines.append(
                f"The dev rows have judged {self.num_asked} best trials of this search by now, so "
                "they are no longer untouched."
            )
        return " ".join(lines)


def confirm(
    workspace: Workspace,
    directory: Path,
    teachers: dict[str, TeacherFacts],
    best: Trial | None,
    room: TrialRoom,
    session: RaySession,
    run: TrackedRun,
    tags: Mapping[str, str],
) -> Confirmation | None:
    """Train the best and the recipe as it stands with other seeds, where the recipe asks for it.

    Args:
        workspace: the sweep's.
        directory: where the sweep's trials lie.
        teachers: facts by key.
        best: the sweep's best trial.
        room: where trials run.
        session: the connection to Ray.
        run: the sweep's; every seed is a child of it.
        tags: of every child.

    Returns:
        What the seeds say; None where nothing was asked, the recipe itself is the best, or fewer
        than two seeds could be trained.
    """
    config, console = workspace.config, workspace.console
    search = config.search
    metric, mode = next(iter(search.wanted.items()))
    if not search.confirm_seeds or best is None or best.number == BASELINE:
        return None
    console.note(
        f"trial {best.number} and the recipe as it stands, with {search.confirm_seeds} other seeds"
    )
    reruns = directory / "confirm" / f"trial-{best.number:04d}"
    tasks = confirm_tasks(config, best, in_place=room.in_place)
    watcher = Rerun(config, reruns, tasks, best, run, console, workspace.files, tags)
    if watcher.num_left:
        runner = TrialRunner(config, workspace.files.address(reruns), (1,), teachers)
        room = replace(room, num_concurrent=min(room.num_concurrent, watcher.num_left))
        ruling = Ruling("none", metric, mode, 1, search.reduction_factor)
        try:
            run_sweep(runner, watcher, ruling, room, session, num_trials=watcher.num_left)
        finally:
            watcher.close()
    trials = watcher.log.trials
    confirmation = judge(metric, best.number, trials)
    if confirmation is None:
        return None
    return replace(
        confirmation,
        on_examples=compare_answers(
            reruns,
            workspace.splits.task,
            measured_pairs(metric, trials),
            config.seed,
            workspace.files.fetch,
        ),
        num_asked=len([path for path in reruns.parent.iterdir() if path.is_dir()]),
    )


def confirm_tasks(config: RunConfig, best: Trial, *, in_place: bool) -> list[dict[str, Any]]:
    """List what is to be trained: even numbers are the best, odd ones the recipe as it stands.

    `in_place` trials run in their own actor.
    """
    return [
        {
            "number": 2 * index + is_baseline,
            "overrides": {} if is_baseline else best.overrides,
            "teacher": teacher_key(config, {} if is_baseline else best.overrides),
            "in_place": in_place,
            "is_ruled": False,
            "seed": config.seed + 1 + index,
        }
        for index in range(config.search.confirm_seeds)
        for is_baseline in (False, True)
    ]


def compare_answers(
    directory: Path,
    task: TaskSpec,
    pairs: Sequence[int],
    seed: int,
    fetch: Callable[[Path], Path],
) -> dict[str, Any] | None:
    """Compare what the two say of each dev row, over all seeds; see `Confirmation.on_examples`.

    `pairs` come from `measured_pairs`; `fetch` sees to it that a file is on this machine.
    """
    from moe_dist.data.metrics import explain_undefined, metric_title
    from moe_dist.errors import CheckpointError
    from moe_dist.jobs.results import PREDICTIONS, load_predictions
    from moe_dist.measure.bootstrap import NO_INTERVAL, seeded_bootstrap

    try:
        answers = [
            load_predictions(
                fetch(training_directory(directory, number + is_baseline) / PREDICTIONS)
            )
            for number in pairs
            for is_baseline in (False, True)
        ]
    except CheckpointError:
        return None
    rows = answers[0].sample_ids.tolist()
    if any(one.sample_ids.tolist() != rows for one in answers):
        return None
    metric, space, labels = task.main_metric, task.label_space, answers[0].labels
    found = {"metric": metric, "title": metric_title(metric, space), "num_examples": len(rows)}
    ours, theirs = ([one.logits for one in answers[start::2]] for start in (0, 1))
    compared = seeded_bootstrap(metric, labels, ours, theirs, space, seed=seed)
    if compared is not None:
        return found | asdict(compared)
    reasons = (explain_undefined(metric, one, labels, space) for one in (*ours, *theirs))
    return found | {"undefined": next((why for why in reasons if why), NO_INTERVAL)}


def judge(metric: str, best: int, trials: Mapping[int, Trial]) -> Confirmation | None:
    """Compare the two, seed by seed; None for fewer than two seeds."""
    from scipy import stats

    pairs = [
        (trials[number].value(metric), trials[number + 1].value(metric))
        for number in measured_pairs(metric, trials)
    ]
    if len(pairs) < 2:
        return None
    ours, theirs = (tuple(values) for values in zip(*pairs, strict=True))
    gaps = [one - other for one, other in pairs]
    mean = fmean(gaps)
    spread = stdev(gaps) / math.sqrt(len(gaps))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1)) * spread
    return Confirmation(metric, best, ours, theirs, mean, mean - reach, mean + reach)


def measured_pairs(metric: str, trials: Mapping[int, Trial]) -> list[int]:
    """Find the seeds with which both were measured.

    Returns the numbers of the best's trials; the next of each is the recipe's as it stands.
    """
    measured = {number for number, one in trials.items() if not math.isnan(one.value(metric))}
    return sorted(n for n in measured if n % 2 == 0 and n + 1 in measured)
