"""One training job from a whole model to a saved one: engine, data order, loop, results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.data.tasks import Split
from moe_dist.distributed.engine import TrainEngine, build_engine
from moe_dist.distributed.gathering import gather_state_dict
from moe_dist.distributed.position import enter_phase
from moe_dist.errors import CheckpointError
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs.expert_groups import settle_ep_size, settle_expert_orders
from moe_dist.jobs.job import TrainJob
from moe_dist.jobs.job_data import AnyJobData, measure, save_answers
from moe_dist.jobs.precision import model_precision, quick_passes
from moe_dist.jobs.results import (
    CHECKPOINT_DIR,
    MODEL_DIR,
    PREDICTIONS,
    RESULT,
)
from moe_dist.measure.evaluation import expert_load, predict
from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.moe.routing import checkpoint_context_fn
from moe_dist.timeline import mark
from moe_dist.training.collectives import own_rank, sum_over_ranks, wait_for_ranks
from moe_dist.training.companion import Companion, attach, detach
from moe_dist.training.hardware import (
    begin_peak_device_memory,
    keep_free_memory,
    peak_device_memory_gib,
    peak_memory_gib,
    pick_device,
)
from moe_dist.training.loop import (
    ComputeTerms,
    LoopSettings,
    StepWeights,
    TrainResult,
    planned_steps,
    train,
)
from moe_dist.whole_files import write_json

Report = Callable[[int, dict[str, float]], None]
MAX_LOGGED_EXPERTS = 16
"""Layers of more experts have no metric for each of them; `moe/load_imbalance` tells of all."""


def train_model(
    model: Any,
    data: AnyJobData,
    compute_terms: ComputeTerms,
    weights_for: Callable[[int], StepWeights],
    job: TrainJob,
    *,
    whole_model: str | None = None,
    companion: Companion | None = None,
    report: Report | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Train a model as a job says, and save it; collective.

    Args:
        model: a whole Hugging Face model, alike on every rank.
        data: of one task or several.
        compute_terms: the loss terms of a micro-batch.
        weights_for: from the number of steps to a weight for each term.
        job: how, where, and on what it is measured.
        whole_model: the directory the model came from; needed where experts are spread over
            ranks, to put them together again.
        companion: what learns beside the model and is not saved with it.
        report: called after each log line and evaluation; what it raises ends the training.
        keep: write checkpoints and the trained model; without, only figures remain, and
            checkpoints where the job has ``checkpoint_at``.

    Returns:
        ``metrics`` of the measured split, ``train`` (the last line of the metric log),
        ``expert_load`` by layer (of at most `MAX_LOGGED_EXPERTS` experts), ``num_steps``,
        ``resumed_from``, ``seconds``, ``peak_memory_gib`` (all ranks), on GPUs
        ``peak_device_memory_gib`` (of the fullest) and ``model`` (the directory).
    """
    section, parallel = job.train, job.parallel
    stage_dir = Path(job.stage_dir)
    ep_size = settle_ep_size(model, parallel.ep_size)
    batches = data.batches(section, seed=job.seed, split=job.TRAINS_ON)
    mark("tokens")
    settings = loop_settings(job, batches.steps_per_epoch)
    if section.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": checkpoint_context_fn,
            }
        )
    if companion is not None:
        attach(model, companion)
    device = pick_device(parallel.use_gpu)
    precision = model_precision(section.precision, device, model)
    checkpoint_dir = stage_dir / CHECKPOINT_DIR if keep or settings.checkpoint_at else None
    orders = settle_expert_orders(
        model,
        ep_size,
        batches.epoch(0),
        checkpoint_dir,
        seed=job.seed,
        precision=precision,
        device=device,
    )
    # Not before: experts are counted with all of them in one place.
    begin_peak_device_memory(device)
    engine = build_engine(
        model,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        num_steps=settings.num_steps,
        warmup_steps=round(section.warmup_fraction * settings.num_steps),
        lr_schedule=section.lr_schedule,
        expert_learning_rate_scale=section.expert_learning_rate_scale,
        zero_stage=parallel.zero_stage,
        ep_size=ep_size,
        precision=precision,
        micro_batches_per_step=section.accumulation,
        max_grad_norm=section.max_grad_norm,
        device=device,
        expert_orders=orders,
    )
    mark("engine, DeepSpeed's import included")
    loads: dict[str, list[float]] = {}
    split = job.eval_split

    # In the precision of `evaluate` and of users, whatever the steps are computed in.
    answer = partial(
        predict,
        engine.module,
        batch_size=section.eval_batch_size,
        pad_token_id=data.pad_token_id,
        device=engine.device,
    )

    def evaluate() -> dict[str, float]:
        measured = measure(data, answer, split)
        loads.update(expert_load(measured.tokens_per_expert))
        if job.keep_predictions and engine.rank == 0:
            save_answers(data, measured, stage_dir / PREDICTIONS)
        metrics = {f"{split}/{name}": value for name, value in measured.metrics.items()}
        return metrics | load_metrics(loads)

    keep_free_memory()
    with quick_passes(precision, device, engine.module):
        result = train(
            engine,
            batches,
            compute_terms,
            weights_for(settings.num_steps),
            settings=settings,
            checkpoint_dir=checkpoint_dir,
            metric_log=MetricLog(stage_dir / METRIC_LOG) if engine.rank == 0 else None,
            evaluate=evaluate,
            report=report,
            after_step=None if companion is None else companion.after_step,
        )
    if keep:
        enter_phase("saving of the model")
        detach(engine.module)
        _save_whole(engine, stage_dir / MODEL_DIR, data.tokenizer, whole_model)
    summary = _summary(result, split, engine.device) | {"model": str(stage_dir / MODEL_DIR)}
    if engine.rank == 0:
        write_json(stage_dir / RESULT, summary)
    wait_for_ranks()
    return summary


