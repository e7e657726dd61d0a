"""evaluate: teacher and students on the dev split, and what each of them costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import DataError
from moe_dist.whole_files import finite

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from ..report.nearness import (
    MAX_SAMPLES,
    MEASURES,
    Imitation,
    count_batches,
    describe_imitation,
    measure_imitation,
    save_imitation,
)
from . import adapt, distill, finetune_teacher

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.metrics import LabelSpace
    from moe_dist.jobs.job_data import AnyJobData, Measured, Predict
    from moe_dist.measure.bootstrap import Pairing
    from moe_dist.measure.latency import Latency, Rounds
    from moe_dist.tracking import TrackedRun

    from ..chain.workspace import Workspace

NAME = "evaluate"
TEACHER = "teacher"
STUDENT = "student"
PREDICTIONS = "predictions"
BEFORE = "before_distillation"
PREDICT_BATCH_SIZE = 64
PREDICT_BATCH_TOKENS = 8192
"""Two models' hidden states of all layers are held for so many tokens."""
LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 10
MIN_LATENCY_ROUNDS = 3
LATENCY_BUDGET_S = 20.0
LATENCY_REPEATS = 2
METRIC_RULES = 2
"""Raised when a metric is measured otherwise, so that no earlier value stands beside a new one."""


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Measure quality and cost of all models of the chain.

    Inputs must hold the teacher, and the adapted and distilled models of the main student and
    of each comparison that is to be measured. Returns `predictions`, with the figures of each
    model in `details`.
    """
    models = model_directories(inputs)
    seq_len = min(LATENCY_SEQ_LEN, config.model.max_length)

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.measure.latency import watch_other_work

        workspace = inputs.workspace
        for path, _ in models.values():
            workspace.files.fetch(path)
        loaded = load_all(models, use_gpu=config.parallel.use_gpu)
        answers = predict_all(loaded, models, workspace, stage)
        loads = answers.expert_loads
        entries = measure_quality(answers)
        for name, found in answers.calibrations.items():
            model, _, before = name.partition("/")
            entries[model]["_".join(filter(None, ("calibrations", before)))] = found
        for name, lines in answers.remarks.items():
            model, _, before = name.partition("/")
            entries[model]["_".join(filter(None, ("remarks", before)))] = lines
        for name, found in answers.gates.items():
            entries[name]["gates"] = found
        near, differences = describe_imitation(answers.imitation, STUDENT, BEFORE)
        save_imitation(answers.imitation, stage.directory / PREDICTIONS)
        for name, found in near.items():
            entries[name] |= found
        with watch_other_work() as other_work:
            for name, cost in measure_cost(final_models(loaded), seq_len, stage).items():
                entries[name] |= cost
            beside = other_work()
        main_metric = workspace.rows.main_metric
        metrics = {
            f"{name}/{metric}": value
            for name, entry in entries.items()
            for metric, value in entry["metrics"].items()
            if value is not None
        }
        stage.run.log_metrics(0, metrics)
        return StageOutcome(
            outputs={"predictions": stage.directory / PREDICTIONS},
            metrics=metrics,
            details={
                "main_metric": main_metric,
                "metric_titles": workspace.rows.metric_titles,
                "higher_is_better": workspace.rows.higher_is_better,
                "num_dev_samples": sum(len(task.labels) for task in answers.tasks.values()),
                "unit": common_unit(answers),
                "distances": sorted(
                    {part.task.task_kind.distance for part in workspace.rows.parts.values()}
                ),
                "seq_len": seq_len,
                "models": entries,
                "differences": compare_students(answers, main_metric, config.seed),
                "imitation_differences": differences,
                "data": {
                    "name": workspace.data_name,
                    "digest": workspace.rows.digest,
                    "summaries": {
                        task: summary.as_record() for task, summary in workspace.summaries.items()
                    },
                },
                "expert_loads": loads,
                "num_threads": answers.num_threads,
                "other_work": {
                    "num_cores": beside.num_cores,
                    "busy_cores": round(beside.busy_cores, 2),
                    "disturbs": beside.disturbs(answers.num_threads),
                },
            }
            | describe_classes(answers)
            | describe_tasks(answers, config.seed),
            plots=draw_loads(loads, stage.directory),
        )

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "max_length": config.model.max_length,
            "latency": [LATENCY_BATCH_SIZES, seq_len, LATENCY_ROUNDS, LATENCY_REPEATS],
            "imitation": [*MEASURES, MAX_SAMPLES],
            "metric_rules": METRIC_RULES,
        },
        input_digests={
            "data": inputs.workspace.rows.digest,
            **{name: digest for name, (_, digest) in models.items()},
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )


def model_directories(inputs: StageInputs) -> dict[str, tuple[Path, str]]:
    """Give directory and digest of each model to measure.

    Names are `teacher`, `student`, each comparison's label, and `NAME/before_distillation`, which
    is the same model where it was not trained.
    """
    found = {TEACHER: _model(inputs.result(finetune_teacher.NAME))}
    for label in ("", *_comparisons(inputs)):
        own = StageInputs(inputs.workspace, inputs.upstream, label)
        name = label or STUDENT
        trained = own.result(distill.NAME)
        found[name] = _model(trained)
        is_kept = trained.details["num_steps"] == 0
        found[f"{name}/{BEFORE}"] = found[name] if is_kept else _model(own.result(adapt.NAME))
    return found


def final_models(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the students that have not been trained: they cost what trained ones cost."""
    return {name: value for name, value in loaded.items() if not name.endswith(f"/{BEFORE}")}


