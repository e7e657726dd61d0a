"""evaluate: teacher and students on the dev split, and what each of them costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import DataError

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from ..report.cost import (
    LATENCY_BATCH_SIZES,
    LATENCY_REPEATS,
    LATENCY_ROUNDS,
    LATENCY_SEQ_LEN,
    count_reads,
    describe_cost,
    describe_other_work,
    describe_timing,
    form_settings,
    measure_forms,
    time_eager,
)
from ..report.nearness import (
    MAX_SAMPLES,
    MEASURES,
    count_batches,
    describe_imitation,
    measure_imitation,
    save_imitation,
)
from ..report.quality import (
    Answers,
    TaskAnswers,
    common_unit,
    compare_students,
    describe_classes,
    describe_tasks,
    measure_quality,
)
from . import adapt, distill, finetune_teacher
from .writers import restore_written, write_as_measured

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.loaders import Encoded
    from moe_dist.jobs.job_data import AnyJobData, Measured, Predict
    from moe_dist.measure.evaluation import Predictions
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
METRIC_RULES = 2
"""Raised when a metric is measured otherwise, so that no earlier value stands beside a new one."""


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Measure quality and cost of all models of the chain.

    Inputs must hold the teacher, and the adapted and distilled models of the main student and
    of each comparison that is to be measured. Returns `predictions`, with the figures of each
    model in `details`. Of each that writes texts `models/NAME` lies beside them
    (`write_as_measured`); they are no outputs, since they can be written without measuring anew.
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
            finals = final_models(loaded)
            eager = time_eager(finals, seq_len, stage)
            beside = describe_other_work(other_work())
        costs = describe_cost(finals, seq_len, eager)
        kinds = [part.task.task_kind for part in workspace.rows.parts.values()]
        timing = describe_timing(kinds, seq_len, config.evaluate.forms)
        forms, speeds = measure_forms(finals, STUDENT, stage, eager, timing)
        for further in (costs, forms, count_reads(finals, loads, seq_len)):
            for name, cost in further.items():
                entries[name] |= cost
        main_metric = workspace.rows.main_metric
        write_as_measured(finals, models, workspace, stage.directory)
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
                "differences": compare_students(answers, STUDENT, main_metric, config.seed),
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
                "other_work": beside,
                "speeds": speeds | {"other_work": speeds["other_work"] or beside},
            }
            | describe_classes(answers)
            | describe_tasks(answers, STUDENT, config.seed),
            plots=draw_loads(loads, stage.directory),
        )

    result = execute(
        NAME,
        settings={
            "seed": config.seed,
            "max_length": config.model.max_length,
            "latency": [LATENCY_BATCH_SIZES, seq_len, LATENCY_ROUNDS, LATENCY_REPEATS],
            "forms": form_settings(config.evaluate.forms),
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
    if result.skipped:
        restore_written(result, final_models(models), inputs.workspace)
    return result


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
    num_steps = len(loaded) + count_batches(data, batch_size)

    def advance() -> None:
        stage.console.progress(next(steps), num_steps)

    imitation, answered = measure_imitation(
        loaded, data, teacher=TEACHER, batch_size=batch_size, advance=advance
    )

    def ask(name: str, encoded: Encoded, *, options: Mapping[str, Any]) -> Predictions:
        for task, part in data.parts.items():
            if task in answered and encoded is part.dev:
                return answered[task][name]
        model = loaded[name]
        return predict(
            model,
            encoded,
            batch_size=batch_size,
            pad_token_id=data.pad_token_id,
            device=next(model.parameters()).device,
            options=options,
        )

    measured: dict[int, Measured] = {}
    for name, model in loaded.items():
        if id(model) not in measured:
            measured[id(model)] = run_over_dev(name, data, partial(ask, name))
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


def _comparisons(inputs: StageInputs) -> list[str]:
    prefix = f"{distill.NAME}/"
    return [key.removeprefix(prefix) for key in inputs.upstream if key.startswith(prefix)]


def _model(result: StageResult) -> tuple[Path, str]:
    return result.outputs["model"], result.digests["model"]