def keep_model(model: Any, data: AnyJobData, job: TrainJob) -> dict[str, Any]:
    """Measure a model and save it as it is; collective. What is returned is `train_model`'s."""
    begun = time.monotonic()
    device = pick_device(job.parallel.use_gpu)
    begin_peak_device_memory(device)
    model = model.to(device).eval()

    answer = partial(
        predict,
        model,
        batch_size=job.train.eval_batch_size,
        pad_token_id=data.pad_token_id,
        device=device,
    )
    measured = measure(data, answer, job.eval_split)
    metrics = {f"{job.eval_split}/{name}": value for name, value in measured.metrics.items()}
    directory = Path(job.stage_dir) / MODEL_DIR
    result = TrainResult(0, None, metrics, {}, time.monotonic() - begun)
    summary = _summary(result, job.eval_split, device) | {"model": str(directory)}
    if own_rank() == 0:
        save_model(model, directory, tokenizer=data.tokenizer)
        write_json(Path(job.stage_dir) / RESULT, summary)
    wait_for_ranks()
    return summary


def load_metrics(loads: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Name each expert's share of tokens for the metric log.

    Layers of more than `MAX_LOGGED_EXPERTS` experts are left out.
    """
    return {
        f"moe/expert_load/{layer}/{expert}": share
        for layer, shares in loads.items()
        if len(shares) <= MAX_LOGGED_EXPERTS
        for expert, share in enumerate(shares)
    }


def loop_settings(job: TrainJob, steps_per_epoch: int) -> LoopSettings:
    """Turn a job's settings into steps; without ``checkpoint_every`` save after each epoch."""
    section = job.train
    return LoopSettings(
        num_steps=planned_steps(
            steps_per_epoch, num_epochs=section.num_epochs, max_steps=section.max_steps
        ),
        seed=job.seed,
        log_every=section.log_every,
        eval_every=section.eval_every,
        eval_at=job.eval_at,
        checkpoint_at=job.checkpoint_at,
        checkpoint_every=section.checkpoint_every or steps_per_epoch,
        keep_checkpoints=section.keep_checkpoints,
    )


def _summary(result: TrainResult, split: Split, device: torch.device) -> dict[str, Any]:
    memory = torch.tensor(peak_memory_gib(), dtype=torch.float64, device=device)
    prefix, load_prefix = f"{split}/", "moe/expert_load/"
    loads: dict[str, list[float]] = {}
    for name, share in result.evaluation.items():
        if name.startswith(load_prefix):
            layer = name.removeprefix(load_prefix).rpartition("/")[0]
            loads.setdefault(layer, []).append(share)
    device_memory = peak_device_memory_gib(device)
    return {
        "metrics": {
            name.removeprefix(prefix): value
            for name, value in result.evaluation.items()
            if name.startswith(prefix)
        },
        "train": result.train,
        "expert_load": loads,
        "num_steps": result.num_steps,
        "resumed_from": result.resumed_from,
        "seconds": result.seconds,
        "peak_memory_gib": float(sum_over_ranks(memory)),
        **({} if device_memory is None else {"peak_device_memory_gib": device_memory}),
    }


def _save_whole(
    engine: TrainEngine, directory: Path, tokenizer: Any, whole_model: str | None
) -> None:
    """Save the model with all its experts; collective, rank 0 writes."""
    module: Any = engine.module
    if engine.ep_size > 1:
        assert whole_model is not None, "experts are only spread in models from a directory"
        state = gather_state_dict(engine)
        if engine.rank == 0:
            module = load_model(Path(whole_model), device="cpu")
            _fill(module, state)
    if engine.rank == 0:
        save_model(module, directory, tokenizer=tokenizer)
    wait_for_ranks()


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    own = model.state_dict(keep_vars=True)
    filled = {id(own[name]) for name in state if name in own}
    # A tensor with two names is gathered under one of them.
    lost = [name for name in missing if id(own[name]) not in filled]
    if lost or unexpected:
        raise CheckpointError(
            f"the trained experts do not fit the model they came from: {lost + unexpected}"
        )
