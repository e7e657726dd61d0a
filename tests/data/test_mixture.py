"""Mixing tasks: shares, the order of steps, and starting anywhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.data.loaders import Encoded, StepBatch, TrainBatches
from moe_dist.data.metrics import METRICS
from moe_dist.data.mixture import MEAN, MixtureBatches, joined_metrics, load_rows, mixing_shares
from moe_dist.errors import DataError
from tests.data.test_loaders import synthetic

SIZES = {"big": 97, "small": 24}


def mixture(*, world_size: int = 1, rank: int = 0, **changes: Any) -> MixtureBatches:
    parts = {
        name: TrainBatches(
            named(size, number), batch_size=8, world_size=world_size, rank=rank, seed=3
        )
        for number, (name, size) in enumerate(SIZES.items())
    }
    shares = changes.pop("shares", mixing_shares(list(SIZES.values())))
    return MixtureBatches(parts, shares, seed=3)


def named(size: int, number: int) -> Encoded:
    """Samples whose ids tell the task."""
    encoded = synthetic(size, seed=number)
    encoded.sample_ids[:] += 1000 * number
    return encoded


def facts(batch: StepBatch) -> tuple[str, tuple[int, ...]]:
    return batch.task_name, tuple(sorted(batch.sample_ids))


def test_shares_follow_the_size_or_its_root() -> None:
    assert mixing_shares([300, 100]) == (0.75, 0.25)
    assert mixing_shares([300, 100], "size") == (0.75, 0.25)
    assert mixing_shares([400, 100], "temperature") == pytest.approx((2 / 3, 1 / 3))
    assert mixing_shares([400, 100], "temperature", 1e6) == pytest.approx((0.5, 0.5), abs=1e-4)


def test_a_step_is_of_one_task_and_tasks_have_their_shares() -> None:
    batches = mixture()
    assert batches.steps_per_epoch == 121 // 8
    for epoch in range(4):
        steps = list(batches.epoch(epoch))
        assert len(steps) == batches.steps_per_epoch
        for step in steps:
            assert {sample // 1000 for sample in step.sample_ids} == {step.task}
            assert step.task_name == list(SIZES)[step.task or 0]
        small = sum(step.task_name == "small" for step in steps)
        assert abs(small - 15 * 24 / 121) <= 1
    orders = {tuple(batches.tasks_of(epoch).tolist()) for epoch in range(4)}
    assert len(orders) == 4


def test_every_sample_of_a_task_comes_before_one_comes_again() -> None:
    seen = [
        step.sample_ids
        for epoch in range(4)
        for step in mixture().epoch(epoch)
        if step.task_name == "small"
    ]
    first = [sample for ids in seen[:3] for sample in ids]
    assert sorted(first) == list(range(1000, 1024))


@pytest.mark.parametrize(("epoch", "start"), [(0, 4), (1, 0), (2, 14)])
def test_it_starts_anywhere_as_if_it_had_run_from_the_beginning(epoch: int, start: int) -> None:
    batches = mixture()
    whole = [facts(step) for number in range(3) for step in batches.epoch(number)]
    position = epoch * batches.steps_per_epoch + start
    resumed = [facts(step) for step in islice(mixture().epoch(epoch, start), 2)]
    assert resumed == whole[position : position + len(resumed)]


def test_ranks_share_the_same_global_steps() -> None:
    ranks = [list(mixture(world_size=2, rank=rank).epoch(1)) for rank in range(2)]
    for one, *parts in zip(mixture().epoch(1), *ranks, strict=True):
        assert {part.task for part in parts} == {one.task}
        shared = [sample for part in parts for sample in part.sample_ids]
        assert sorted(shared) == sorted(one.sample_ids)
        assert {part.num_tokens for part in parts} == {one.num_tokens}


def test_a_task_without_a_share_has_no_step() -> None:
    tasks = np.concatenate([mixture(shares=(0.0, 1.0)).tasks_of(epoch) for epoch in range(9)])
    assert set(tasks.tolist()) == {1}


def test_metrics_of_one_task_keep_their_names() -> None:
    assert joined_metrics({"": {"accuracy": 0.5}}) == {"accuracy": 0.5}
    joined = joined_metrics({"a": {"f1": 0.5, "accuracy": 0.9}, "b": {"pearson": 0.7}})
    assert next(iter(joined)) == MEAN
    assert joined == {
        MEAN: pytest.approx(0.6),
        "a/f1": 0.5,
        "a/accuracy": 0.9,
        "b/pearson": 0.7,
    }


def test_main_metrics_of_opposite_directions_have_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\n" + "".join(f"word{i} here\t{i % 2}\n" for i in range(8)))
    own = {
        "source": "files",
        "train": str(rows),
        "dev": str(rows),
        "text_columns": ["text"],
        "label_column": "label",
    }
    tasks = {"one": own | {"metrics": ["accuracy"]}, "two": own | {"metrics": ["f1"]}}
    assert load_rows({"tasks": tasks, "seed": 0}).higher_is_better
    lower = replace(METRICS["f1"], higher_is_better=False)
    monkeypatch.setitem(METRICS, "f1", lower)
    said = "accuracy of one the higher, f1 of two the lower"
    with pytest.raises(DataError, match=said):
        load_rows({"tasks": tasks, "seed": 0})
    assert not load_rows({"tasks": {"two": tasks["two"]}, "seed": 0}).higher_is_better
