"""evaluate: teacher and students on the dev split, and what each of them costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..jobs import run_here
from ..payloads import data_job
from ..stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import adapt, distill, finetune_teacher

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "evaluate"
NEEDS = (finetune_teacher.NAME, adapt.NAME, distill.NAME)
TEACHER = "teacher"
STUDENT = "student"
PREDICTIONS = "predictions"
BEFORE = "before_distillation"
PREDICT_BATCH_SIZE = 64
LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 5
LATENCY_REPEATS = 4


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Measure quality and cost of all models of the chain.

    Args:
        config: the run's configuration.
        inputs: must hold the teacher, and the adapted and distilled models of the main student
            and of each comparison that is to be measured.
        tracker: the chain's run.

    Returns:
        `predictions`, with the figures of each model in `details`.
    """
    models = model_directories(inputs)
    seq_len = min(LATENCY_SEQ_LEN, config.model.max_length)

    def work(stage: StageWork) -> StageOutcome:
        splits = inputs.workspace.splits
        predictions = predict_all(config, models, stage)
        labels = predictions.pop("labels")
        entries = measure_quality(predictions, labels, splits.task.metrics)
        for name, cost in measure_cost(final_models(models), seq_len, stage).items():
            entries[name] |= cost
        differences = compare_students(predictions, labels, splits.task.main_metric, config.seed)
        metrics = {
            f"{name}/{metric}": value
            for name, entry in entries.items()
            for metric, value in entry["metrics"].items()
        }
        stage.run.log_metrics(0, metrics)
        return StageOutcome(
            outputs={"predictions": stage.directory / PREDICTIONS},
            metrics=metrics,
            details={
                "main_metric": splits.task.main_metric,
                "num_dev_samples": len(labels),
                "seq_len": seq_len,
                "models": entries,
                "differences": differences,
                "data": {"name": inputs.workspace.data_name, "digest": splits.digest},
            },
        )

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "max_length": config.model.max_length,
            "latency": [LATENCY_BATCH_SIZES, seq_len, LATENCY_ROUNDS, LATENCY_REPEATS],
        },
        input_digests={
            "data": inputs.workspace.splits.digest,
            **{name: digest for name, (_, digest) in models.items()},
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )


def model_directories(inputs: StageInputs) -> dict[str, tuple[Path, str]]:
    """Find the models to measure.

    Args:
        inputs: what the stage was given.

    Returns:
        Directory and digest by name: `teacher`, `student`, each comparison's label, and for each
        student `NAME/before_distillation`.
    """
    found = {TEACHER: _model(inputs.result(finetune_teacher.NAME))}
    for label in ("", *_comparisons(inputs)):
        own = StageInputs(inputs.workspace, inputs.upstream, label)
        name = label or STUDENT
        found[name] = _model(own.result(distill.NAME))
        found[f"{name}/{BEFORE}"] = _model(own.result(adapt.NAME))
    return found


def final_models(models: Mapping[str, tuple[Path, str]]) -> dict[str, Path]:
    """Leave out the students that have not been trained: they cost what trained ones cost.

    Args:
        models: what `model_directories` found.

    Returns:
        Directory by name.
    """
    return {name: path for name, (path, _) in models.items() if not name.endswith(f"/{BEFORE}")}


def predict_all(
    config: RunConfig, models: Mapping[str, tuple[Path, str]], stage: StageWork
) -> dict[str, Any]:
    """Run every model over the dev split.

    Args:
        config: the run's configuration.
        models: what `model_directories` found.
        stage: the stage that asks.

    Returns:
        `labels` (N,), and for each model its outputs (N, C).
    """
    from moe_dist.training.jobs import predict_job

    results: dict[str, Any] = {}
    for done, (name, (path, _)) in enumerate(models.items()):
        stage.console.progress(done, len(models))
        payload = {
            **data_job(config, stage.directory / PREDICTIONS),
            "model": str(path),
            "split": "dev",
            "batch_size": PREDICT_BATCH_SIZE,
            "output_name": name.replace("/", "-"),
        }
        output = run_here(predict_job, payload)
        results.setdefault("labels", output["labels"])
        results[name] = output["predictions"]
    stage.console.progress(len(models), len(models))
    return results


def measure_quality(
    predictions: Mapping[str, Any], labels: Any, metrics: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Compute the dev metrics of each model.

    Args:
        predictions: outputs by model name.
        labels: the dev labels.
        metrics: names, the main one first.

    Returns:
        For each final model `metrics`, and for students `metrics_before_distillation`.
    """
    from moe_dist.data.metrics import compute_metrics

    entries: dict[str, dict[str, Any]] = {}
    for name, outputs in predictions.items():
        owner, _, before = name.partition("/")
        key = f"metrics_{before}" if before else "metrics"
        entries.setdefault(owner, {})[key] = compute_metrics(metrics, outputs, labels)
    return entries


def measure_cost(
    models: Mapping[str, Path], seq_len: int, stage: StageWork
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and time all models in turn in this process.

    Args:
        models: directory by name.
        seq_len: tokens per sequence.
        stage: the stage that asks.

    Returns:
        For each model `parameters`, `flops_per_token`, `ffn_flops_per_token` and `latency_ms`.
    """
    from moe_dist.inference import load_model
    from moe_dist.inference.latency import measure_latency
    from moe_dist.inference.profile import count_parameters, flops_per_token

    loaded = {name: load_model(path) for name, path in models.items()}
    medians: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in LATENCY_BATCH_SIZES} for name in loaded
    }
    # One round of every model after the other: a busy machine slows them alike.
    for done in range(LATENCY_ROUNDS):
        stage.console.progress(done, LATENCY_ROUNDS)
        for name, model in loaded.items():
            timed = measure_latency(
                model,
                batch_sizes=LATENCY_BATCH_SIZES,
                seq_len=seq_len,
                repeats=LATENCY_REPEATS,
            )
            for size, latency in timed.items():
                medians[name][size].append(latency.median_ms)
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "parameters": {"total": parameters.total, "active": parameters.active},
            "flops_per_token": flops.total,
            "ffn_flops_per_token": flops.ffn,
            "latency_ms": {
                str(size): round(statistics.median(values), 3)
                for size, values in medians[name].items()
            },
        }
    return costs


def compare_students(
    predictions: Mapping[str, Any], labels: Any, metric: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Compare the student with teacher and comparisons on the same examples.

    Args:
        predictions: outputs by model name.
        labels: the dev labels.
        metric: the main metric.
        seed: of the bootstrap.

    Returns:
        For each other final model the student's metric minus its own, with an interval.
    """
    from moe_dist.data.metrics import paired_bootstrap

    others = [name for name in predictions if "/" not in name and name != STUDENT]
    return {
        name: {
            "metric": metric,
            **asdict(
                paired_bootstrap(metric, labels, predictions[STUDENT], predictions[name], seed=seed)
            ),
        }
        for name in others
    }


def _comparisons(inputs: StageInputs) -> list[str]:
    prefix = f"{distill.NAME}/"
    return [key.removeprefix(prefix) for key in inputs.upstream if key.startswith(prefix)]


def _model(result: StageResult) -> tuple[Path, str]:
    return result.outputs["model"], result.digests["model"]
