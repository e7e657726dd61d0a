"""The table of what was done and what it cost."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.chaos.scenario import Incident, Verdict

COLUMNS = ("fault", "where", "moment", "recovery", "steps repeated", "equal")
HEADING = """# Chaos suite

`make test-chaos` hurts runs of a tiny chain (two workers, expert parallel size 2, ZeRO 1, fp32,
a checkpoint every {checkpoint_every} steps) at moments drawn from a seed, and compares each with
the undisturbed run: steps, the samples of each step, weights, MLflow's points, and what is left
behind. Recovery is from the strike to the end of the next training step, on {machine}.

"""


def rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Return one plain row for each fault."""
    return [
        {
            "fault": incident.fault,
            "where": verdict.testbed,
            "moment": _moment(incident),
            "recovery_s": incident.recovery_s and round(incident.recovery_s, 1),
            "steps_repeated": incident.num_repeated,
            "equal": not verdict.problems,
        }
        for verdict in verdicts
        for incident in verdict.incidents
    ]


def to_table(verdicts: Sequence[Verdict]) -> str:
    """Return all rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows(verdicts):
        recovery = "-" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
        cells = (
            row["fault"],
            row["where"],
            row["moment"],
            recovery,
            str(row["steps_repeated"]),
            "yes" if row["equal"] else "NO",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_summary(verdicts: Sequence[Verdict], num_planned: int) -> str:
    """Return one line for each kind of fault, and one for all."""
    found = rows(verdicts)
    kinds = dict.fromkeys(row["fault"] for row in found)
    lines = ["| fault | times | median recovery | most steps repeated |", "|---|---|---|---|"]
    for kind in kinds:
        of_kind = [row for row in found if row["fault"] == kind]
        times = [row["recovery_s"] for row in of_kind if row["recovery_s"] is not None]
        middle = f"{median(times):.1f} s" if times else "-"
        most = max(row["steps_repeated"] for row in of_kind)
        lines.append(f"| {kind} | {len(of_kind)} | {middle} | {most} |")
    wrong = [verdict for verdict in verdicts if verdict.problems]
    total = sum(verdict.seconds for verdict in verdicts)
    lines += [
        "",
        f"{len(found)} of {num_planned} faults in {len(verdicts)} runs, {total / 60:.0f} min; "
        f"{len(wrong)} runs lost or wrong.",
    ]
    return "\n".join(lines) + "\n"


def write(verdicts: Sequence[Verdict], num_planned: int, path: Path, checkpoint_every: int) -> None:
    """Write the report as Markdown, and its rows beside it as JSON.

    Args:
        verdicts: of all runs.
        num_planned: faults that were to be done.
        path: of the Markdown file.
        checkpoint_every: steps from one checkpoint to the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    heading = HEADING.format(checkpoint_every=checkpoint_every, machine=_machine())
    text = heading + to_summary(verdicts, num_planned) + "\n" + to_table(verdicts)
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(rows(verdicts), indent=1) + "\n", "utf-8")


def _moment(incident: Incident) -> str:
    mark = incident.mark
    if mark.point == "checkpoint":
        return f"checkpoint {mark.step}, file {mark.part}"
    return f"step {mark.step}, rank {mark.rank}, {mark.point}"


def _machine() -> str:
    import os

    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
