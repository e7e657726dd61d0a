"""What models cost: parameters, FLOPs, and time on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.measure.latency import Latency, OtherWork, Rounds
    from moe_dist.tasks import TaskKind

    from ..chain.stage import StageWork

LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 10
MIN_LATENCY_ROUNDS = 3
LATENCY_BUDGET_S = 20.0
LATENCY_REPEATS = 2
FORM_ROUNDS = 10
MIN_FORM_ROUNDS = 3
FORM_BUDGET_S = 3.0
"""For each batch size; there are further figures to time a model by, so this may be short."""

FORM_RULES = 2
"""Raised when what is found of forms is written otherwise."""


def measure_cost(
    loaded: Mapping[str, Any], seq_len: int, stage: StageWork
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and time all models in turn in this process.

    Args:
        loaded: model by name.
        seq_len: tokens per sequence.
        stage: the stage that asks.

    Returns:
        For each model `shape`, `parameters`, `flops_per_token`, `ffn_flops_per_token`, and by batch
        size `latency_ms` (the median), `latency_low_ms` and `latency_spread`.
    """
    from moe_dist.measure.latency import measure_in_turn
    from moe_dist.measure.profile import count_parameters, flops_per_token, model_shape

    timed = measure_in_turn(
        loaded,
        latency_rounds(),
        batch_sizes=LATENCY_BATCH_SIZES,
        seq_len=seq_len,
        progress=stage.console.progress,
    )
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "shape": model_shape(model),
            "parameters": {"total": parameters.total, "active": parameters.active},
            "flops_per_token": flops.total,
            "ffn_flops_per_token": flops.ffn,
            "latency_ms": _by_size(timed[name], "median_ms"),
            "latency_low_ms": _by_size(timed[name], "low_ms"),
            "latency_spread": _by_size(timed[name], "spread"),
        }
    return costs


