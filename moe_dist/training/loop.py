"""The training loop. It knows no Ray: an engine that stands, batches, and where to write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_dist.data.loaders import StepBatch
from moe_dist.distributed.checkpoint import load_checkpoint
from moe_dist.distributed.checkpoint_writer import CheckpointWriter
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.position import (
    FIRST_STEP,
    LOAD_CHECKPOINT,
    TRAINING,
    begin_step,
    enter_phase,
)
from moe_dist.errors import NonFiniteLossError, TrainingError
from moe_dist.losses.total import CountKind, LossWeight, weighted_total
from moe_dist.moe.routing import use_samples, use_task
from moe_dist.timeline import mark
from moe_dist.training.balance import (
    Choices,
    balance_term,
    count_choices,
    made_choices,
    sum_choices,
)
from moe_dist.training.collectives import gather_values
from moe_dist.training.metric_window import LogWindow
from moe_dist.training.parts import STEP, part
from moe_dist.training.step import StepTerms
from moe_dist.training.transfer import pinned, prepared, to_device


class Batches(Protocol):
    """A training set cut into steps (`moe_dist.data.loaders.TrainBatches`)."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterable[StepBatch]:
        """Yield the steps of an epoch from one of them on."""
        ...


class Log(Protocol):
    """Where rank 0 writes metrics (`moe_dist.metric_log.MetricLog`)."""

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line."""
        ...

    def truncate_after(self, step: int) -> None:
        """Forget later lines."""
        ...


EXPERT_LOADS = "expert_loads"
"""What a checkpoint's state calls each layer's tokens by expert, lately."""
ComputeTerms = Callable[[nn.Module, Mapping[str, Tensor]], StepTerms]
StepWeights = Mapping[str, LossWeight]


@dataclass(frozen=True)
class LoopSettings:
    """When the loop stops, logs, evaluates and saves; all counted in optimizer steps.

    Args:
        num_steps: of the whole run, resumed parts included.
        seed: what is random is drawn anew at each step, so that a resumed run equals an unbroken
            one: dropout from seed, step and rank, a gate's noise and jitter from seed, step and
            sample, so that unlike dropout they are the same at every world size.
        log_every: steps from one line of the metric log to the next.
        eval_every: steps from one evaluation to the next; None evaluates at the end only.
        eval_at: further steps to evaluate after.
        checkpoint_at: further steps to save after; training waits until these are on disk.
        checkpoint_every: steps from one checkpoint to the next; None saves at the end only.
        keep_checkpoints: how many of the newest stay.
    """

    num_steps: int
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    eval_at: tuple[int, ...] = ()
    checkpoint_at: tuple[int, ...] = ()


@dataclass
class TrainResult:
    """How a run ended.

    Args:
        num_steps: steps taken, those of an earlier part included.
        resumed_from: the step of the checkpoint that was continued, or None.
        evaluation: the last evaluation's metrics.
        train: the last line of training metrics.
        seconds: of this part, evaluation and checkpoints included.
    """

    num_steps: int
    resumed_from: int | None
    evaluation: dict[str, float] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def planned_steps(steps_per_epoch: int, *, num_epochs: float | None, max_steps: int | None) -> int:
    """Turn epochs (a fraction will do) and a limit, or one of them, into at least 1 step.

    A TrainingError if neither is given or the data do not fill one step.
    """
    if steps_per_epoch < 1:
        raise TrainingError(
            "the training set does not fill a single step",
            remedy="lower train.batch_size, train.accumulation or parallel.num_workers, "
            "or bring more samples",
        )
    if num_epochs is None and max_steps is None:
        raise TrainingError(
            "nothing says how long to train", remedy="set train.num_epochs or train.max_steps"
        )
    limits = [] if num_epochs is None else [math.ceil(num_epochs * steps_per_epoch - 1e-9)]
    limits += [] if max_steps is None else [max_steps]
    return max(1, min(limits))


def train(
    engine: TrainEngine,
    batches: Batches,
    compute_terms: ComputeTerms,
    weights: Mapping[str, LossWeight],
    *,
    settings: LoopSettings,
    checkpoint_dir: Path | None = None,
    metric_log: Log | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
    after_step: Callable[[int], Mapping[str, float]] | None = None,
) -> TrainResult:
    """Train until `settings.num_steps`, from the newest checkpoint if there is one; collective.

    Args:
        engine: holds the model, its optimizer and the process group's part.
        batches: the same global batches on every rank.
        compute_terms: the loss terms of one micro-batch.
        weights: a coefficient for every term, by name.
        settings: when to stop, log, evaluate and save.
        checkpoint_dir: where checkpoints lie; None saves none and resumes nothing.
        metric_log: rank 0's log; None elsewhere, or to log nothing.
        evaluate: run on every rank, returns the same metrics on each.
        report: called after each log line and evaluation on every rank.
        after_step: trains what has an optimizer of its own, after each update, on every rank; it
            is told the samples of the step, and gives values to log, equal on every rank.

    Returns:
        How it ended; the last checkpoint is on disk by then.

    Raises:
        CheckpointError: on every rank, if a checkpoint could not be written.
        TrainingError: if all weights are 0, or the checkpoint is of another run.
        NonFiniteLossError: if a loss or its gradient is NaN or infinite.
    """
    if not any(weight.weight for weight in weights.values()):
        raise TrainingError(
            "every loss weight is 0, so nothing would be learned",
            remedy="give at least one distill.*_weight a value above 0",
        )
    started = time.perf_counter()
    window = LogWindow(engine.device)
    plan = {"seed": settings.seed, "steps_per_epoch": batches.steps_per_epoch}
    enter_phase(LOAD_CHECKPOINT)
    result = _resume(engine, window, checkpoint_dir, plan=plan, num_steps=settings.num_steps)
    enter_phase(FIRST_STEP)
    if engine.rank == 0 and metric_log is not None:
        metric_log.truncate_after(-1 if result.resumed_from is None else result.resumed_from)

    def publish(step: int, metrics: dict[str, float]) -> None:
        if engine.rank == 0 and metric_log is not None:
            with part("logging"):
                metric_log.append(step, metrics)
        if report is not None:
            report(step, metrics)

    engine.module.train()
    saving: AbstractContextManager[CheckpointWriter | None] = nullcontext()
    if checkpoint_dir is not None:
        saving = CheckpointWriter(
            checkpoint_dir,
            engine,
            keep=settings.keep_checkpoints,
            resumed_from=result.resumed_from,
        )
    with saving as writer:
        # Steps are numbered from 1 once they are done: checkpoint 10 has taken ten of them.
        for step, batch in _steps(batches, result.num_steps, settings.num_steps, engine.device):
            begin_step(step + 1)
            learning_rate = engine.learning_rate
            with part(STEP):
                _take_step(
                    engine,
                    batch,
                    compute_terms,
                    weights,
                    window,
                    step=step,
                    seed=settings.seed,
                    after_step=after_step,
                )
            enter_phase(TRAINING)
            mark("first step")
            result.num_steps = done = step + 1
            is_last = done == settings.num_steps
            if is_last or done % settings.log_every == 0:
                result.train = window.metrics() | {
                    "train/learning_rate": learning_rate,
                    "train/epoch": done / batches.steps_per_epoch,
                }
                window.clear()
                publish(done, result.train)
            is_due = done in settings.eval_at or _is_due(done, settings.eval_every)
            if evaluate is not None and (is_last or is_due):
                enter_phase("evaluation")
                result.evaluation = evaluate()
                engine.module.train()
                enter_phase(TRAINING)
                publish(done, result.evaluation)
            must_wait = is_last or done in settings.checkpoint_at
            if writer is not None and (must_wait or _is_due(done, settings.checkpoint_every)):
                state = {
                    **plan,
                    "epoch": done // batches.steps_per_epoch,
                    "step_in_epoch": done % batches.steps_per_epoch,
                    "window": window.state(),
                    "evaluation": result.evaluation,
                    "train": result.train,
                    # A copy: the writer reads it while the next steps are counted.
                    EXPERT_LOADS: dict(window.last_loads),
                }
                enter_phase("checkpoint")
                publish(done, _save(writer, done, state, must_wait=must_wait))
                enter_phase(TRAINING)
    result.seconds = time.perf_counter() - started
    return result


def _resume(
    engine: TrainEngine,
    window: LogWindow,
    checkpoint_dir: Path | None,
    *,
    plan: Mapping[str, int],
    num_steps: int,
) -> TrainResult:
    state = None if checkpoint_dir is None else load_checkpoint(checkpoint_dir, engine)
    if state is None:
        return TrainResult(num_steps=0, resumed_from=None)
    step = int(state["step"])
    differing = [
        f"{key} {state[key]} and not {plan[key]}" for key in plan if state[key] != plan[key]
    ]
    if step > num_steps:
        differing.append(f"{step} steps done of {num_steps}")
    if differing:
        raise TrainingError(
            f"the checkpoints in {checkpoint_dir} are of another run: {', '.join(differing)}",
            remedy="train in another directory, or delete these checkpoints to start again",
        )
    window.restore(state["window"], keeps_sums=engine.rank == 0)
    window.last_loads = dict(state.get(EXPERT_LOADS, {}))
    return TrainResult(
        num_steps=step,
        resumed_from=step,
        evaluation=dict(state["evaluation"]),
        train=dict(state["train"]),
    )


def _save(
    writer: CheckpointWriter, step: int, state: dict[str, Any], *, must_wait: bool
) -> dict[str, float]:
    """Save, and say what it cost: nobody is kept waiting for the write without need."""
    stall_s = writer.save(step, state)
    if must_wait:
        stall_s += writer.wait()
    cost = {"perf/checkpoint_stall_s": stall_s}
    if writer.write_s is not None:
        cost["perf/checkpoint_write_s"] = writer.write_s
    return cost


def _steps(
    batches: Batches, start: int, stop: int, device: torch.device
) -> Iterator[tuple[int, StepBatch]]:
    """Yield each step's number and data, across epochs, from any position."""
    step = start
    while step < stop:
        epoch, offset = divmod(step, batches.steps_per_epoch)
        for batch in prepared(batches.epoch(epoch, offset), _pinned_step, device):
            yield step, _moved_step(batch, device)
            step += 1
            if step == stop:
                return


