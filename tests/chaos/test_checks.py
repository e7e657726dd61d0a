"""The checks find what they are there to find."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.tracking import build_tracker
from tests.chaos.checks import (
    LOSS,
    Outcome,
    axis_problems,
    course_problems,
    tracking_problems,
    weight_problems,
)
from tests.chaos.marks import Mark, MarkBoard
from tests.chaos.scenario import GAP, Incident, draw_marks, measure, steps_for
from tests.chaos.trace import Attempt

CURVE = {step: float(step) for step in range(1, 7)}
SAMPLES = {(step, 0): [step] for step in CURVE}
EXPECTED = Outcome({}, CURVE, SAMPLES)


def attempt(first: int, last: int, *, began: float, **changes: Any) -> Attempt:
    steps = range(first, last + 1)
    samples = {step: [step] for step in steps} | changes.get("samples", {})
    return Attempt(0, 1, "here", began, samples, {step: began + step for step in steps})


def incident(struck: float, *resumable: int) -> Incident:
    return Incident("worker killed in forward", Mark("m", 5, 0, "forward"), struck, {*resumable})


def problems(*attempts: Attempt, incidents: tuple[Incident, ...] = ()) -> list[str]:
    return course_problems(list(attempts), list(incidents), EXPECTED, len(CURVE))


def test_a_course_with_a_restart_at_its_checkpoint_is_good() -> None:
    assert problems(attempt(1, 6, began=0)) == []
    killed = incident(5.5, 2)
    assert problems(attempt(1, 4, began=0), attempt(3, 6, began=6), incidents=(killed,)) == []


def test_faults_of_a_course_are_named() -> None:
    assert problems(attempt(1, 5, began=0)) == ["the steps [6] are missing"]
    other = attempt(1, 6, began=0, samples={3: [7]})
    assert problems(other) == ["rank 0 had other samples in the steps [3]"]
    killed = incident(5.5, 2)
    early = problems(attempt(1, 4, began=0), attempt(1, 6, began=6), incidents=(killed,))
    assert early == ["rank 0 went on from step 0, not from [2, 4]"]
    late = problems(attempt(1, 4, began=0), attempt(6, 6, began=6), incidents=(killed,))
    assert "the steps [5] are missing" in late


def test_a_curve_has_every_step_once_with_its_value() -> None:
    points = list(CURVE.items())
    assert axis_problems("log", points, CURVE) == []
    assert axis_problems("log", points[1:], CURVE) == ["log has missing steps [1]"]
    assert axis_problems("log", [*points, (2, 2.0)], CURVE) == ["log has doubled steps [2]"]
    assert axis_problems("log", [*points, (7, 7.0)], CURVE) == ["log has surplus steps [7]"]
    off = [*points[:-1], (6, float("nan"))]
    assert axis_problems("log", off, CURVE) == ["log has other losses at [6]"]


def test_weights_are_compared() -> None:
    weights = {"w": torch.ones(3)}
    assert weight_problems(weights, {"w": torch.ones(3) + 1e-7}) == []
    assert weight_problems(weights, {"w": torch.tensor([1.0, 1.0, 1.1])})
    assert weight_problems(weights, {"w": torch.tensor([1.0, 1.0, float("nan")])})
    assert weight_problems(weights, {"v": torch.ones(3)}) == ["the model has other tensors"]


def test_mlflow_is_asked_for_one_chain_with_one_stage(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = build_tracker(store, experiment="x")
    for number in range(2):
        directory = tmp_path / str(number)
        with (
            tracker.chain("x", directory, params={}, tags={}) as chain,
            chain.stage("distill", directory / "distill", params={}) as stage,
        ):
            for step, value in CURVE.items():
                stage.log_metrics(step, {LOSS: value})
        found = tracking_problems(store, "x", CURVE)
        assert found == ([] if number == 0 else ["MLflow has 4 runs, 2 of them stages"])
    assert tracking_problems(store, "y", CURVE) == ["MLflow has no such experiment"]


def test_recovery_and_repeated_steps_come_from_the_trace() -> None:
    killed = incident(5.5, 2)
    measure([killed], [attempt(1, 4, began=0), attempt(3, 6, began=20)])
    assert killed.recovery_s == pytest.approx(23 - 5.5)
    assert killed.num_repeated == 2


def test_marks_are_drawn_from_the_seed_and_far_apart() -> None:

    faults = ["worker killed in a checkpoint", "driver killed", "worker killed in backward"] * 3
    marks = draw_marks(faults, random.Random(3))
    assert marks == draw_marks(faults, random.Random(3)) != draw_marks(faults, random.Random(4))
    steps = [mark.step for mark in marks]
    assert all(later - earlier >= GAP for earlier, later in pairwise(steps))
    assert steps[-1] + GAP <= steps_for(len(faults))


def test_a_mark_stops_a_process_once(tmp_path: Path) -> None:
    board, mark = MarkBoard(tmp_path), Mark("m", 1, 0, "step")
    board.plan([mark])
    assert board.marks() == [mark] and board.reached(mark) is None
    board.release(mark)
    board.wait_here(mark, "10.0.0.1")
    first = board.reached(mark)
    assert first is not None and first.address == "10.0.0.1"
    board.wait_here(mark, "10.0.0.2")
    assert board.reached(mark) == first
