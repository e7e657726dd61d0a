"""What models are worth by their answers on dev rows: metrics, and differences with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_dist.whole_files import finite

if TYPE_CHECKING:
    from moe_dist.data.metrics import LabelSpace
    from moe_dist.measure.bootstrap import Pairing

    from .nearness import Imitation


@dataclass
class TaskAnswers:
    """What all models say about one task's dev rows.

    Attributes:
        metrics: names, the main one first.
        space: the task's classes.
        labels: (N,); the same for every model.
        logits: (N, C) by model name, or other figures of each unit.
        unit: what each of the N is.
    """

    metrics: tuple[str, ...]
    space: LabelSpace
    labels: Any = ()
    logits: dict[str, Any] = field(default_factory=dict)
    unit: str = "sample"

    def pairing(self, first: str, second: str) -> Pairing:
        """Put two models' answers side by side for the main metric, the first minus the second."""
        from moe_dist.measure.bootstrap import Pairing

        return Pairing(
            self.metrics[0], self.labels, self.logits[first], self.logits[second], self.space
        )

    def undefined(self, name: str) -> dict[str, str]:
        """Say which metrics of a model have no value, and why: a clause by metric."""
        from moe_dist.data.metrics import explain_undefined

        said = {
            metric: explain_undefined(metric, self.logits[name], self.labels, self.space)
            for metric in self.metrics
        }
        return {metric: why for metric, why in said.items() if why is not None}


@dataclass(frozen=True)
class Answers:
    """What all models say about the dev rows.

    Attributes:
        tasks: by task name; the one name "" where there is one task.
        imitation: how near each student is to the teacher.
        expert_loads: for each final model with experts, each expert's share by layer.
        num_threads: CPU threads that torch used.
        calibrations: by model and task what answers were read with; see `TaskKind.calibrate`.
        remarks: by model what its answers show that no metric does; see `TaskKind.remarks`.
    """

    tasks: dict[str, TaskAnswers]
    imitation: Imitation
    expert_loads: dict[str, dict[str, list[float]]]
    num_threads: int
    calibrations: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)


def measure_quality(answers: Answers) -> dict[str, dict[str, Any]]:
    """Compute the dev metrics of each model.

    For each final model `metrics`, and for students `metrics_before_distillation`; None for a
    metric that is undefined, with the reason under the same name in `undefined` and
    `undefined_before_distillation`.
    """
    from moe_dist.data.metrics import compute_metrics
    from moe_dist.data.mixture import joined_metrics

    entries: dict[str, dict[str, Any]] = {}
    for name in next(iter(answers.tasks.values())).logits:
        owner, _, before = name.partition("/")
        key = f"metrics_{before}" if before else "metrics"
        by_task = {
            task: compute_metrics(own.metrics, own.logits[name], own.labels, own.space)
            for task, own in answers.tasks.items()
        }
        entry = entries.setdefault(owner, {})
        entry[key] = finite(joined_metrics(by_task))
        if reasons := undefined_metrics(answers, name):
            entry[key.replace("metrics", "undefined")] = reasons
    return entries


def undefined_metrics(answers: Answers, name: str) -> dict[str, str]:
    """Say why metrics of a model have no value, by the name that `joined_metrics` gives them."""
    from moe_dist.data.metrics import metric_title
    from moe_dist.data.mixture import MEAN

    found: dict[str, str] = {}
    for task, own in answers.tasks.items():
        reasons = own.undefined(name)
        for metric, why in reasons.items():
            place = f"{task}/" if task else ""
            title = metric_title(metric, own.space)
            found[f"{place}{metric}"] = f"{place}{title} of {name} is undefined: {why}"
        if task and own.metrics[0] in reasons:
            found.setdefault(MEAN, f"{MEAN} of {name} is undefined: {task}/{own.metrics[0]} is")
    return found


def compare_students(
    answers: Answers, student: str, metric: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Compare the model called `student` with the other final ones on the same examples.

    For each of these the student's metric minus its own, with an interval; where there
    is none, `undefined` says why. The metric is the mean over tasks where there are several.
    """
    from moe_dist.measure.bootstrap import NO_INTERVAL, mean_bootstrap

    names = next(iter(answers.tasks.values())).logits
    # One task of several has its name before the metric's.
    keys = [metric, *(f"{task}/{metric}" for task in answers.tasks)]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if "/" in name or name == student:
            continue
        pairings = [task.pairing(student, name) for task in answers.tasks.values()]
        interval = mean_bootstrap(pairings, seed=seed)
        found[name] = {"metric": metric, "difference": None, "low": None, "high": None}
        if interval is not None:
            found[name] |= asdict(interval)
            continue
        reasons = [undefined_metrics(answers, model) for model in (student, name)]
        found[name]["undefined"] = next(
            (why[key] for why in reasons for key in keys if key in why), NO_INTERVAL
        )
    return found


def common_unit(answers: Answers) -> str:
    """Say what an interval resamples, in a word for all tasks."""
    units = {task.unit for task in answers.tasks.values()}
    return units.pop() if len(units) == 1 else "sample"


def describe_classes(answers: Answers) -> dict[str, Any]:
    """Say what the one task's answers consist of, so that they can be measured again.

    `classes`, with their `names` and the id of the `positive` one of two; or the `columns` of
    figures; nothing for regression and several tasks.
    """
    space = answers.tasks[""].space if set(answers.tasks) == {""} else None
    if space is not None and space.columns:
        return {"columns": list(space.columns)}
    if space is None or space.num_classes is None:
        return {}
    return {"classes": {"names": list(space.names), "positive": space.positive}}


def describe_tasks(answers: Answers, student: str, seed: int) -> dict[str, Any]:
    """Say for each of several tasks what it is measured by, and how the student stands there.

    `tasks`, with `main_metric`, `higher_is_better`, `num_dev_samples`, `unit` and `differences` of
    each; nothing for a run of one task.
    """
    from moe_dist.data.metrics import METRICS, metric_title

    if set(answers.tasks) == {""}:
        return {}
    return {
        "tasks": {
            name: {
                "main_metric": task.metrics[0],
                "higher_is_better": METRICS[task.metrics[0]].higher_is_better,
                **describe_classes(replace(answers, tasks={"": task})),
                "metric_titles": {key: metric_title(key, task.space) for key in task.metrics},
                "num_dev_samples": len(task.labels),
                "unit": task.unit,
                "differences": compare_students(
                    replace(answers, tasks={name: task}), student, task.metrics[0], seed
                ),
            }
            for name, task in answers.tasks.items()
        }
    }
