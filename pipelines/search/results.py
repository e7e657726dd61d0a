"""What a sweep leaves: best.yaml, trials.parquet, report.json, report.md and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moe_dist.data.metrics import METRICS
from moe_dist.search.importance import key_importance
from moe_dist.search.trials import BASELINE, Trial, finished_front, rank_trials
from moe_dist.whole_files import write_json

from ..console import duration, signed
from ..markdown import markdown_table
from .measures import shown
from .plots import plot_curves, plot_fronts, plot_importance_of_keys, plot_parallel
from .sweep import SweepResult
from .sweep_files import PARQUET_NAME, ROWS, write_best, write_table
from .trial import choosing_split, training_directory
from .trial_watch import TRIALS_DIRECTORY
from .weight_history import history_lines, history_words, took_over_weights

if TYPE_CHECKING:
    from moe_dist.tracking import TrackedRun

    from .frontier import Answer

REPORT_NAME, SUMMARY_NAME = "report.md", "report.json"
MAX_ROWS = 10
PICTURES = {
    "parallel.png": "Trials and what they reached",
    "importance.png": "Which keys matter",
    "pareto.png": "Quality against cost",
    "curves.png": "Learning curves by rung",
}


def write_results(
    result: SweepResult, run: TrackedRun, answer: Answer | None = None
) -> dict[str, Any]:
    """Write all that a sweep leaves, hand it to the tracking server, and return the report.

    The trial of `best.yaml` is the answer's, or the best by the first objective without a goal.
    """
    trials = list(result.trials.values())
    metric, mode = next(iter(result.config.search.wanted.items()))
    ranked = rank_trials(trials, metric, mode)
    best = (ranked[0] if ranked else None) if answer is None else answer.trial
    directory = result.directory
    summary = summarise(result, best)
    if answer is not None:
        lines = [*answer.lines, *_confirmed_goals(answer, result)]
        summary["goal"] = {"is_met": answer.is_met, "num_meeting": answer.num_meeting}
        summary["goal"] |= {"said": lines}
    write_table(trials, directory / PARQUET_NAME)
    if best is not None:
        run.log_artifact(write_best(result, best))
    pictures = _draw(trials, metric, mode, summary["importance"], directory, best)
    write_json(directory / SUMMARY_NAME, summary)
    text = to_markdown(result, summary, ranked, pictures)
    (directory / REPORT_NAME).write_text(text, encoding="utf-8")
    for name in (REPORT_NAME, SUMMARY_NAME, PARQUET_NAME):
        run.log_artifact(directory / name)
    for picture in pictures:
        run.log_artifact(picture, folder="plots")
    if best is not None:
        run.set_tags({"best_trial": str(best.number)})
    return summary


def summarise(result: SweepResult, best: Trial | None) -> dict[str, Any]:
    """Say what a sweep found, as `report.json` holds it; `best` is the trial of `best.yaml`."""
    trials, search = list(result.trials.values()), result.config.search
    metric = next(iter(search.wanted))
    counts = {
        status: sum(trial.status == status for trial in trials)
        for status in ("finished", "stopped", "failed", "running")
    }
    steps = sum(trial.steps_done for trial in trials)
    whole = sum(trial.num_steps for trial in trials if trial.status != "failed")
    training_s = sum(trial.seconds for trial in trials)
    front = finished_front(trials, search.wanted) if len(search.wanted) > 1 else []
    return {
        "schema_version": 1,
        "name": result.config.name,
        "objectives": dict(search.wanted),
        "algorithm": search.chosen_algorithm,
        "scheduler": search.chosen_scheduler,
        "trials": {**counts, "all": len(trials)},
        "steps": {"taken": steps, "of_all_to_the_end": whole},
        "seconds": round(result.seconds, 2),
        "training_seconds": round(training_s, 2),
        "num_concurrent": result.num_concurrent,
        "teachers": {
            key: facts.quality_on(choosing_split(result.config))
            for key, facts in result.teachers.items()
        },
        "best": None if best is None else _entry(best),
        "baseline": _entry(result.trials[BASELINE]) if BASELINE in result.trials else None,
        "chosen_on": choosing_split(result.config),
        "against_baseline": None if best is None else against_baseline(result, best),
        "confirmed": None if result.confirmed is None else asdict(result.confirmed),
        "pareto_front": [trial.number for trial in front],
        # Of a population only the last values are known to a key, and the measure is of them all.
        "importance": {}
        if search.is_population
        else key_importance(trials, metric, result.config.seed),
    }


def against_baseline(result: SweepResult, best: Trial) -> dict[str, Any] | None:
    """Compare the best trial with the recipe as it stands, on the same rows.

    Args:
        result: the sweep.
        best: the trial.

    Returns:
        `metric`, `title` (what people call it) and what `Interval` holds, or why it is
        `undefined`; None where there is no such trial, or the two were measured on other rows.
    """
    from moe_dist.data.metrics import explain_undefined, metric_title
    from moe_dist.errors import CheckpointError
    from moe_dist.jobs.results import PREDICTIONS, load_predictions
    from moe_dist.measure.bootstrap import NO_INTERVAL, paired_bootstrap

    baseline = result.trials.get(BASELINE)
    if baseline is None or baseline.status != "finished" or best.number == BASELINE:
        return None
    try:
        ours, theirs = (
            load_predictions(
                result.files.fetch(
                    training_directory(result.directory / TRIALS_DIRECTORY, trial.number)
                    / PREDICTIONS
                )
            )
            for trial in (best, baseline)
        )
    except CheckpointError:
        return None
    if ours.sample_ids.tolist() != theirs.sample_ids.tolist():
        return None
    metric, space = result.task.main_metric, result.task.label_space
    found = {"metric": metric, "title": metric_title(metric, space)}
    compared = paired_bootstrap(
        metric, ours.labels, ours.logits, theirs.logits, space, seed=result.config.seed
    )
    if compared is not None:
        return found | asdict(compared)
    reasons = [explain_undefined(metric, one.logits, one.labels, space) for one in (ours, theirs)]
    return found | {"undefined": next((why for why in reasons if why), NO_INTERVAL)}


def to_markdown(
    result: SweepResult,
    summary: Mapping[str, Any],
    ranked: Sequence[Trial],
    pictures: Sequence[Path],
) -> str:
    """Write the report for people, in Markdown.

    `ranked` are the whole trials, the best first; the pictures lie beside the report.
    """
    counts, steps = summary["trials"], summary["steps"]
    share = steps["taken"] / steps["of_all_to_the_end"] if steps["of_all_to_the_end"] else 1.0
    lines = [
        f"# Search over {result.config.name}",
        "",
        f"{counts['all']} trials ({summary['algorithm']}, {summary['scheduler']}): "
        f"{counts['finished']} trained to the end, {counts['stopped']} ended early, "
        f"{counts['failed']} failed. {steps['taken']} steps, {100 * share:.0f} % of what all of "
        f"them to the end would take. {duration(summary['seconds'])} in all, "
        f"{duration(summary['training_seconds'])} of trials, up to {summary['num_concurrent']} "
        "at a time.",
        "",
        *(f"{line}\n" for line in verdict_lines(summary)),
        *([f"{result.confirmed}\n"] if result.confirmed is not None else []),
        *table_lines(ranked[:MAX_ROWS], summary),
        "",
        *history_lines(ranked[0] if ranked else None, result.config.search.is_population),
    ]
    if summary["pareto_front"]:
        numbers = ", ".join(str(number) for number in summary["pareto_front"])
        names = " and ".join(summary["objectives"])
        lines += [f"Pareto front ({names}): trials {numbers}.", ""]
    failed = [trial for trial in result.trials.values() if trial.status == "failed"]
    if failed:
        lines += ["Failed:", ""]
        lines += [f"- trial {trial.number}: {trial.message}" for trial in failed]
        lines.append("")
    lines += [f"![{PICTURES[picture.name]}]({picture.name})\n" for picture in pictures]
    lines.append(
        "One training run stands behind each trial; the interval of the best is from a paired "
        f"bootstrap over the {ROWS[summary['chosen_on']]}, on which it was chosen, so it is no "
        "unbiased estimate of new rows."
    )
    if summary["chosen_on"] != "dev":
        lines.append(f"\n{dev_words(summary)}")
    return "\n".join(lines) + "\n"


def verdict_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say which trial is best, and what it is worth."""
    best, metric = summary["best"], next(iter(summary["objectives"]))
    if "goal" in summary:
        return list(summary["goal"]["said"])
    if best is None:
        return ["No trial was trained to the end, so there is no best one."]
    if best["trial"] == BASELINE:
        return [
            f"The recipe as it stands is the best ({metric} {best['metrics'][metric]:.4f}): no "
            "trial beat it."
        ]
    lines = [f"Best: trial {best['trial']}, {metric} {best['metrics'][metric]:.4f}."]
    versus = summary["against_baseline"]
    if versus is not None and "undefined" in versus:
        lines.append(
            f"It cannot be compared with the recipe as it stands: {versus['title']} is undefined: "
            f"{versus['undefined']}."
        )
    elif versus is not None:
        surely = "it cannot be told apart from"
        if versus["low"] > 0 or versus["high"] < 0:
            is_ahead = (versus["low"] > 0) == METRICS[versus["metric"]].higher_is_better
            surely = "it beats" if is_ahead else "it is worse than"
        difference, low, high = signed(versus["difference"], versus["low"], versus["high"])
        lines.append(
            f"On the {ROWS[summary['chosen_on']]} {surely} the recipe as it stands "
            f"({versus['title']} {difference}, "
            f"{round(100 * versus['confidence'])} % interval {low} to {high})."
        )
    return lines


