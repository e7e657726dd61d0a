"""What runs on every worker: each job builds its model and data from paths, and runs.

Jobs are plain functions of one payload (`moe_dist.training.payloads`), so a driver can send them
anywhere. They are collective: every rank of the process group runs the same job. Rank 0 writes
into the stage's directory; results come back as plain values, equal on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_dist.conversion import score_importance
from moe_dist.conversion.expert_importance import score_expert_importance
from moe_dist.conversion.heads import set_heads
from moe_dist.conversion.hidden_states import stack_depths
from moe_dist.conversion.importance import evened
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.data.mixture import Mixture, even_share, load_rows
from moe_dist.distributed.position import advancing, enter_phase
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.inference.saving import load_model, load_tokenizer, save_model
from moe_dist.losses.total import LossWeight
from moe_dist.moe.routing import use_task
from moe_dist.timeline import mark
from moe_dist.training.collectives import num_ranks, own_rank, sum_over_ranks, wait_for_ranks
from moe_dist.training.companion import build_companion
from moe_dist.training.dropout import set_dropout
from moe_dist.training.evaluation import Predictions, expert_load, predict
from moe_dist.training.fit import Report, fit
from moe_dist.training.fitted_start import draw_tasks, fit_start
from moe_dist.training.hardware import pick_device
from moe_dist.training.job_data import (
    AnyJobData,
    job_data,
    label_names,
    measure,
    save_answers,
    task_heads,
)
from moe_dist.training.loop import StepWeights
from moe_dist.training.objectives import (
    ObjectiveSettings,
    chosen_objectives,
    objective_weights,
    pair_stacks,
    pair_states,
)
from moe_dist.training.payloads import (
    DistillPayload,
    DistillSection,
    FinetunePayload,
    FitOutputPayload,
    ImportancePayload,
    PredictPayload,
)
from moe_dist.training.results import MODEL_DIR, SCORES, save_scores
from moe_dist.training.step import distill_terms, finetune_terms, freeze


def finetune_job(payload: FinetunePayload) -> dict[str, Any]:
    """Fine-tune a pre-trained encoder on the task, or on several at once: the teacher.

    Args:
        payload: see `FinetunePayload`.

    Returns:
        See `fit`.
    """
    rows = load_rows(payload["data"])
    mark("rows")
    heads = task_heads(rows) if isinstance(rows, Mixture) else ()
    model, tokenizer = load_pretrained(
        payload["model"],
        num_labels=rows.num_labels,
        label_names=label_names(rows),
        revision=payload.get("revision"),
        seed=payload["seed"],
    )
    if heads:
        set_heads(model, heads)
    mark("model")
    data = job_data(rows, tokenizer, payload)
    return fit(
        model,
        data,
        finetune_terms,
        lambda num_steps: {"task": LossWeight(1.0)},
        payload,
    )


def distill_job(payload: DistillPayload) -> dict[str, Any]:
    """Train a student to do what the teacher does.

    The teacher stays outside the student: frozen, in eval mode, never saved with it.

    Args:
        payload: see `DistillPayload`.

    Returns:
        See `fit`.
    """
    rows = load_rows(payload["data"])
    # The engine takes this device too, and the two must meet in the losses.
    device = pick_device(payload.get("use_gpu", "auto"))
    teacher = freeze(load_model(Path(payload["teacher"]), device))
    student = load_model(Path(payload["student"]))
    data = job_data(rows, load_tokenizer(Path(payload["student"])), payload)
    return distill(student, teacher, data, payload, whole_model=payload["student"])


def distill(
    student: Any,
    teacher: nn.Module,
    data: AnyJobData,
    payload: Mapping[str, Any],
    *,
    whole_model: str | None = None,
    report: Report | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Train a student that is in memory already; see `distill_job`.

    Args:
        student: what is trained.
        teacher: frozen, on the device that `pick_device` names.
        data: the task's data.
        payload: see `DistillPayload`; its directories of models are not read.
        whole_model: see `fit`.
        report: see `fit`.
        keep: see `fit`.

    Returns:
        See `fit`.
    """
    section: DistillSection = payload["distill"]
    dropout = section.get("dropout")
    if dropout is not None:
        set_dropout(student, dropout)
    which = section.get("hidden_layers", "all")
    layers = payload.get("layers")
    pairs = pair_states(layers, which) if layers else pair_stacks(stack_depths(student), which)
    companion = build_companion(
        student,
        teacher,
        section,
        num_pairs=len(pairs),
        hidden_ids=payload.get("hidden_ids"),
        seed=payload["seed"],
    )
    terms = partial(
        _distill,
        teacher=teacher,
        objectives=chosen_objectives(section),
        settings=ObjectiveSettings(
            temperature=section.get("temperature", 1.0),
            pairs=pairs,
            pooling=section.get("alignment_pooling", "cls"),
        ),
        companion=companion,
        load_balancing=section.get("load_balancing_weight", 0.0) > 0,
        z_loss=section.get("z_loss_weight", 0.0) > 0,
        entropy=section.get("entropy_weight", 0.0) > 0,
    )
    return fit(
        student,
        data,
        terms,
        partial(distill_weights, section),
        payload,
        whole_model=whole_model,
        companion=companion,
        report=report,
        keep=keep,
    )


