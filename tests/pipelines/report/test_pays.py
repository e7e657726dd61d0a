"""Whether a student pays: what is said of measured speeds, and what is an error."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import MoeDistError
from moe_dist.measure.fastest import Speedup
from moe_dist.measure.latency import Latency
from pipelines.report.pays import (
    check_requirement,
    describe_reads,
    forms_table,
    judge_speed,
    speed_metrics,
)

IDLE = {"num_cores": 2, "busy_cores": 0.1, "disturbs": False}
BUSY = {"num_cores": 2, "busy_cores": 1.8, "disturbs": True}
READS = {
    "router": "token_gate",
    "num_tokens": 128,
    "once": False,
    "num_experts": 4,
    "top_k": 1,
    "distinct": 3.96,
    "weights_read": 7_000_000.0,
    "weights_of_one_choice": 1_800_000,
    "weights_held": 7_100_000,
}


def entry(form: str, *times_ms: float, flops: float = 1e7) -> dict[str, Any]:
    fastest = {
        size: {"form": form, "latency_low_ms": ms, "latency_ms": ms, "latency_spread": 0.1}
        for size, ms in zip(("1", "32"), times_ms, strict=True)
    }
    return {
        "fastest": fastest,
        "latency_low_ms": {size: 2 * one["latency_low_ms"] for size, one in fastest.items()},
        "flops_per_token": flops,
        "ffn_flops_per_token": flops / 2,
        "ffn_flops_ratio": 0.4,
    }


def speedup(
    value: float, low: float | None = None, high: float | None = None, half: int = 10
) -> dict[str, float]:
    return {"value": value, "low": low or value, "high": high or value, "half": half}


TIMED = {"seq_len": 64, "num_threads": 1, "forms": "auto", "writes": False}


def judge(
    at_1: dict[str, float],
    at_32: dict[str, float],
    other_work: dict[str, Any] = IDLE,
    required: float | None = None,
    failed: str | None = None,
    **timed: Any,
) -> dict[str, Any]:
    models = {
        "teacher": entry("lean-fp32", 11.0, 130.0, flops=2e7),
        "student": entry("lean-bf16", 10.0, 100.0) | {"expert_reads": READS},
        "dense": entry("lean-bf16", 9.0, 98.0),
    }
    speeds = {
        "speedups": {
            "dense": {"1": speedup(0.9), "32": speedup(0.98)},
            "teacher": {"1": at_1, "32": at_32},
        },
        "left_out": [],
        "tolerance": 0.05,
        "other_work": other_work,
        "timed": TIMED | timed,
        "failed": failed,
    }
    return {
        **models,
        "comparisons": ["dense"],
        "pays": judge_speed(models, speeds, required=required),
    }


def test_a_student_that_pays() -> None:
    report = judge(speedup(1.1, 1.05, 1.12), speedup(1.3))
    pays = report["pays"]
    assert pays["pays"] == {"1": True, "32": True}
    assert pays["meets"] is pays["required"] is None
    assert pays["line"] == (
        "student pays; each model in its fastest form, on random texts of 64 tokens, 1 thread: at "
        "batch 1 in lean-bf16 1.10 × as fast as "
        "its teacher in lean-fp32 (1.05 to 1.12), 0.90 × as fast as dense (0.90 to 0.90); at batch "
        "32 in lean-bf16 1.30 × as fast as its teacher in lean-fp32 (1.30 to 1.30), 0.98 × as fast "
        "as dense (0.98 to 0.98)"
    )
    # How it gets so fast is for the user to ask for; nothing else need change.
    assert pays["advice"] == [
        "student is 2.0 × as fast at batch 1 in lean-bf16, 2.0 × as fast at batch 32 in lean-bf16 "
        "as it is in eager-fp32"
    ]
    check_requirement(report, "report.json", "evaluate")


def test_one_that_pays_in_larger_batches() -> None:
    pays = judge(speedup(0.8, 0.7, 0.9), speedup(1.3))["pays"]
    assert pays["pays"] == {"1": False, "32": True}
    assert pays["line"].startswith("student pays at batch 32 and not at 1; each model")
    _, larger, reads, flops = pays["advice"]
    assert larger == "texts in batches of 32 pay, by what was measured"
    assert reads == (
        "experts read at batch 1: 4.0 of 4 in each layer by a text of 128 tokens, since token_gate "
        "chooses for each token (by the loads on the dev rows): 7.0 M of 7.1 M expert weights; a "
        "router that chooses once for a text (sentence_gate, task_gate) reads 1.8 M"
    )
    assert flops.startswith(
        "FLOPs say 2.00 × (feed-forward networks are 50% of the teacher's, of which the student "
        "leaves 60% out); fewer are needed by"
    )


def test_one_that_does_not() -> None:
    pays = judge(speedup(0.8), speedup(0.9))["pays"]
    assert pays["line"].startswith("student does not pay; each model")
    assert not any("larger" in line or "batches" in line for line in pays["advice"])


def test_the_line_says_what_was_timed() -> None:
    line = judge(speedup(1.2), speedup(1.2), forms="eager", num_threads=2, writes=True)["pays"][
        "line"
    ]
    assert line.startswith(
        "student pays; each model in eager-fp32 alone, as evaluate.forms says, on random texts of "
        "64 tokens, 2 threads (one forward pass; writing is not timed): at batch 1"
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (speedup(1.02, 1.01, 1.04), None),
        (speedup(1.05, 1.031, 1.07), True),
        (speedup(0.98, 0.96, 0.99), None),
        (speedup(0.95, 0.93, 0.969), False),
        (speedup(1.05, 1.031, 1.07, half=2), None),
        (speedup(1.2, 1.11, 1.3, half=2), True),
        (speedup(0.91, half=1), None),
        (speedup(0.89, half=1), False),
    ],
)
def test_what_is_near_a_bound_cannot_be_told(found: dict[str, float], verdict: bool | None) -> None:
    report = judge(found, speedup(1.3))
    assert report["pays"]["pays"]["1"] is verdict
    if verdict is None:
        few = ", and there are fewer than 3 passes in a half" * (found["half"] < 3)
        near = "10" if few else "3"
        assert report["pays"]["line"].startswith(
            "cannot tell whether student pays at batch 1, since it lies within "
            f"{near}% of 1 ×{few}; each"
        )


def test_identical_models_are_seldom_said_to_differ() -> None:
    drawn = np.random.default_rng(0)
    verdicts = []
    for _ in range(300):
        teacher, student = (
            Latency(tuple(10 * (1 + drawn.gamma(2.0, 0.02, size=20)))) for _ in range(2)
        )
        found = asdict(Speedup.between(teacher, student))
        verdicts.append(judge(found, speedup(1.3))["pays"]["pays"]["1"])
    assert sum(one is not None for one in verdicts) <= 3


def test_where_timing_failed_it_cannot_be_told() -> None:
    report = judge(speedup(2.0), speedup(2.0), failed="a pass failed", required=1.3)
    assert report["pays"]["pays"] == {"1": None, "32": None}
    assert report["pays"]["line"].startswith(
        "cannot tell whether student pays at batch 1 and 32, since timing the fastest forms "
        "failed: a pass failed; each model in eager-fp32, as timed for its latency, on"
    )
    with pytest.raises(MoeDistError, match="timing the fastest forms failed: a pass failed"):
        check_requirement(report, "report.json", "evaluate")


@pytest.mark.parametrize(
    ("at_1", "other_work", "said"),
    [
        (
            speedup(1.0, 0.9, 1.1),
            IDLE,
            "cannot tell whether student pays at batch 1, since the first and the second half of "
            "the passes disagree; each",
        ),
        (
            speedup(1.2),
            BUSY,
            "cannot tell whether student pays at batch 1 and 32, since other work kept 1.8 of 2 "
            "cores busy meanwhile; each",
        ),
    ],
)
def test_what_cannot_be_told(at_1: dict[str, float], other_work: dict[str, Any], said: str) -> None:
    pays = judge(at_1, speedup(1.3), other_work)["pays"]
    # Nor what a form gains, where each was timed at another moment.
    assert any("as it is in eager-fp32" in line for line in pays["advice"]) == (other_work == IDLE)
    assert pays["line"].startswith(said)


def test_a_speedup_that_is_required() -> None:
    fine = judge(speedup(1.4), speedup(1.5), required=1.3)
    assert fine["pays"]["meets"] == {"1": True, "32": True}
    check_requirement(fine, "report.json", "evaluate")

    missed = judge(speedup(1.1), speedup(1.5), required=1.3)
    assert missed["pays"]["pays"] == {"1": True, "32": True}
    assert missed["pays"]["meets"] == {"1": False, "32": True}
    with pytest.raises(MoeDistError) as caught:
        check_requirement(missed, "here/report.json", "evaluate")
    assert caught.value.message == (
        "student is not 1.3 × as fast as its teacher, as evaluate.require_speedup asks: 1.10 × "
        "(1.10 to 1.10) at batch 1, 1.50 × (1.50 to 1.50) at batch 32. All results are written: "
        "here/report.json"
    )
    assert "FLOPs say 2.00 ×" in caught.value.remedy

    much = judge(speedup(1.1), speedup(1.5), required=3.0)
    assert "less than the 3 × that is asked for" in much["pays"]["advice"][-1]


@pytest.mark.parametrize(
    ("at_1", "other_work"), [(speedup(1.3, 1.2, 1.4), IDLE), (speedup(2.0), BUSY)]
)
def test_a_required_speedup_that_cannot_be_told_is_an_error_too(
    at_1: dict[str, float], other_work: dict[str, Any]
) -> None:
    report = judge(at_1, speedup(2.0), other_work, required=1.3)
    with pytest.raises(MoeDistError) as caught:
        check_requirement(report, "report.json", "out/evaluate")
    assert caught.value.message.startswith("could not tell whether student is 1.3 × as fast as")
    assert "remove out/evaluate and start the same command again" in caught.value.remedy


def test_fastest_forms_have_a_table_and_metrics() -> None:
    report = judge(speedup(1.1), speedup(1.3))
    headings, rows = forms_table(report)
    assert len(headings) == 7
    assert rows[1] == ["student", "lean-bf16", "10.00", "1.10", "lean-bf16", "100.00", "1.30"]
    assert speed_metrics(report, ["teacher", "student"]) == {
        "teacher/fastest_latency_ms_batch_1": 11.0,
        "teacher/fastest_latency_ms_batch_32": 130.0,
        "student/fastest_latency_ms_batch_1": 10.0,
        "student/speedup_batch_1": 1.1,
        "student/fastest_latency_ms_batch_32": 100.0,
        "student/speedup_batch_32": 1.3,
    }


def test_a_router_that_chooses_once_reads_one_expert() -> None:
    once = READS | {"router": "sentence_gate", "once": True, "distinct": 1.0}
    assert describe_reads(once, "") == (
        "1 of 4 in each layer, since sentence_gate chooses once for a text: 1.8 M of 7.1 M expert "
        "weights"
    )
