"""What models cost: parameters, FLOPs, and time on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.measure.fastest import Fastest
    from moe_dist.measure.latency import Latency, OtherWork, Rounds
    from moe_dist.tasks import TaskKind

    from ..chain.stage import StageWork

LATENCY_BATCH_SIZES = (1, 32)
LATENCY_SEQ_LEN = 128
LATENCY_ROUNDS = 10
MIN_LATENCY_ROUNDS = 3
LATENCY_BUDGET_S = 7.0
"""For each batch size: a large batch's times vary little, and its passes are the long ones."""
LATENCY_REPEATS = 2
FORM_ROUNDS = 10
MIN_FORM_ROUNDS = 3
FORM_BUDGET_S = 3.0
"""For each batch size; there are further figures to time a model by, so this may be short."""

FORM_RULES = 2
"""Raised when what is found of forms is written otherwise."""


def time_eager(
    loaded: Mapping[str, Any], seq_len: int, stage: StageWork
) -> dict[str, dict[int, Latency]]:
    """Time all models, by name and batch size, in turn in this process, each as it is."""
    from moe_dist.measure.latency import measure_in_turn

    timed: dict[str, dict[int, Latency]] = {name: {} for name in loaded}
    for size in LATENCY_BATCH_SIZES:
        found = measure_in_turn(
            loaded,
            latency_rounds(),
            batch_sizes=(size,),
            seq_len=seq_len,
            progress=stage.console.progress,
        )
        for name, by_size in found.items():
            timed[name] |= by_size
    return timed


def describe_cost(
    loaded: Mapping[str, Any], seq_len: int, eager: Mapping[str, Mapping[int, Latency]]
) -> dict[str, dict[str, Any]]:
    """Count parameters and FLOPs, and say what `time_eager` found.

    Args:
        loaded: model by name.
        seq_len: tokens per sequence.
        eager: times by name and batch size.

    Returns:
        For each model `shape`, `parameters`, `flops_per_token`, `ffn_flops_per_token`, and by batch
        size `latency_ms` (the median), `latency_low_ms` and `latency_spread`.
    """
    from moe_dist.measure.profile import count_parameters, flops_per_token, model_shape

    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.items():
        parameters = count_parameters(model)
        flops = flops_per_token(model, seq_len)
        costs[name] = {
            "shape": model_shape(model),
            "parameters": {"total": parameters.total, "active": parameters.active},
            "flops_per_token": flops.total,
            "ffn_flops_per_token": flops.ffn,
            "latency_ms": _by_size(eager[name], "median_ms"),
            "latency_low_ms": _by_size(eager[name], "low_ms"),
            "latency_spread": _by_size(eager[name], "spread"),
        }
    return costs


def measure_forms(
    loaded: Mapping[str, Any],
    student: str,
    stage: StageWork,
    eager: Mapping[str, Mapping[int, Latency]],
    timed: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Time all models once more, each in its fastest form, unless one form is to be timed.

    Args:
        loaded: model by name.
        student: the one whose speed counts.
        stage: the stage that asks; it says which forms are left out.
        eager: by `time_eager`, which is taken where this fails, and where there is no other form.
        timed: as by `describe_timing`.

    Returns:
        For each model `fastest` by batch size. And for all of them `speedups`, the student's over
        each other's by batch size, `left_out`, `tolerance`, `other_work` (None if it is that of
        `time_eager`), `timed`, and `failed`, why nothing was measured, or None.
    """
    from moe_dist.measure.fastest import find_fastest
    from moe_dist.measure.latency import Rounds

    if timed["forms"] == "eager":
        return _described(_as_timed_before(eager), (), student, timed)
    try:
        found = find_fastest(
            loaded,
            Rounds(FORM_ROUNDS, MIN_FORM_ROUNDS, FORM_BUDGET_S, LATENCY_REPEATS, num_warmups=1),
            batch_sizes=LATENCY_BATCH_SIZES,
            seq_len=timed["seq_len"],
            progress=stage.console.progress,
        )
    except Exception as fault:
        # Whether a student pays is an extra; quality and cost must not be lost by it.
        why = (str(fault).splitlines() or [type(fault).__name__])[0]
        stage.console.warn(f"the fastest forms could not be timed: {why}")
        return _described(_as_timed_before(eager), (), student, timed, failed=why)
    for line in found.left_out:
        stage.console.note(f"not counted as a fastest form: {line}")
    work = describe_other_work(found.other_work)
    return _described(found.by_model, found.left_out, student, timed, other_work=work)


def _described(
    by_model: Mapping[str, Mapping[int, Fastest]],
    left_out: Sequence[str],
    student: str,
    timed: Mapping[str, Any],
    *,
    other_work: Mapping[str, Any] | None = None,
    failed: str | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Put what was found into plain values, see `measure_forms`."""
    from moe_dist.measure.fastest import Speedup
    from moe_dist.measure.screening import TOLERANCE

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
        for name, by_size in by_model.items()
    }
    own = by_model[student]
    speedups = {
        name: {
            str(size): asdict(Speedup.between(one.latency, own[size].latency))
            for size, one in by_size.items()
        }
        for name, by_size in by_model.items()
        if name != student
    }
    return entries, {
        "speedups": speedups,
        "left_out": list(left_out),
        "tolerance": TOLERANCE,
        "other_work": other_work,
        "timed": dict(timed),
        "failed": failed,
    }


def _as_timed_before(
    eager: Mapping[str, Mapping[int, Latency]],
) -> dict[str, dict[int, Fastest]]:
    """Take the eager form for the fastest."""
    from moe_dist.inference.backends import ORACLE
    from moe_dist.measure.fastest import Fastest

    return {
        name: {size: Fastest(str(ORACLE), one, 0.0) for size, one in by_size.items()}
        for name, by_size in eager.items()
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
    """Say how often models are timed for a report, at each batch size."""
    from moe_dist.measure.latency import Rounds

    return Rounds(
        LATENCY_ROUNDS, MIN_LATENCY_ROUNDS, LATENCY_BUDGET_S, LATENCY_REPEATS, num_warmups=1
    )