def measure_forms(
    loaded: Mapping[str, Any],
    student: str,
    stage: StageWork,
    costs: Mapping[str, Mapping[str, Any]],
    timed: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Time all models once more, each in its fastest form.

    Args:
        loaded: model by name.
        student: the one whose speed counts.
        stage: the stage that asks; it says which forms are left out.
        costs: of each model by `measure_cost`, which are taken where this fails.
        timed: as by `describe_timing`.

    Returns:
        For each model `fastest` by batch size. And for all of them `speedups`, the student's over
        each other's by batch size, `left_out`, `tolerance`, `other_work`, `timed`, and `failed`,
        why nothing was measured, or None.
    """
    from moe_dist.inference.backends import QUICK_FORMS
    from moe_dist.measure.fastest import Speedup, find_fastest
    from moe_dist.measure.latency import Rounds
    from moe_dist.measure.screening import TOLERANCE

    try:
        found = find_fastest(
            loaded,
            Rounds(FORM_ROUNDS, MIN_FORM_ROUNDS, FORM_BUDGET_S, LATENCY_REPEATS, num_warmups=1),
            batch_sizes=LATENCY_BATCH_SIZES,
            seq_len=timed["seq_len"],
            forms=() if timed["forms"] == "eager" else QUICK_FORMS,
            progress=stage.console.progress,
        )
    except Exception as fault:
        # Whether a student pays is an extra; quality and cost must not be lost by it.
        why = (str(fault).splitlines() or [type(fault).__name__])[0]
        stage.console.warn(f"the fastest forms could not be timed: {why}")
        return _as_timed_before(costs, student, why, timed)
    for line in found.left_out:
        stage.console.note(f"not counted as a fastest form: {line}")
    entries: dict[str, dict[str, Any]] = {
        name: {
            "fastest": {
                str(size): {
                    "form": one.form,
                    "latency_ms": round(one.latency.median_ms, 3),
                    "latency_low_ms": round(one.latency.low_ms, 3),
                    "latency_spread": round(one.latency.spread, 3),
                    "error": one.error,
                }
                for size, one in by_size.items()
            }
        }
        for name, by_size in found.by_model.items()
    }
    own = found.by_model[student]
    speedups = {
        name: {
            str(size): asdict(Speedup.between(one.latency, own[size].latency))
            for size, one in by_size.items()
        }
        for name, by_size in found.by_model.items()
        if name != student
    }
    return entries, {
        "speedups": speedups,
        "left_out": list(found.left_out),
        "tolerance": TOLERANCE,
        "other_work": describe_other_work(found.other_work),
        "timed": dict(timed),
        "failed": None,
    }


def describe_timing(kinds: Iterable[TaskKind], seq_len: int, forms: str) -> dict[str, Any]:
    """Say what is timed: `seq_len`, `num_threads`, `forms` as in the recipe, and `writes`.

    The last is whether models of these kinds of tasks write texts, token by token, of which one
    pass says little.
    """
    import torch

    return {
        "seq_len": seq_len,
        "num_threads": torch.get_num_threads(),
        "forms": forms,
        "writes": any(kind.writes or kind.auto_class == "AutoModelForCausalLM" for kind in kinds),
    }


def _as_timed_before(
    costs: Mapping[str, Mapping[str, Any]], student: str, why: str, timed: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Give what `measure_cost` found in the place of `measure_forms`, with the reason."""
    from moe_dist.inference.backends import ORACLE
    from moe_dist.measure.screening import TOLERANCE

    figures = ("latency_ms", "latency_low_ms", "latency_spread")
    entries: dict[str, dict[str, Any]] = {
        name: {
            "fastest": {
                size: {"form": str(ORACLE), "error": 0.0}
                | {figure: cost[figure][size] for figure in figures}
                for size in cost["latency_low_ms"]
            }
        }
        for name, cost in costs.items()
    }
    own = costs[student]["latency_low_ms"]
    speedups = {
        name: {
            size: dict.fromkeys(("value", "low", "high"), low_ms / own[size]) | {"half": 0}
            for size, low_ms in cost["latency_low_ms"].items()
        }
        for name, cost in costs.items()
        if name != student
    }
    return entries, {
        "speedups": speedups,
        "left_out": [],
        "tolerance": TOLERANCE,
        "other_work": None,
        "timed": dict(timed),
        "failed": why,
    }


def describe_other_work(work: OtherWork) -> dict[str, Any]:
    """Say what other processes did while models were timed, as plain values."""
    import torch

    return {
        "num_cores": work.num_cores,
        "busy_cores": round(work.busy_cores, 2),
        "disturbs": work.disturbs(torch.get_num_threads()),
    }


def count_reads(
    loaded: Mapping[str, Any], loads: Mapping[str, Mapping[str, Sequence[float]]], seq_len: int
) -> dict[str, dict[str, Any]]:
    """Give, for each model that chooses experts, `expert_reads` of one text by measured loads."""
    from moe_dist.measure.profile import expert_reads

    found = {name: expert_reads(model, seq_len, loads.get(name)) for name, model in loaded.items()}
    return {
        name: {"expert_reads": asdict(reads)} for name, reads in found.items() if reads is not None
    }


def form_settings(forms: str) -> list[Any]:
    """What the figures of fastest forms depend on, for the stage's fingerprint."""
    from moe_dist.inference.backends import QUICK_FORMS
    from moe_dist.measure.screening import TOLERANCE

    return [[str(form) for form in QUICK_FORMS], TOLERANCE, FORM_ROUNDS, FORM_RULES, forms]


def _by_size(timed: Mapping[int, Latency], figure: str) -> dict[str, float]:
    return {str(size): round(getattr(one, figure), 3) for size, one in timed.items()}


def latency_rounds() -> Rounds:
    """Say how often models are timed for a report."""
    from moe_dist.measure.latency import Rounds

    return Rounds(
        LATENCY_ROUNDS, MIN_LATENCY_ROUNDS, LATENCY_BUDGET_S, LATENCY_REPEATS, num_warmups=1
    )