def load_all(
    models: Mapping[str, tuple[Path, str]], *, use_gpu: bool | str = "auto"
) -> dict[str, Any]:
    """Load every model once for evaluation, on a GPU where this process has one and may use it.

    `use_gpu` is the recipe's; this process may lack what the workers have.
    """
    import torch

    from moe_dist.inference import load_model

    device = "cuda" if use_gpu is not False and torch.cuda.is_available() else "cpu"
    loaded = {
        path: load_model(path, device=device) for path in {path for path, _ in models.values()}
    }
    return {name: loaded[path] for name, (path, _) in models.items()}


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
        gates: for each final model with learned gates, how they decide; see `describe_gates`.
    """

    tasks: dict[str, TaskAnswers]
    imitation: Imitation
    expert_loads: dict[str, dict[str, list[float]]]
    num_threads: int
    calibrations: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)


def predict_all(
    loaded: Mapping[str, Any],
    models: Mapping[str, tuple[Path, str]],
    workspace: Workspace,
    stage: StageWork,
) -> Answers:
    """Run every model over the dev rows, and keep what they say."""
    import torch

    from moe_dist.data.loaders import bounded_batch
    from moe_dist.inference.saving import load_tokenizer
    from moe_dist.jobs.job_data import job_data
    from moe_dist.measure.evaluation import expert_load, gate_entropy, predict

    tokenizer = load_tokenizer(models[TEACHER][0])
    data = job_data(workspace.rows, tokenizer, max_length=workspace.config.model.max_length)
    tasks = {
        name: TaskAnswers(
            part.splits.task.metrics,
            part.splits.task.label_space,
            unit=part.splits.task.task_kind.unit,
        )
        for name, part in data.parts.items()
    }
    loads: dict[str, dict[str, list[float]]] = {}
    calibrations: dict[str, dict[str, float]] = {}
    remarks: dict[str, list[str]] = {}
    gates: dict[str, dict[str, Any]] = {}
    steps = itertools.count(1)
    batch_size = bounded_batch(
        PREDICT_BATCH_SIZE, workspace.config.model.max_length, PREDICT_BATCH_TOKENS
    )
    num_steps = len(loaded) + count_batches(data, batch_size) + LATENCY_ROUNDS

    def advance() -> None:
        stage.console.progress(next(steps), num_steps)

    measured: dict[int, Measured] = {}
    for name, model in loaded.items():
        answer = partial(
            predict,
            model,
            batch_size=batch_size,
            pad_token_id=data.pad_token_id,
            device=next(model.parameters()).device,
        )
        if id(model) not in measured:
            measured[id(model)] = run_over_dev(name, data, answer)
        found = measured[id(model)]
        for task, part in data.parts.items():
            # Without a task's name it is the directory itself.
            path = stage.directory / PREDICTIONS / task / f"{name.replace('/', '-')}.npz"
            part.save_figures(found.figures[task], path)
            tasks[task].logits[name] = found.figures[task].values
            tasks[task].labels = found.figures[task].labels
            for line in part.remarks(found.figures[task]):
                stage.console.warn(f"{name}: {line}")
                remarks.setdefault(name, []).append(line)
        if found.calibrations:
            calibrations[name] = found.calibrations
        if found.tokens_per_expert and name in final_models(loaded):
            loads[name] = expert_load(found.tokens_per_expert)
            entropies = gate_entropy(found.routing_sums)
            if entropies:
                gates[name] = describe_gates(entropies, loads[name])
        advance()
    imitation = measure_imitation(
        loaded,
        data,
        teacher=TEACHER,
        batch_size=batch_size,
        advance=advance,
    )
    return Answers(tasks, imitation, loads, torch.get_num_threads(), calibrations, remarks, gates)


def describe_gates(
    entropies: Mapping[str, float], loads: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Say how a model's gates decide on the dev rows.

    Args:
        entropies: the mean entropy of each gate, in nats.
        loads: each expert's share of its layer's tokens or merges; layers as in `entropies`.

    Returns:
        `entropy` by gate, their mean (`mean_entropy`) and the most that it could be
        (`max_entropy`), and the busiest expert's load over the mean of the worst gate
        (`worst_load_imbalance`).
    """
    most = [math.log(len(loads[name])) for name in entropies]
    return {
        "entropy": dict(entropies),
        "mean_entropy": sum(entropies.values()) / len(entropies),
        "max_entropy": sum(most) / len(most),
        "worst_load_imbalance": max(max(loads[name]) * len(loads[name]) for name in entropies),
    }


