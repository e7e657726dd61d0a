"""Whether a student pays: is it faster than its teacher where each is in its fastest form?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.errors import MoeDistError

from ..console import quantity
from ..stages import evaluate

ORACLE = "eager-fp32"
"""The form in which a model is trained and loaded."""
MARGIN = 0.03
"""What lies nearer to a bound cannot be told: two identical models differ by as much."""
MARGIN_OF_FEW = 0.1
"""The same where each half has fewer than `FEW` passes, as of models whose passes take long."""
FEW = 3


def judge_speed(
    models: Mapping[str, Mapping[str, Any]],
    speeds: Mapping[str, Any],
    *,
    required: float | None = None,
) -> dict[str, Any]:
    """Join what was measured of speed with what it means.

    Args:
        models: the models' entries.
        speeds: what the stage `evaluate` measured of all of them.
        required: how many times as fast as its teacher the student must be.

    Returns:
        The report's `pays`; docs/architecture.md lists its keys.
    """
    pays = verdicts(speeds, 1.0)
    meets = None if required is None else verdicts(speeds, required)
    misses = any(verdict is not True for verdict in (*pays.values(), *(meets or {}).values()))
    return {
        **speeds,
        "pays": pays,
        "required": required,
        "meets": meets,
        "line": _line(models, speeds, pays),
        "advice": [
            *(() if speeds["other_work"]["disturbs"] else _form_advice(models)),
            *(_what_would(models, pays, required) if misses else ()),
        ],
    }


def verdicts(speeds: Mapping[str, Any], least: float) -> dict[str, bool | None]:
    """Say, by batch size, whether the student is so many times as fast as its teacher.

    None where it cannot be told, see `why_unknown`.
    """
    is_blind = bool(speeds["failed"]) or speeds["other_work"]["disturbs"]
    return {
        size: None if is_blind else _verdict(one, least)
        for size, one in speeds["speedups"][evaluate.TEACHER].items()
    }


def why_unknown(speeds: Mapping[str, Any], least: float) -> str:
    """Say why it cannot be told whether the student is so many times as fast as its teacher."""
    if speeds["failed"]:
        return f"timing the fastest forms failed: {speeds['failed']}"
    other = speeds["other_work"]
    if other["disturbs"]:
        return (
            f"other work kept {other['busy_cores']:.1f} of {other['num_cores']} cores busy "
            "meanwhile"
        )
    found = speeds["speedups"][evaluate.TEACHER].values()
    reasons = [_doubt(one, least) for one in found if _verdict(one, least) is None]
    return "; ".join(dict.fromkeys(reasons))


def _verdict(one: Mapping[str, Any], least: float) -> bool | None:
    margin = _margin(one)
    if one["low"] >= least * (1 + margin):
        return True
    return False if one["high"] < least * (1 - margin) else None


def _doubt(one: Mapping[str, Any], least: float) -> str:
    if one["low"] < least <= one["high"]:
        return "the first and the second half of the passes disagree"
    few = f", and there are fewer than {FEW} passes in a half" * (one["half"] < FEW)
    return f"it lies within {_margin(one):.0%} of {least:g} ×{few}"


def _margin(one: Mapping[str, Any]) -> float:
    return MARGIN if one["half"] >= FEW else MARGIN_OF_FEW


def check_requirement(report: Mapping[str, Any], path: str, evaluated: str) -> None:
    """See that a student is as fast as the recipe asks for; else a MoeDistError.

    Args:
        report: the chain's.
        path: where it lies.
        evaluated: the directory of the stage that measured.
    """
    pays = report["pays"]
    if pays["meets"] is None or all(pays["meets"].values()):
        return
    wanted = f"{pays['required']:g} × as fast as its teacher"
    found = pays["speedups"][evaluate.TEACHER]
    shown = ", ".join(
        f"{one['value']:.2f} × ({one['low']:.2f} to {one['high']:.2f}) at batch {size}"
        for size, one in found.items()
    )
    if False not in pays["meets"].values():
        raise MoeDistError(
            f"could not tell whether {evaluate.STUDENT} is {wanted}, as evaluate.require_speedup "
            f"asks: {why_unknown(pays, pays['required'])} ({shown}). All results are written: "
            f"{path}",
            remedy=f"remove {evaluated} and start the same command again on an idle machine; only "
            "the stage evaluate is done again.",
        )
    raise MoeDistError(
        f"{evaluate.STUDENT} is not {wanted}, as evaluate.require_speedup asks: {shown}. All "
        f"results are written: {path}",
        remedy="; ".join(pays["advice"]) or "lower evaluate.require_speedup, or change the student",
    )


def forms_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each model's fastest form, its time, and the teacher's over it."""
    names = [evaluate.TEACHER, evaluate.STUDENT, *report["comparisons"]]
    sizes = list(report[evaluate.TEACHER]["fastest"])
    headings = ["model"]
    for size in sizes:
        headings += [f"fastest form, batch {size}", "ms", "× teacher"]
    rows = []
    for name in names:
        row = [name]
        for size in sizes:
            one = report[name]["fastest"][size]
            base = report[evaluate.TEACHER]["fastest"][size]["latency_low_ms"]
            row += [
                one["form"],
                f"{one['latency_low_ms']:.2f}",
                f"{base / one['latency_low_ms']:.2f}",
            ]
        rows.append(row)
    return headings, rows


