"""What must hold after a run, whatever was done to it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_dist.inference.saving import load_model
from moe_dist.metric_log import MetricLog
from tests.chaos.recipe import CHECKPOINT_EVERY
from tests.chaos.testbeds import wait_until_clean

if TYPE_CHECKING:
    from tests.chaos.run import Run
    from tests.chaos.scenario import Incident
    from tests.chaos.trace import Attempt

LOSS = "train/loss/total"
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What an undisturbed run gave, and what others must give.

    Args:
        weights: of the distilled model, by name.
        losses: by step.
        samples: ids by step and rank.
    """

    weights: dict[str, Tensor]
    losses: dict[int, float]
    samples: dict[tuple[int, int], list[int]]


def read_outcome(run: Run) -> Outcome:
    """Read what a finished run gave."""
    samples: dict[tuple[int, int], list[int]] = {}
    for attempt in run.trace():
        samples |= {(step, attempt.rank): ids for step, ids in attempt.samples.items()}
    weights = load_model(run.stage_directory / "model").state_dict()
    return Outcome(weights, dict(_logged(run)), samples)


def find_problems(
    run: Run, incidents: list[Incident], expected: Outcome, num_steps: int
) -> list[str]:
    """Check a run that has ended.

    Args:
        run: the run.
        incidents: what was done to it.
        expected: the undisturbed run's outcome.
        num_steps: of the recipe.

    Returns:
        A sentence for each thing that is wrong.
    """
    finished = json.loads((run.stage_directory / "stage.json").read_text(encoding="utf-8"))
    problems = []
    if finished["details"]["num_steps"] != num_steps:
        problems.append(f"{finished['details']['num_steps']} steps of {num_steps}")
    outcome = read_outcome(run)
    problems += weight_problems(outcome.weights, expected.weights)
    problems += axis_problems("metrics.jsonl", _logged(run), expected.losses)
    problems += course_problems(run.trace(), incidents, expected, num_steps)
    problems += tracking_problems(run.testbed.store, run.name, expected.losses)
    problems += [f"left behind: {what}" for what in wait_until_clean(run.testbed)]
    return problems


def weight_problems(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Compare weights; they may differ by rounding at most."""
    if weights.keys() != expected.keys():
        return ["the model has other tensors"]
    distance = max(float((weights[name] - expected[name]).abs().max()) for name in weights)
    return [f"weights differ by {distance:.2e}"] if not distance <= TOLERANCE else []


def axis_problems(
    where: str, points: list[tuple[int, float]], expected: dict[int, float]
) -> list[str]:
    """Compare a curve with the undisturbed one: every step once, the same values."""
    counts = Counter(step for step, _ in points)
    doubled = sorted(step for step, count in counts.items() if count > 1)
    missing = sorted(expected.keys() - counts.keys())
    surplus = sorted(counts.keys() - expected.keys())
    problems = [
        f"{where} has {word} steps {steps}"
        for word, steps in (("doubled", doubled), ("missing", missing), ("surplus", surplus))
        if steps
    ]
    off = [
        step
        for step, value in points
        if step in expected and not abs(value - expected[step]) <= TOLERANCE
    ]
    return [*problems, f"{where} has other losses at {off}"] if off else problems


def course_problems(
    attempts: list[Attempt], incidents: list[Incident], expected: Outcome, num_steps: int
) -> list[str]:
    """Check that each step was taken on its own data, and restarts began at a checkpoint."""
    problems = []
    trained: dict[tuple[int, int], list[int]] = {}
    for attempt in attempts:
        steps = attempt.steps
        if not steps:
            continue
        if steps != list(range(steps[0], steps[0] + len(steps))):
            problems.append(f"rank {attempt.rank} took the steps {steps}")
        taken = max((step for step, rank in trained if rank == attempt.rank), default=0)
        allowed = _resumable(attempt, incidents, taken=taken)
        # A later attempt's steps replace those that it repeats.
        later = [key for key in trained if key[1] == attempt.rank and key[0] >= steps[0]]
        for key in later:
            del trained[key]
        trained |= {(step, attempt.rank): ids for step, ids in attempt.samples.items()}
        if steps[0] - 1 not in allowed:
            problems.append(
                f"rank {attempt.rank} went on from step {steps[0] - 1}, not from {sorted(allowed)}"
            )
        wrong = [s for s in steps if attempt.samples[s] != expected.samples.get((s, attempt.rank))]
        if wrong:
            problems.append(f"rank {attempt.rank} had other samples in the steps {wrong}")
    ranks = {rank for _, rank in expected.samples}
    lost = [s for s in range(1, num_steps + 1) if any((s, rank) not in trained for rank in ranks)]
    return [*problems, f"the steps {lost} are missing"] if lost else problems


def tracking_problems(store: str, experiment: str, expected: dict[int, float]) -> list[str]:
    """Check that MLflow has one chain, one stage in it, and every step of it once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return ["MLflow has no such experiment"]
    runs = client.search_runs([found.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    problems = []
    if len(runs) != 2 or len(children) != 1:
        problems.append(f"MLflow has {len(runs)} runs, {len(children)} of them stages")
    unfinished = [run.info.status for run in runs if run.info.status != "FINISHED"]
    problems += [f"MLflow has a run that is {status}" for status in unfinished]
    for child in children:
        history = client.get_metric_history(child.info.run_id, LOSS)
        points = [(int(point.step), float(point.value)) for point in history]
        problems += axis_problems("MLflow", points, expected)
    return problems


def _resumable(attempt: Attempt, incidents: list[Incident], *, taken: int) -> set[int]:
    before = [incident for incident in incidents if incident.struck < attempt.began]
    if not before:
        return {0}
    # Whoever loses its raylet goes on for a moment, and may complete one checkpoint more.
    known = before[-1].resumable
    later = {step for step in range(max(known), taken + 1) if step % CHECKPOINT_EVERY == 0}
    return known | later


def _logged(run: Run) -> list[tuple[int, float]]:
    records: list[Any] = MetricLog(run.stage_directory / "metrics.jsonl").read()
    return [(record.step, record.metrics[LOSS]) for record in records if LOSS in record.metrics]