def _confirmed_goals(answer: Answer, result: SweepResult) -> list[str]:
    """Say whether the goals hold with other seeds, where these measured them."""
    found = result.confirmed
    if found is None:
        return []
    mean = fmean(found.best_values)
    return [
        f"With other seeds and on the dev rows its {found.metric} is {mean:.4f}: {goal} is "
        f"{'kept' if goal.is_met({found.metric: mean}) else 'not kept'}."
        for goal in answer.goals
        if goal.metric == found.metric
    ]


def dev_words(summary: Mapping[str, Any]) -> str:
    """Say what the dev rows were used for, where trials were chosen on other rows."""
    if summary["confirmed"] is not None:
        return "The dev rows had no part in the choice; they judged the seeds alone."
    return "The dev rows judged no trial; `moe-dist compress best.yaml` measures on them."


def table_lines(trials: Sequence[Trial], summary: Mapping[str, Any]) -> list[str]:
    """Lay trials out as a Markdown table, in their order."""
    names = sorted({name for trial in trials for name in trial.overrides})
    measures = [*summary["objectives"]]
    measures += [n for n in ("retention", "flops", "active_parameters") if n not in measures]
    weights = ["weights"] if any(map(took_over_weights, trials)) else []
    heads = ["trial", *measures, *(name.rpartition(".")[2] for name in names), *weights, "time"]
    rows = []
    for trial in trials:
        cells = [shown(name, trial.value(name)) for name in measures]
        cells += [_plain(trial.overrides.get(name)) for name in names]
        cells += [history_words(trial) for _ in weights]
        who = "as it stands" if trial.number == BASELINE else str(trial.number)
        rows.append([who, *cells, duration(trial.seconds)])
    return markdown_table(heads, rows)


def _entry(trial: Trial) -> dict[str, Any]:
    history = [asdict(segment) for segment in trial.weight_history]
    return {
        "trial": trial.number,
        "overrides": trial.overrides,
        **({"weight_history": history} if took_over_weights(trial) else {}),
        "metrics": trial.metrics,
        "status": trial.status,
        "steps": trial.steps_done,
        "seconds": round(trial.seconds, 3),
    }


def _draw(
    trials: Sequence[Trial],
    metric: str,
    mode: str,
    importance: Mapping[str, float],
    directory: Path,
    best: Trial | None,
) -> list[Path]:
    if not any(trial.reports for trial in trials):
        return []
    pictures = [plot_parallel(trials, metric, directory / "parallel.png")]
    if importance:
        path = directory / "importance.png"
        pictures.append(plot_importance_of_keys(importance, metric, path))
    costs = [
        name
        for name in ("flops", "latency")
        if name != metric and any(not math.isnan(trial.value(name)) for trial in trials)
    ]
    if costs:
        path = directory / "pareto.png"
        pictures.append(plot_fronts(trials, metric, costs, path, maximise=mode == "max"))
    number = None if best is None else best.number
    pictures.append(plot_curves(trials, metric, directory / "curves.png", best=number))
    return pictures


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