def describe_reads(reads: Mapping[str, Any], source: str) -> str:
    """Say what a pass of one text reads of the experts.

    Args:
        reads: an `ExpertReads`, as plain values.
        source: what shares of tokens are assumed.

    Returns:
        Words that follow a colon.
    """
    held, once = quantity(reads["weights_held"]), quantity(reads["weights_of_one_choice"])
    if reads["once"] and reads["distinct"] == reads["top_k"]:
        return (
            f"{reads['top_k']} of {reads['num_experts']} in each layer, since {reads['router']} "
            f"chooses once for a text: {once} of {held} expert weights"
        )
    unit = "segment" if reads["once"] else "token"
    return (
        f"{reads['distinct']:.1f} of {reads['num_experts']} in each layer by a text of "
        f"{reads['num_tokens']} tokens, since {reads['router']} chooses for each {unit} "
        f"({source}): {quantity(reads['weights_read'])} of {held} expert weights; a router that "
        f"chooses once for a text (sentence_gate, task_gate) reads {once}"
    )


def flops_ratio(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> float:
    """How many times as many FLOPs a token costs the teacher."""
    return float(teacher["flops_per_token"] / student["flops_per_token"])


def speed_metrics(report: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Give the figures that the chain's own run shows."""
    found: dict[str, float] = {}
    for name in names:
        for size, one in report[name]["fastest"].items():
            base = report[evaluate.TEACHER]["fastest"][size]["latency_low_ms"]
            found[f"{name}/fastest_latency_ms_batch_{size}"] = one["latency_low_ms"]
            if name != evaluate.TEACHER:
                found[f"{name}/speedup_batch_{size}"] = base / one["latency_low_ms"]
    return found


def _line(
    models: Mapping[str, Mapping[str, Any]],
    speeds: Mapping[str, Any],
    pays: Mapping[str, bool | None],
) -> str:
    student = evaluate.STUDENT
    unknown = [size for size, verdict in pays.items() if verdict is None]
    yes = [size for size, verdict in pays.items() if verdict]
    no = [size for size, verdict in pays.items() if verdict is False]
    if unknown:
        head = f"cannot tell whether {student} pays at batch {_joined(unknown)}, since "
        head += why_unknown(speeds, 1.0)
    elif yes and no:
        head = f"{student} pays at batch {_joined(yes)} and not at {_joined(no)}"
    else:
        head = f"{student} pays" if yes else f"{student} does not pay"
    return f"{head}; each model {_timed(speeds)}: " + "; ".join(
        _at_size(models, speeds, size) for size in pays
    )


def _timed(speeds: Mapping[str, Any]) -> str:
    """Say in which form, and on what, models were timed."""
    timed = speeds["timed"]
    form = "in its fastest form"
    if timed["forms"] == "eager":
        form = f"in {ORACLE} alone, as evaluate.forms says"
    elif speeds["failed"]:
        form = f"in {ORACLE}, as timed for its latency"
    threads = f"{timed['num_threads']} thread{'s' * (timed['num_threads'] != 1)}"
    passes = " (one forward pass; writing is not timed)" * timed["writes"]
    return f"{form}, on random texts of {timed['seq_len']} tokens, {threads}{passes}"


def _at_size(models: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, Any], size: str) -> str:
    own = models[evaluate.STUDENT]["fastest"][size]["form"]
    parts = []
    # The teacher first: it is what a student must beat to pay.
    others = speeds["speedups"]
    for name in sorted(others, key=lambda name: name != evaluate.TEACHER):
        form = models[name]["fastest"][size]["form"]
        form = "" if form == own else f" in {form}"
        called = "its teacher" if name == evaluate.TEACHER else name
        one = others[name][size]
        parts.append(
            f"{one['value']:.2f} × as fast as {called}{form} ({one['low']:.2f} to "
            f"{one['high']:.2f})"
        )
    return f"at batch {size} in {own} " + ", ".join(parts)


def _form_advice(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what the student gains by its form, which a user has to ask for."""
    found = {}
    for size, one in models[evaluate.STUDENT]["fastest"].items():
        eager_ms = models[evaluate.STUDENT]["latency_low_ms"][size]
        gain = eager_ms / one["latency_low_ms"]
        if one["form"] != ORACLE and gain > 1:
            found[size] = f"{gain:.1f} × as fast at batch {size} in {one['form']}"
    if not found:
        return []
    return [f"{evaluate.STUDENT} is " + ", ".join(found.values()) + f" as it is in {ORACLE}"]


def _what_would(
    models: Mapping[str, Mapping[str, Any]],
    pays: Mapping[str, bool | None],
    required: float | None,
) -> list[str]:
    """Say what makes the student faster, by what was measured and by FLOPs alone."""
    student, teacher = models[evaluate.STUDENT], models[evaluate.TEACHER]
    advice = []
    larger = [size for size, verdict in pays.items() if verdict]
    misses = [size for size, verdict in pays.items() if verdict is False]
    if larger and misses and int(larger[-1]) > int(misses[0]):
        advice.append(f"texts in batches of {_joined(larger)} pay, by what was measured")
    reads = student.get("expert_reads")
    if reads is not None and reads["distinct"] > reads["top_k"]:
        said = describe_reads(reads, "by the loads on the dev rows")
        advice.append(f"experts read at batch 1: {said}")
    ratio = flops_ratio(teacher, student)
    share = teacher["ffn_flops_per_token"] / teacher["flops_per_token"]
    line = (
        f"FLOPs say {ratio:.2f} × (feed-forward networks are {share:.0%} of the teacher's, of "
        f"which the student leaves {1 - student['ffn_flops_ratio']:.0%} out)"
    )
    if required is not None and required > ratio:
        line += f", less than the {required:g} × that is asked for"
    more = "smaller experts (moe.expert_size) and by a student of fewer or narrower layers"
    return [*advice, f"{line}; fewer are needed by {more}"]


def _joined(sizes: Sequence[str]) -> str:
    return " and ".join(sizes)