def distill_weights(section: DistillSection, num_steps: int) -> StepWeights:
    """Turn the recipe's weights into one schedule for each term.

    Args:
        section: the recipe's ``distill``.
        num_steps: of the whole run.

    Returns:
        Weights by term.
    """
    return {
        "task": LossWeight(section.get("task_weight", 1.0)),
        **objective_weights(section, num_steps),
        "load_balancing": LossWeight(section.get("load_balancing_weight", 0.0)),
        "z_loss": LossWeight(section.get("z_loss_weight", 0.0)),
        "router_entropy": LossWeight(section.get("entropy_weight", 0.0)),
    }


def importance_job(payload: ImportancePayload) -> dict[str, Any]:
    """Score a model's feed-forward neurons on training samples, summed over workers.

    Of a converted model they are those of its experts (`score_expert_importance`).

    Tasks count alike: of several, each layer's scores are divided by their sum before they are
    added, whatever the losses and the number of rows.

    Args:
        payload: see `ImportancePayload`.

    Returns:
        ``scores``: the file that rank 0 wrote; ``num_samples``: how many were scored.
    """
    rows = load_rows(payload["data"])
    device = pick_device(payload.get("use_gpu", "auto"))
    model = load_model(Path(payload["model"]), device)
    data = job_data(rows, load_tokenizer(Path(payload["model"])), payload)
    limit = payload.get("num_samples")
    enter_phase("scoring of importance")
    scores: list[torch.Tensor] = []
    num_samples = 0
    for number, (name, part) in enumerate(data.parts.items()):
        share = None if limit is None else even_share(limit, len(data.parts))
        encoded = part.train.draw(share, seed=payload["seed"])
        num_samples += len(encoded)
        with use_task(number if name else None):
            own = _score(model, encoded, part.pad_token_id, device, payload.get("batch_size", 32))
        if name:
            own = evened(own)
        scores = [a + b for a, b in zip(scores, own, strict=True)] if scores else own
    path = Path(payload["stage_dir"]) / SCORES
    if own_rank() == 0:
        save_scores(scores, path)
    wait_for_ranks()
    return {"scores": str(path), "num_samples": num_samples}


def _score(
    model: nn.Module, encoded: Encoded, pad_token_id: int, device: torch.device, batch_size: int
) -> list[torch.Tensor]:
    """Score the neurons on one task's samples, each rank on its share."""
    # Fewer samples than workers: every worker scores all of them instead of some scoring none.
    shared = len(encoded) >= num_ranks() > 1
    mine = encoded.subset(range(own_rank(), len(encoded), num_ranks())) if shared else encoded
    batches = eval_batches(mine, batch_size=batch_size, pad_token_id=pad_token_id)
    score = score_expert_importance if hasattr(model.config, "moe") else score_importance
    scores = score(model, advancing(batches))
    if shared:
        scores = [sum_over_ranks(score_F.to(device)).cpu() for score_F in scores]
    return scores


def fit_output_job(payload: FitOutputPayload) -> dict[str, Any]:
    """Fit the output weights of a fresh student's experts to the dense model's outputs.

    Rank 0 does all of it, in about the time that scoring the same rows takes; start one worker.

    Args:
        payload: see `FitOutputPayload`.

    Returns:
        ``model``: the directory that rank 0 wrote.
    """
    path = Path(payload["stage_dir"]) / MODEL_DIR
    if own_rank() == 0:
        rows = load_rows(payload["data"])
        device = pick_device(payload.get("use_gpu", "auto"))
        dense = load_model(Path(payload["teacher"]), device)
        student = load_model(Path(payload["student"]))
        tokenizer = load_tokenizer(Path(payload["student"]))
        data = job_data(rows, tokenizer, payload)
        enter_phase("fit of output weights")
        parts = list(data.parts.values())
        batches = draw_tasks(
            [part.train for part in parts],
            num_samples=payload.get("num_samples"),
            seed=payload["seed"],
            batch_size=payload.get("batch_size", 32),
            pad_token_id=parts[0].pad_token_id,
        )
        fit_start(student, dense, batches)
        save_model(student, path, tokenizer=tokenizer)
    wait_for_ranks()
    return {"model": str(path)}


def predict_job(payload: PredictPayload) -> dict[str, Any]:
    """Run a saved model over a split, of each task if there are several.

    Args:
        payload: see `PredictPayload`.

    Returns:
        ``predictions`` (the logits, (N, C) float32) by task ("" where there is one), ``metrics``
        by name, and ``expert_load`` by layer. Rank 0 wrote the predictions into the stage's
        directory, as ``output_name`` says.
    """
    rows = load_rows(payload["data"])
    device = pick_device(payload.get("use_gpu", "auto"))
    model = load_model(Path(payload["model"]), device)
    data = job_data(rows, load_tokenizer(Path(payload["model"])), payload)
    enter_phase("prediction")

    def answer(encoded: Encoded) -> Predictions:
        return predict(
            model,
            encoded,
            batch_size=payload.get("batch_size", 64),
            pad_token_id=data.pad_token_id,
            device=device,
        )

    measured = measure(data, answer, payload.get("split", "dev"))
    if own_rank() == 0:
        name = f"{payload.get('output_name', 'predictions')}.npz"
        save_answers(data, measured, Path(payload["stage_dir"]) / name)
    wait_for_ranks()
    return {
        "predictions": {name: one.logits.numpy() for name, one in measured.answers.items()},
        "metrics": measured.metrics,
        "expert_load": expert_load(measured.tokens_per_expert),
    }


def _distill(
    student: nn.Module, batch: Mapping[str, torch.Tensor], *, teacher: nn.Module, **options: Any
) -> Any:
    return distill_terms(student, teacher, batch, **options)
