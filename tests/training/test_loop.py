"""The loop: resuming, accumulation, determinism, logging, and what stops it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dist.distributed.checkpoint_writer import CheckpointWriter
from moe_dist.distributed.engine import build_engine
from moe_dist.errors import CheckpointError, NonFiniteLossError, TrainingError
from moe_dist.losses.total import LossTerm, LossWeight
from moe_dist.metric_log import MetricLog, series
from moe_dist.training import loop
from moe_dist.training.loop import (
    EXPERT_LOADS,
    LoopSettings,
    TrainResult,
    planned_steps,
    step_seed,
    train,
)
from moe_dist.training.step import StepTerms, finetune_terms
from tests.training.tiny import tiny_batches, tiny_bert, tiny_data, tiny_student

WEIGHTS = {"task": LossWeight(1.0)}
SETTINGS = LoopSettings(num_steps=7, seed=3, log_every=2, checkpoint_every=3)


def run(
    directory: Path | None = None,
    *,
    settings: LoopSettings = SETTINGS,
    model: nn.Module | None = None,
    num_steps: int = 7,
    log: MetricLog | None = None,
    batches: Any = None,
    **options: Any,
) -> tuple[nn.Module, TrainResult]:
    """Train a tiny BERT; `num_steps` is what the learning rate is planned for."""
    batches = tiny_batches() if batches is None else batches
    engine = build_engine(
        tiny_bert() if model is None else model,
        learning_rate=1e-2,
        weight_decay=0.01,
        num_steps=num_steps,
        warmup_steps=2,
        micro_batches_per_step=batches.accumulation,
    )
    compute = options.pop("compute_terms", finetune_terms)
    result = train(
        engine,
        batches,
        compute,
        options.pop("weights", WEIGHTS),
        settings=settings,
        checkpoint_dir=directory,
        metric_log=log,
        **options,
    )
    return engine.module, result


def assert_same_weights(a: nn.Module, b: nn.Module, *, atol: float = 0.0) -> None:
    other = b.state_dict()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, other[name], rtol=0.0, atol=atol, msg=name)


def logged(log: MetricLog) -> list[tuple[int, dict[str, float]]]:
    """The log without times and speeds."""
    return [
        (r.step, {n: v for n, v in r.metrics.items() if not n.startswith("perf/")})
        for r in log.read()
    ]


def test_training_learns() -> None:
    log_losses: list[float] = []

    def report(step: int, metrics: dict[str, float]) -> None:
        log_losses.append(metrics["train/loss/task"])

    settings = LoopSettings(num_steps=30, log_every=10)
    run(settings=settings, num_steps=30, model=tiny_bert(dropout=0.0), report=report)
    assert len(log_losses) == 3
    assert log_losses[-1] < 0.5 * log_losses[0]


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    first, _ = run()
    again, _ = run()
    other, _ = run(settings=replace(SETTINGS, seed=4))
    assert_same_weights(first, again)
    with pytest.raises(AssertionError):
        assert_same_weights(first, other)


@pytest.mark.parametrize("stopped_after", [3, 5, 6])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, stopped_after: int) -> None:
    whole_log, broken_log = MetricLog(tmp_path / "a.jsonl"), MetricLog(tmp_path / "b.jsonl")
    whole, _ = run(tmp_path / "whole", log=whole_log)

    class Killed(Exception):
        pass

    taken = 0

    def dies(model: nn.Module, batch: Mapping[str, Tensor]) -> StepTerms:
        nonlocal taken
        if taken == stopped_after:
            raise Killed
        taken += 1
        return finetune_terms(model, batch)

    with pytest.raises(Killed):
        run(tmp_path / "broken", log=broken_log, compute_terms=dies)
    # Whatever the process had drawn before must not matter.
    torch.manual_seed(12345)
    resumed, result = run(tmp_path / "broken", log=broken_log, model=tiny_bert(seed=99))
    assert result.resumed_from == stopped_after // 3 * 3
    assert result.num_steps == 7
    assert_same_weights(whole, resumed)
    assert logged(broken_log) == logged(whole_log)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    options: dict[str, Any] = {"log": log, "evaluate": lambda: {"dev/accuracy": 0.5}}
    first, done = run(tmp_path / "checkpoints", **options)
    before = logged(log)

    def must_not_run(model: nn.Module, batch: Mapping[str, Tensor]) -> StepTerms:
        raise AssertionError("trained again")

    again, result = run(
        tmp_path / "checkpoints", model=tiny_bert(seed=9), compute_terms=must_not_run, **options
    )
    assert result.num_steps == result.resumed_from == 7
    assert result.evaluation == done.evaluation == {"dev/accuracy": 0.5}
    assert result.train == done.train
    assert_same_weights(first, again)
    assert logged(log) == before


def test_checkpoints_are_counted_and_kept_as_told(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    run(
        tmp_path / "checkpoints",
        log=log,
        settings=replace(SETTINGS, checkpoint_every=2, keep_checkpoints=3),
    )
    kept = sorted(place.name for place in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (4, 6, 7)]
    steps, stalls = series(log.read(), "perf/checkpoint_stall_s")
    assert steps == [2, 4, 6, 7] and min(stalls) > 0
    # Each tells of the last write that was waited for.
    assert series(log.read(), "perf/checkpoint_write_s")[0] == [4, 6, 7]


def test_a_checkpoint_that_others_wait_for_is_on_disk_when_it_is_announced(tmp_path: Path) -> None:
    there: dict[int, bool] = {}

    def report(step: int, metrics: dict[str, float]) -> None:
        if "perf/checkpoint_stall_s" in metrics:
            there[step] = (tmp_path / f"step-{step:08d}" / "manifest.json").exists()

    settings = replace(SETTINGS, checkpoint_every=7, checkpoint_at=(2, 4))
    run(tmp_path, settings=settings, report=report)
    assert there == {2: True, 4: True, 7: True}


def test_what_a_checkpoint_says_of_experts_stays_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[tuple[dict[str, list[float]], dict[str, list[float]]]] = []
    save = loop._save

    def noted(writer: Any, step: int, state: dict[str, Any], **options: Any) -> Any:
        handed.append((state[EXPERT_LOADS], dict(state[EXPERT_LOADS])))
        return save(writer, step, state, **options)

    monkeypatch.setattr(loop, "_save", noted)
    settings = LoopSettings(num_steps=3, log_every=1, checkpoint_every=1)
    run(tmp_path, settings=settings, model=tiny_student(tiny_bert(), gate_noise=1.0))
    assert len(handed) == 3 and handed[0] != handed[1]
    assert all(given and given == as_saved for given, as_saved in handed)


def test_training_does_not_end_well_without_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(place: Path) -> None:
        if place.name == "step-00000007":
            raise OSError(28, "No space left on device")

    writer = partial(CheckpointWriter, on_written=fails)
    monkeypatch.setattr("moe_dist.training.loop.CheckpointWriter", writer)
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path)


def test_a_fresh_start_forgets_what_a_killed_run_logged(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.append(2, {"train/loss/total": 99.0})
    run(tmp_path / "checkpoints", log=log)
    steps, losses = series(log.read(), "train/loss/total")
    assert steps == [2, 4, 6, 7]
    assert 99.0 not in losses


def test_accumulation_changes_nothing() -> None:
    plain, result = run(model=tiny_bert(dropout=0.0))
    accumulated, other = run(model=tiny_bert(dropout=0.0), batches=tiny_batches(accumulation=2))
    assert_same_weights(plain, accumulated, atol=2e-5)
    assert other.train["train/loss/task"] == pytest.approx(
        result.train["train/loss/task"], rel=1e-4
    )


def test_the_logged_loss_is_the_mean_over_the_window(tmp_path: Path) -> None:
    every, pairs = MetricLog(tmp_path / "every.jsonl"), MetricLog(tmp_path / "pairs.jsonl")
    run(log=every, settings=replace(SETTINGS, log_every=1))
    run(log=pairs)
    _, single = series(every.read(), "train/loss/task")
    steps, means = series(pairs.read(), "train/loss/task")
    assert steps == [2, 4, 6, 7]
    assert means == pytest.approx([sum(single[i : i + 2]) / 2 for i in (0, 2, 4)] + single[6:])
    _, rates = series(every.read(), "train/learning_rate")
    assert rates[:2] == pytest.approx([5e-3, 1e-2]) and rates[-1] < rates[2]


def test_evaluation_comes_when_due_and_at_the_end() -> None:
    seen: list[int] = []
    calls = 0

    def evaluate() -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"dev/accuracy": calls / 10}

    def report(step: int, metrics: dict[str, float]) -> None:
        if "dev/accuracy" in metrics:
            seen.append(step)

    model, result = run(settings=replace(SETTINGS, eval_every=3), evaluate=evaluate, report=report)
    assert seen == [3, 6, 7]
    assert result.evaluation == {"dev/accuracy": 0.3}
    assert model.training


def spoilt(kind: str) -> Any:
    """Terms that go wrong for the sample with id 105."""
    data = tiny_data()
    bad = data.input_ids[data.offsets[5] : data.offsets[6]]

    def compute(model: nn.Module, batch: Mapping[str, Tensor]) -> StepTerms:
        computed = finetune_terms(model, batch)
        width = len(bad)
        ids = batch["input_ids"][:, :width]
        same = ids.shape[1] == width and bool((ids == torch.tensor(bad)).all(dim=1).any())
        task = computed.terms["task"].sum
        if same and kind == "nan":
            task = task * float("nan")
        elif same and kind == "inf":
            task = task + float("inf")
        elif same:
            # Finite value, infinite gradient.
            zero = torch.zeros_like(task, requires_grad=True)
            task = task + torch.sqrt(task * 0.0 + zero * zero)
        return StepTerms({"task": LossTerm(task, "samples")})

    return compute


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_step(tmp_path: Path, kind: str) -> None:
    model = tiny_bert()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    batches = tiny_batches()
    first = next(iter(batches.epoch(0)))
    assert 105 in {i for b in batches.epoch(0) for i in b.sample_ids}
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, compute_terms=spoilt(kind), model=model, batches=batches)
    step = next(n for n, b in enumerate(batches.epoch(0), start=1) if 105 in b.sample_ids)
    text = str(caught.value)
    assert f"step {step}:" in text and "105" in text and f"task={kind}" in text
    assert "train.learning_rate" in text
    if 105 in first.sample_ids:
        assert_same_weights(model, _with(start))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_the_step() -> None:
    with pytest.raises(NonFiniteLossError, match=r"losses are finite but their gradient.*105"):
        run(compute_terms=spoilt("gradient"))


def _with(state: Mapping[str, Tensor]) -> nn.Module:
    model = tiny_bert()
    model.load_state_dict(state)
    return model


def test_all_weights_at_zero_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing would be learned"):
        run(weights={"task": LossWeight(0.0)})


def test_planned_steps() -> None:
    assert planned_steps(10, num_epochs=3, max_steps=None) == 30
    assert planned_steps(10, num_epochs=0.25, max_steps=None) == 3
    assert planned_steps(10, num_epochs=3, max_steps=12) == 12
    assert planned_steps(10, num_epochs=None, max_steps=5) == 5
    with pytest.raises(TrainingError, match="how long to train"):
        planned_steps(10, num_epochs=None, max_steps=None)
    with pytest.raises(TrainingError, match="single step"):
        planned_steps(0, num_epochs=1, max_steps=None)


def test_step_seeds_differ() -> None:
    seeds = {step_seed(s, t, r) for s in range(3) for t in range(50) for r in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"settings": replace(SETTINGS, seed=4)}, "seed 3 and not 4"),
        ({"settings": replace(SETTINGS, num_steps=5)}, "7 steps done of 5"),
        ({"batches": tiny_batches(batch_size=6)}, "steps_per_epoch 3 and not 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    run(tmp_path)
    with pytest.raises(TrainingError, match=named):
        run(tmp_path, **changed)