def _pinned_step(batch: StepBatch) -> StepBatch:
    moved = copy(batch)
    moved.micro_batches = [pinned(micro_batch) for micro_batch in batch.micro_batches]
    return moved


def _moved_step(batch: StepBatch, device: torch.device) -> StepBatch:
    moved = copy(batch)
    moved.micro_batches = [to_device(micro_batch, device) for micro_batch in batch.micro_batches]
    return moved


def _take_step(
    engine: TrainEngine,
    batch: StepBatch,
    compute_terms: ComputeTerms,
    weights: Mapping[str, LossWeight],
    window: LogWindow,
    *,
    step: int,
    seed: int,
    after_step: Callable[[int], Mapping[str, float]] | None,
) -> None:
    started = time.perf_counter()
    coefficients = {name: weight.at(step) for name, weight in weights.items()}
    counts: dict[CountKind, int] = {
        "samples": batch.num_samples,
        "tokens": batch.num_tokens,
        "targets": batch.num_targets,
        "steps": 1,
    }
    sizes = [len(micro_batch["labels"]) for micro_batch in batch.micro_batches]
    sample_ids = torch.tensor(batch.sample_ids).split(sizes)
    last = len(sizes) - 1
    # Dropout is a rank's own; gates draw for each sample, alike on whatever rank it is.
    dropout_seed, noise_seed = (step_seed(seed, step, rank) for rank in (engine.rank, 0))

    @contextmanager
    def forward_of(position: int) -> Iterator[None]:
        with (
            engine.autocast(),
            use_samples(sample_ids[position], noise_seed),
            use_task(batch.task),
        ):
            yield

    choices: Choices | None = None
    if last > 0 and coefficients.get("load_balancing", 0.0) > 0:
        torch.manual_seed(dropout_seed)
        counted = []
        for position, micro_batch in enumerate(batch.micro_batches):
            with forward_of(position):
                counted.append(count_choices(engine.module, micro_batch))
        choices = sum_choices(counted)
    torch.manual_seed(dropout_seed)
    losses: list[dict[str, Tensor]] = []
    for position, micro_batch in enumerate(batch.micro_batches):
        with forward_of(position), part("losses"):
            computed = compute_terms(engine.module, micro_batch)
            terms = dict(computed.terms)
            if computed.gate_sums:
                choices = choices or sum_choices([made_choices(computed)])
                terms["load_balancing"] = balance_term(computed.gate_sums, choices)
            total, values = weighted_total(terms, coefficients, counts)
        with part("backward"):
            engine.backward(
                _poisoned(total * engine.world_size, values), is_last_micro_batch=position == last
            )
        losses.append(values)
        weighted = {name: coefficients[name] * values[name] for name in terms}
        if batch.task_name and "task" in values:
            values = values | {f"task/{batch.task_name}": values["task"]}
        with part("logging"):
            window.add_micro_batch(
                values,
                computed.tokens_per_expert,
                weighted=weighted,
                routing_sums=computed.routing_sums,
            )
    try:
        with part("update"):
            grad_norm = engine.step()
    except TrainingError as error:
        # The engine refused the update on every rank, since all see the same norm.
        raise _non_finite(engine, batch, losses, step=step) from error
    with part("what learns beside the student"):
        figures = {} if after_step is None else after_step(batch.num_samples)
    window.add_step(
        grad_norm=grad_norm,
        num_tokens=batch.num_tokens,
        seconds=time.perf_counter() - started,
        figures=figures,
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Mix a run's seed with step and rank: below 2**63, far from those of neighbours."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xC2B2AE3D27D4EB4F + rank * 0x165667B19E3779F9) % (
        1 << 64
    )
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return (mixed ^ (mixed >> 31)) >> 1


