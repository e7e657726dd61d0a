"""evaluate: teacher and students on the dev split, and what each of them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import adapt, distill, finetune_teacher

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

    from ..workspace import Workspace

NAME = "evaluate"
NEEDS = (finetune_teacher.NAME, adapt.NAME, distill.NAME)
TEACHER = "teacher"
STUDENT = "student"
PREDICTIONS = "predictions"
BEFORE = "before_distillation"
PREDICT_BATCH_SIZE = 64
LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 10
MIN_LATENCY_ROUNDS = 3
LATENCY_BUDGET_S = 20.0
LATENCY_REPEATS = 2


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
        workspace = inputs.workspace
        task = workspace.splits.task
        for path, _ in models.values():
            workspace.files.fetch(path)
        loaded = load_all(models, use_gpu=config.parallel.use_gpu)
        answers = predict_all(loaded, models, workspace, stage)
        labels, loads = answers.labels, answers.expert_loads
        entries = measure_quality(answers.logits, labels, task.metrics)
        for name, cost in measure_cost(final_models(loaded), seq_len, stage).items():
            entries[name] |= cost
        differences = compare_students(answers.logits, labels, task.main_metric, config.seed)
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
                "main_metric": task.main_metric,
                "num_dev_samples": len(labels),
                "seq_len": seq_len,
                "models": entries,
                "differences": differences,
                "data": {"name": workspace.data_name, "digest": workspace.splits.digest},
                "expert_loads": loads,
                "num_threads": answers.num_threads,
            },
            plots=draw_loads(loads, stage.directory),
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


def final_models(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the students that have not been trained: they cost what trained ones cost.

    Args:
        loaded: a value for each name of `model_directories`.

    Returns:
        Value by name.
    """
    return {name: value for name, value in loaded.items() if not name.endswith(f"/{BEFORE}")}


def load_all(
    models: Mapping[str, tuple[Path, str]], *, use_gpu: bool | str = "auto"
) -> dict[str, Any]:
    """Load every model, on a GPU where this process has one and may use it.

    Args:
        models: what `model_directories` found.
        use_gpu: the recipe's `parallel.use_gpu`; this process may lack what the workers have.

    Returns:
        Model by name, in evaluation mode.
    """
    import torch

    from moe_dist.inference import load_model

    device = "cuda" if use_gpu is not False and torch.cuda.is_available() else "cpu"
    return {name: load_model(path, device=device) for name, (path, _) in models.items()}


@dataclass(frozen=True)
class Answers:
    """What all models say about the dev split.

    Attributes:
        labels: (N,).
        logits: (N, C) by model name.
        expert_loads: for each final model with experts, each expert's share by layer.
        num_threads: CPU threads that torch used.
    """

    labels: Any
    logits: dict[str, Any]
    expert_loads: dict[str, dict[str, list[float]]]
    num_threads: int


def predict_all(
    loaded: Mapping[str, Any],
    models: Mapping[str, tuple[Path, str]],
    workspace: Workspace,
    stage: StageWork,
) -> Answers:
    """Run every model over the dev split, and keep what they say.

    Args:
        loaded: model by name.
        models: what `model_directories` found.
        workspace: holds the data.
        stage: the stage that asks.

    Returns:
        Labels, outputs and expert loads.
    """
    import torch

    from moe_dist.inference.saving import load_tokenizer
    from moe_dist.training.evaluation import expert_load, predict
    from moe_dist.training.results import save_predictions

    splits = workspace.splits
    tokenizer = load_tokenizer(models[TEACHER][0])
    encoded = workspace.encoded("dev", tokenizer)
    logits: dict[str, Any] = {}
    loads: dict[str, dict[str, list[float]]] = {}
    for done, (name, model) in enumerate(loaded.items(), start=1):
        found = predict(
            model,
            encoded,
            batch_size=PREDICT_BATCH_SIZE,
            pad_token_id=int(tokenizer.pad_token_id),
            device=next(model.parameters()).device,
        )
        save_predictions(
            stage.directory / PREDICTIONS / f"{name.replace('/', '-')}.npz",
            logits=found.logits,
            predictions=found.values(is_regression=splits.task.kind == "regression"),
            labels=encoded.labels,
            sample_ids=encoded.sample_ids,
        )
        logits[name] = found.logits.numpy()
        if found.tokens_per_expert and name in final_models(loaded):
            loads[name] = expert_load(found.tokens_per_expert)
        stage.console.progress(done, len(loaded) + LATENCY_ROUNDS)
    return Answers(encoded.labels, logits, loads, torch.get_num_threads())


def draw_loads(loads: Mapping[str, Mapping[str, list[float]]], directory: Path) -> tuple[Path, ...]:
    """Draw each model's expert load on the dev split.

    Args:
        loads: each expert's share by layer, by model name.
        directory: where the pictures go.

    Returns:
        The pictures.
    """
    from ..plots import plot_expert_load

    return tuple(
        plot_expert_load(by_layer, directory / f"expert-load-{name}.png")
        for name, by_layer in loads.items()
    )


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
    loaded: Mapping[str, Any], seq_len: int, stage: StageWork
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and time all models in turn in this process.

    Args:
        loaded: model by name.
        seq_len: tokens per sequence.
        stage: the stage that asks.

    Returns:
        For each model `shape`, `parameters`, `flops_per_token`, `ffn_flops_per_token` and
        `latency_ms`.
    """
    from moe_dist.inference.latency import measure_latency
    from moe_dist.inference.profile import count_parameters, flops_per_token, model_shape

    medians: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in LATENCY_BATCH_SIZES} for name in loaded
    }
    begin = time.monotonic()
    # One round of every model after the other: a busy machine slows them alike.
    for done in range(LATENCY_ROUNDS):
        if done >= MIN_LATENCY_ROUNDS and time.monotonic() - begin > LATENCY_BUDGET_S:
            break
        for name, model in loaded.items():
            timed = measure_latency(
                model,
                batch_sizes=LATENCY_BATCH_SIZES,
                seq_len=seq_len,
                repeats=LATENCY_REPEATS,
                num_warmups=1,
            )
            for size, latency in timed.items():
                medians[name][size].append(latency.median_ms)
        stage.console.progress(done + 1, LATENCY_ROUNDS)
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "shape": model_shape(model),
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