def run_over_dev(name: str, data: AnyJobData, answer: Predict) -> Measured:
    """Run a model over the dev rows; a DataError names it if its answers cannot be measured."""
    from moe_dist.jobs.job_data import measure

    try:
        return measure(data, answer)
    except DataError as error:
        raise DataError(f"{name}: {error.message}", remedy=error.remedy) from error


def draw_loads(loads: Mapping[str, Mapping[str, list[float]]], directory: Path) -> tuple[Path, ...]:
    """Draw each model's expert load on the dev split."""
    from ..report.plots import plot_expert_load

    return tuple(
        plot_expert_load(by_layer, directory / f"expert-load-{name}.png")
        for name, by_layer in loads.items()
    )


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


def measure_cost(
    loaded: Mapping[str, Any], seq_len: int, stage: StageWork
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and time all models in turn in this process.

    Args:
        loaded: model by name.
        seq_len: tokens per sequence.
        stage: the stage that asks.

    Returns:
        For each model `shape`, `parameters`, `flops_per_token`, `ffn_flops_per_token`, and by batch
        size `latency_ms` (the median), `latency_low_ms` and `latency_spread`.
    """
    from moe_dist.measure.latency import measure_in_turn
    from moe_dist.measure.profile import count_parameters, flops_per_token, model_shape

    timed = measure_in_turn(
        loaded,
        latency_rounds(),
        batch_sizes=LATENCY_BATCH_SIZES,
        seq_len=seq_len,
        progress=stage.console.progress,
    )
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "shape": model_shape(model),
            "parameters": {"total": parameters.total, "active": parameters.active},
            "flops_per_token": flops.total,
            "ffn_flops_per_token": flops.ffn,
            "latency_ms": _by_size(timed[name], "median_ms"),
            "latency_low_ms": _by_size(timed[name], "low_ms"),
            "latency_spread": _by_size(timed[name], "spread"),
        }
    return costs


def _by_size(timed: Mapping[int, Latency], figure: str) -> dict[str, float]:
    return {str(size): round(getattr(one, figure), 3) for size, one in timed.items()}


def latency_rounds() -> Rounds:
    """Say how often models are timed for a report."""
    from moe_dist.measure.latency import Rounds

    return Rounds(
        LATENCY_ROUNDS, MIN_LATENCY_ROUNDS, LATENCY_BUDGET_S, LATENCY_REPEATS, num_warmups=1
    )


def compare_students(answers: Answers, metric: str, seed: int) -> dict[str, dict[str, Any]]:
    """Compare the student with teacher and comparisons on the same examples.

    For each other final model the student's metric minus its own, with an interval; where there
    is none, `undefined` says why. The metric is the mean over tasks where there are several.
    """
    from moe_dist.measure.bootstrap import NO_INTERVAL, mean_bootstrap

    names = next(iter(answers.tasks.values())).logits
    # One task of several has its name before the metric's.
    keys = [metric, *(f"{task}/{metric}" for task in answers.tasks)]
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if "/" in name or name == STUDENT:
            continue
        pairings = [task.pairing(STUDENT, name) for task in answers.tasks.values()]
        interval = mean_bootstrap(pairings, seed=seed)
        found[name] = {"metric": metric, "difference": None, "low": None, "high": None}
        if interval is not None:
            found[name] |= asdict(interval)
            continue
        reasons = [undefined_metrics(answers, model) for model in (STUDENT, name)]
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


def describe_tasks(answers: Answers, seed: int) -> dict[str, Any]:
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
                    replace(answers, tasks={name: task}), task.metrics[0], seed
                ),
            }
            for name, task in answers.tasks.items()
        }
    }


def _comparisons(inputs: StageInputs) -> list[str]:
    prefix = f"{distill.NAME}/"
    return [key.removeprefix(prefix) for key in inputs.upstream if key.startswith(prefix)]


def _model(result: StageResult) -> tuple[Path, str]:
    return result.outputs["model"], result.digests["model"]
