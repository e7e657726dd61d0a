"""The writer in the background: nobody waits for it, and nothing it meets is lost."""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.distributed import (
    CheckpointWriter,
    TrainEngine,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from moe_dist.distributed import checkpoint_writer as module
from moe_dist.errors import CheckpointError, TrainingError
from tests.distributed.tiny_moe import Case, make_engine, train_steps

LOCAL = Case(1, 1, 0)


@pytest.fixture
def engine() -> TrainEngine:
    made = make_engine(LOCAL)
    train_steps(made, LOCAL, 0, 1)
    return made


class Gate:
    """Holds the writer up, after its rename, until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.seen: list[str] = []

    def __call__(self, place: Path) -> None:
        self.seen.append(place.name)
        assert self.open.wait(60)


@contextmanager
def full_disk(limit_bytes: int = 2000) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)


def test_training_goes_on_and_the_checkpoint_is_of_its_moment(
    tmp_path: Path, engine: TrainEngine
) -> None:
    """What is written is the state at `save`, whatever training does meanwhile."""
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    gate = Gate()
    with CheckpointWriter(tmp_path, engine, on_written=gate) as writer:
        writer.save(1, {"mark": 1})
        train_steps(engine, LOCAL, 1, 3)
        assert writer.write_s is None, "the write has not been waited for"
        gate.open.set()
        writer.save(3, {"mark": 3})
    assert gate.seen == ["step-00000001", "step-00000003"]
    stored = load_file(tmp_path / "step-00000001" / "model.safetensors")
    moved = load_file(tmp_path / "step-00000003" / "model.safetensors")
    for name, value in weights.items():
        assert torch.equal(stored[name], value), name
    assert not torch.equal(stored["head.weight"], moved["head.weight"])
    assert writer.write_s is not None and writer.write_s > 0


def test_buffers_are_used_again(tmp_path: Path, engine: TrainEngine) -> None:
    """One copy of weights and moments, however many checkpoints are written."""
    with CheckpointWriter(tmp_path, engine) as writer:
        addresses = []
        for step in (1, 2):
            writer.save(step, {})
            buffers = (writer._model_buffers, writer._moment_buffers)
            addresses.append([t.data_ptr() for b in buffers for t in b._tensors.values()])
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) > 20


def test_the_next_checkpoint_waits_and_the_wait_is_measured(
    tmp_path: Path, engine: TrainEngine
) -> None:
    gate = Gate()
    with CheckpointWriter(tmp_path, engine, on_written=gate) as writer:
        quick = writer.save(1, {})
        threading.Timer(0.5, gate.open.set).start()
        assert writer.save(2, {}) > 0.4 > quick


def test_the_end_waits_for_the_write(tmp_path: Path, engine: TrainEngine) -> None:
    gate = Gate()
    threading.Timer(0.3, gate.open.set).start()
    with CheckpointWriter(tmp_path, engine, on_written=gate) as writer:
        writer.save(1, {})
    assert gate.open.is_set()
    assert load_checkpoint(tmp_path, engine) == {"step": 1}


@pytest.mark.parametrize("steps", [[2], [2, 3]], ids=["end", "next"])
def test_a_full_disk_is_told_at_the_next_checkpoint_or_at_the_end(
    tmp_path: Path, engine: TrainEngine, steps: list[int]
) -> None:
    save_checkpoint(tmp_path, engine, step=1, state={})
    with full_disk(), pytest.raises(CheckpointError, match="step-00000002 could not be") as caught:
        save_all(tmp_path, engine, steps)
    assert "free space" in caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path, engine) == {"step": 1}


def save_all(directory: Path, engine: TrainEngine, steps: list[int]) -> None:
    with CheckpointWriter(directory, engine) as writer:
        for step in steps:
            writer.save(step, {})


def test_a_failing_hook_is_a_failed_write(tmp_path: Path, engine: TrainEngine) -> None:
    """Nothing older is pruned then, since what followed may have been a copy elsewhere."""

    def fails(place: Path) -> None:
        raise ValueError(f"no bucket for {place.name}")

    save_checkpoint(tmp_path, engine, step=1, state={})
    with (
        pytest.raises(CheckpointError, match="ValueError: no bucket for step-00000002"),
        CheckpointWriter(tmp_path, engine, keep=1, on_written=fails) as writer,
    ):
        writer.save(2, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]


def save_and_fail(directory: Path, engine: TrainEngine, gate: Gate | None = None) -> None:
    """Training that goes wrong while a checkpoint is being written."""
    with CheckpointWriter(directory, engine, on_written=gate) as writer:
        writer.save(1, {})
        raise TrainingError("mine")


def test_an_error_in_training_still_lets_the_writer_finish(
    tmp_path: Path, engine: TrainEngine
) -> None:
    gate = Gate()
    threading.Timer(0.3, gate.open.set).start()
    with pytest.raises(TrainingError, match="mine"):
        save_and_fail(tmp_path, engine, gate)
    assert gate.open.is_set()
    assert load_checkpoint(tmp_path, engine) == {"step": 1}


def test_but_not_for_ever(
    tmp_path: Path,
    engine: TrainEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "SALVAGE_TIMEOUT_S", 0.2)
    gate = Gate()
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="mine"):
        save_and_fail(tmp_path, engine, gate)
    assert time.monotonic() - started < 30
    assert "given up after" in caplog.text
    gate.open.set()


def test_a_failed_write_is_told_beside_an_error_in_training(
    tmp_path: Path, engine: TrainEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        full_disk(),
        pytest.raises(TrainingError, match="mine"),
    ):
        save_and_fail(tmp_path, engine)
    assert "step-00000001 could not be written" in caplog.text


def test_keep_and_what_was_left_behind(tmp_path: Path, engine: TrainEngine) -> None:
    """`keep` counts good ones: those that were passed over on resuming are not among them."""
    save_checkpoint(tmp_path, engine, step=2, state={})
    for step in (3, 4):
        place = save_checkpoint(tmp_path, engine, step=step, state={}, keep=3)
        (place / "model.safetensors").write_bytes(b"damaged")
    assert load_checkpoint(tmp_path, engine) == {"step": 2}
    with CheckpointWriter(tmp_path, engine, keep=2, resumed_from=2) as writer:
        writer.save(5, {})
        writer.wait()
        names = [path.name for path in list_checkpoints(tmp_path)]
        assert names == ["step-00000005", "step-00000002"]
        writer.save(6, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000006", "step-00000005"]
