"""A run of two workers goes on as one, three or four, and after a crash, as if undisturbed."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException

from moe_dist.distributed import (
    TrainEngine,
    build_engine,
    checkpoint_files,
    load_checkpoint,
    spawn_gloo,
)
from moe_dist.distributed.gathering import gather_model, gather_moments
from moe_dist.losses.total import LossWeight
from moe_dist.measure.evaluation import predict
from moe_dist.metric_log import MetricLog, series
from moe_dist.training.collectives import gather_values
from moe_dist.training.loop import LoopSettings, TrainResult, train
from moe_dist.training.step import finetune_terms
from moe_dist.whole_files import flush_to_disk
from tests.training.tiny import PAD, tiny_batches, tiny_bert, tiny_data, tiny_student

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]
NUM_STEPS = 7
HALF = 3
CRASH_STATUS = 9


@dataclass(frozen=True)
class Part:
    """A stretch of training: `directory` holds its checkpoints, and its log lies beside it."""

    name: str
    directory: str
    ep_size: int = 1
    zero_stage: int = 0
    dropout: float = 0.0
    stop: int = NUM_STEPS


WHOLE = Part("whole", "whole", ep_size=2, zero_stage=1)
FIRST = Part("first", "first", ep_size=2, zero_stage=1, stop=HALF)
NOISY_WHOLE = Part("noisy-whole", "noisy-whole", ep_size=2, zero_stage=1, dropout=0.1)
NOISY_FIRST = Part("noisy-first", "noisy", ep_size=2, zero_stage=1, dropout=0.1, stop=HALF)
NOISY_SECOND = Part("noisy-second", "noisy", ep_size=2, zero_stage=1, dropout=0.1)
CRASHED = Part("crashed", "crashed", ep_size=2, zero_stage=1)
AS_ONE = Part("as-one", "one")
AS_THREE = Part("as-three", "three", zero_stage=1)
AS_FOUR = Part("as-four", "four", ep_size=4, zero_stage=2)
OTHER_SIZES = [
    pytest.param(AS_ONE, id="one"),
    pytest.param(AS_THREE, id="three"),
    # Four processes take half a minute to start; test_exactness.py resumes at four as well.
    pytest.param(AS_FOUR, id="four", marks=pytest.mark.slow),
]


def make_engine(part: Part) -> TrainEngine:
    return build_engine(
        tiny_student(tiny_bert(dropout=part.dropout)),
        learning_rate=1e-3,
        weight_decay=0.01,
        num_steps=NUM_STEPS,
        warmup_steps=2,
        eps=1e-6,
        ep_size=part.ep_size,
        zero_stage=part.zero_stage,
    )


def run_part(rank: int, world: int, root: Path, part: Part, compute: Any = finetune_terms) -> None:
    """Train a part; note what was found before it and what stood at its end."""
    engine = make_engine(part)
    batches = tiny_batches(world_size=world, rank=rank)
    found: dict[str, Tensor] = {}
    state = load_checkpoint(root / part.directory, engine)
    if state is not None:
        found = {f"loaded.{name}": value for name, value in whole_state(engine).items()}
        found["loaded.learning_rate"] = torch.tensor(engine.learning_rate, dtype=torch.float64)
        epoch, offset = divmod(state["step"], batches.steps_per_epoch)
        mine = next(iter(batches.epoch(epoch, offset))).sample_ids
        found["loaded.sample_ids"] = torch.tensor(
            sorted(sample for of_rank in gather_values(mine) for sample in of_rank)
        )
        found["loaded.logits"] = answers(engine)
    result = train_part(engine, batches, root, part, compute)
    found |= {f"end.{name}": value for name, value in whole_state(engine).items()}
    found["end.learning_rate"] = torch.tensor(engine.learning_rate, dtype=torch.float64)
    found["end.logits"] = answers(engine)
    found["resumed_from"] = torch.tensor(-1 if state is None else state["step"])
    assert result.resumed_from == (None if state is None else state["step"])
    if rank == 0:
        save_file(found, root / f"{part.name}.safetensors")


def train_part(
    engine: TrainEngine, batches: Any, root: Path, part: Part, compute: Any
) -> TrainResult:
    return train(
        engine,
        batches,
        compute,
        {"task": LossWeight(1.0)},
        settings=LoopSettings(num_steps=part.stop, seed=3, log_every=1, checkpoint_every=HALF),
        checkpoint_dir=root / part.directory,
        metric_log=MetricLog(root / f"{part.directory}.jsonl") if engine.rank == 0 else None,
    )


def whole_state(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (gather_model(engine) | gather_moments(engine)).items()}


def answers(engine: TrainEngine) -> Tensor:
    """Logits of 25 samples, which neither two nor three nor four ranks share evenly."""
    data = tiny_data(25, seed=4)
    predicted = predict(engine.module, data, batch_size=4, pad_token_id=PAD, device=engine.device)
    return predicted.answers.clone()


def run_pairs(rank: int, world: int, root: Path) -> None:
    """All parts of two workers; the last one crashes while its second checkpoint is written."""
    for part in (WHOLE, FIRST, NOISY_WHOLE, NOISY_FIRST, NOISY_SECOND):
        run_part(rank, world, root, part)
        dist.barrier()
    being_written = f"step-{2 * HALF:08d}"

    def crash(path: Path) -> None:
        if being_written in str(path):
            # Training goes on meanwhile, and logs.
            time.sleep(1)
            os._exit(CRASH_STATUS)
        flush_to_disk(path)

    with mock.patch.object(checkpoint_files, "flush_to_disk", crash):
        run_part(rank, world, root, CRASHED)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sizes")
    with pytest.raises(ProcessExitedException) as caught:
        spawn_gloo(run_pairs, 2, root)
    assert caught.value.exit_code == CRASH_STATUS
    return root


def found(root: Path, part: Part) -> dict[str, Tensor]:
    """What a part noted; the parts of other sizes run when they are first asked for."""
    path = root / f"{part.name}.safetensors"
    if not path.exists():
        shutil.copytree(root / FIRST.directory, root / part.directory)
        shutil.copy(root / f"{FIRST.directory}.jsonl", root / f"{part.directory}.jsonl")
        if part is AS_ONE:
            run_part(0, 1, root, part)
        else:
            spawn_gloo(run_part, 3 if part is AS_THREE else 4, root, part)
    return load_file(path)


def losses(root: Path, part: Part) -> tuple[list[int], list[float]]:
    return series(MetricLog(root / f"{part.directory}.jsonl").read(), "train/loss/total")


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(WHOLE, id="whole"),
        pytest.param(FIRST, id="first"),
        pytest.param(NOISY_SECOND, id="same-size"),
        *OTHER_SIZES,
    ],
)
def test_what_is_saved_is_what_ranks_held(root: Path, part: Part) -> None:
    """Weights and moments at the end of a part are, bit for bit, those of its last checkpoint."""
    held = {key.removeprefix("end."): value for key, value in found(root, part).items()}
    place = root / part.directory / f"step-{part.stop:08d}"
    stored = load_file(place / "model.safetensors") | load_file(place / "optimizer.safetensors")
    assert all(torch.equal(held[key], value) for key, value in stored.items())
    assert {key for key in held if key.startswith("exp_avg")} <= stored.keys()


@pytest.mark.parametrize("part", [pytest.param(NOISY_SECOND, id="same-size"), *OTHER_SIZES])
def test_nothing_is_lost_between_sizes(root: Path, part: Part) -> None:
    """Weights, moments and rate are exactly those before the stop, and the next samples too."""
    before = found(root, NOISY_FIRST if part is NOISY_SECOND else FIRST)
    after = found(root, part)
    assert int(after["resumed_from"]) == HALF
    compared = [key for key in before if key.startswith("end.") and key != "end.logits"]
    assert any("exp_avg_sq" in key for key in compared)
    for key in compared:
        loaded = after[key.replace("end.", "loaded.", 1)]
        assert torch.equal(loaded, before[key]), key
    torch.testing.assert_close(after["loaded.logits"], before["end.logits"], rtol=0, atol=1e-5)
    epoch, offset = divmod(HALF, tiny_batches().steps_per_epoch)
    expected = next(iter(tiny_batches().epoch(epoch, offset))).sample_ids
    assert after["loaded.sample_ids"].tolist() == sorted(expected)


def test_the_same_size_goes_on_exactly_with_dropout(root: Path) -> None:
    steps, expected = losses(root, NOISY_WHOLE)
    resumed_steps, actual = losses(root, NOISY_SECOND)
    assert resumed_steps == steps == list(range(1, NUM_STEPS + 1))
    assert actual == pytest.approx(expected, rel=1e-6)
    whole, resumed = found(root, NOISY_WHOLE), found(root, NOISY_SECOND)
    for key in [key for key in whole if key.startswith("end.")]:
        torch.testing.assert_close(resumed[key], whole[key], rtol=1e-6, atol=1e-7, msg=key)
    assert losses(root, WHOLE)[1] != pytest.approx(expected, rel=1e-3), "dropout did nothing"


@pytest.mark.parametrize("part", OTHER_SIZES)
def test_another_size_goes_on_alike(root: Path, part: Part) -> None:
    ends = [found(root, one)["end.logits"] for one in (part, WHOLE)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)
    steps, expected = losses(root, WHOLE)
    resumed_steps, actual = losses(root, part)
    assert resumed_steps == steps
    assert actual == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(expected[HALF - 1], rel=1e-3), "training did nothing"


def test_a_crash_during_a_write_resumes_before_it_and_cuts_the_log_back(root: Path) -> None:
    """The steps of the checkpoint that was not finished are logged once, when they are redone."""
    log = MetricLog(root / f"{CRASHED.directory}.jsonl")
    steps, _ = series(log.read(), "train/loss/total")
    # Training may have gone on beside the write.
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2 * HALF
    names = {path.name.partition("-")[0] for path in (root / CRASHED.directory).iterdir()}
    assert names == {"step", ".unfinished"}
    run_part(0, 1, root, Part("recovered", CRASHED.directory))
    assert int(load_file(root / "recovered.safetensors")["resumed_from"]) == HALF
    records = [record for record in log.read() if "train/loss/total" in record.metrics]
    assert [record.step for record in records] == list(range(1, NUM_STEPS + 1))
    assert losses(root, CRASHED)[1] == pytest.approx(losses(root, WHOLE)[1], rel=1e-5)
    assert not list((root / CRASHED.directory).glob(".*"))
