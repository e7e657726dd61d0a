"""What forms cost: figures of speed are an extra that nothing else is lost by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.measure.latency import Latency
from moe_dist.tasks import TASK_KINDS
from pipelines.report.cost import describe_timing, form_settings, measure_forms
from tests.conversion.dense_models import tiny_model


def stage(said: list[str]) -> Any:
    return SimpleNamespace(
        console=SimpleNamespace(
            progress=lambda done, total: None, note=said.append, warn=said.append
        )
    )


def times(at_1: float, at_32: float) -> dict[int, Latency]:
    return {1: Latency((at_1,) * 4), 32: Latency((at_32,) * 4)}


@pytest.fixture
def models() -> dict[str, Any]:
    return {name: tiny_model("bert").eval() for name in ("teacher", "student")}


def test_what_was_timed_before_is_taken_where_nothing_can_be_timed(
    models: dict[str, Any],
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nsomewhere")

    models["student"].register_forward_pre_hook(fail)
    eager = {"teacher": times(10.0, 90.0), "student": times(5.0, 100.0)}
    said: list[str] = []
    timing = describe_timing([], 8, "auto")
    entries, speeds = measure_forms(models, "student", stage(said), eager, timing)
    assert entries["student"]["fastest"]["32"] == {
        "form": "eager-fp32",
        "error": 0.0,
        "latency_ms": 100.0,
        "latency_low_ms": 100.0,
        "latency_spread": 0.0,
    }
    assert speeds["speedups"]["teacher"]["1"] == {"value": 2, "low": 2, "high": 2, "half": 2}
    assert speeds["failed"] == "a pass at batch 1 failed with RuntimeError: out of memory"
    assert said == [f"the fastest forms could not be timed: {speeds['failed']}"]


def test_the_search_for_forms_can_be_turned_off() -> None:
    """What was timed as it is is not timed once more: there are no models here to be."""
    said: list[str] = []
    timing = describe_timing([], 8, "eager")
    eager = {"teacher": times(10.0, 90.0), "student": times(5.0, 100.0)}
    entries, speeds = measure_forms({}, "student", stage(said), eager, timing)
    fastest = [one for entry in entries.values() for one in entry["fastest"].values()]
    assert {one["form"] for one in fastest} == {"eager-fp32"}
    assert [one["latency_low_ms"] for one in fastest] == [10.0, 90.0, 5.0, 100.0]
    assert speeds["speedups"]["teacher"]["32"]["value"] == 0.9
    assert speeds["left_out"] == said == [] and speeds["failed"] is speeds["other_work"] is None
    assert form_settings("eager") != form_settings("auto")


@pytest.mark.parametrize(
    ("kinds", "writes"),
    [
        (("classification", "regression"), False),
        (("causal_lm",), True),
        (("classification", "seq2seq"), True),
    ],
)
def test_kinds_that_write_are_known(kinds: tuple[str, ...], writes: bool) -> None:
    timing = describe_timing([TASK_KINDS[kind] for kind in kinds], 8, "auto")
    assert timing["writes"] is writes
    assert (timing["seq_len"], timing["forms"]) == (8, "auto")