def _poisoned(loss: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Make gradients NaN where a loss term is, on every rank, without a sync or a collective.

    The gradient norm, which all ranks share and read anyway, then tells of it.
    """
    # 0 * NaN and 0 * inf are NaN; 0 * finite is 0 and leaves the loss as it was. A term at
    # weight 0 is not trained on, but `total` has every one that is.
    return loss * (1.0 + 0.0 * values["total"])


def _non_finite(
    engine: TrainEngine, batch: StepBatch, losses: list[dict[str, Tensor]], *, step: int
) -> NonFiniteLossError:
    """Find out where it happened; collective."""
    faults: list[str] = []
    first = 0
    for micro_batch, values in zip(batch.micro_batches, losses, strict=True):
        size = len(micro_batch["labels"])
        ids = batch.sample_ids[first : first + size]
        first += size
        terms = {name: float(value) for name, value in values.items()}
        if not all(math.isfinite(value) for value in terms.values()):
            faults.append(f"rank {engine.rank}, samples {ids}: {_named_terms([values])}")
    found = [fault for of_rank in gather_values(faults) for fault in of_rank]
    if found:
        message = f"step {step + 1}: a loss is not finite; " + "; ".join(found)
    else:
        message = (
            f"step {step + 1}: the losses are finite but their gradient is not; "
            f"samples of rank {engine.rank}: {batch.sample_ids}; {_named_terms(losses)}"
        )
    return NonFiniteLossError(
        message,
        remedy="lower train.learning_rate, lengthen train.warmup_fraction or use "
        "train.precision=fp32, and look at the named samples; the last checkpoint is untouched",
    )


def _named_terms(losses: list[dict[str, Tensor]]) -> str:
    sums = {name: sum(float(values[name]) for values in losses) for name in sorted(losses[0])}
    return ", ".join(f"{name}={value:.4g}" for name, value in sums.items())


def _is_due(done: int, every: int | None) -> bool:
    return bool(every) and done % int(every or 1) == 0
