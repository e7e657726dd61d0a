"""JSON lines: nothing else on standard output, whatever is printed beside them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from pipelines.json_console import JsonConsole


def test_events_are_plain_objects_without_nan_or_secrets() -> None:
    stream = StringIO()
    console = JsonConsole(stream)
    console.planned(["adapt", "distill"])
    console.stage_started("distill", resumed=False)
    console.progress(10, 20, {"loss": math.nan}, {"task": 0.5})
    console.warn("token hf_abcdefghijklmnopqrstuvwxyz012345")
    console.stage_finished("distill", 1.5, {"accuracy": 0.9})
    console.document({"event": "report", "report": {"retention": math.inf}}, lambda: None)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "planned",
        "stage_started",
        "progress",
        "warning",
        "stage_finished",
        "report",
    ]
    assert events[2] == {
        "event": "progress",
        "stage": "distill",
        "step": 10,
        "total": 20,
        "figures": {"loss": None},
        "terms": {"task": 0.5},
    }
    assert "hf_abc" not in stream.getvalue()
    assert events[-1]["report"] == {"retention": None}


def test_quiet_keeps_warnings_and_results() -> None:
    stream = StringIO()
    console = JsonConsole(stream, quiet=True)
    console.note("chatter")
    console.stage_started("adapt", resumed=False)
    console.progress(1, 2)
    console.warn("slow")
    console.document({"event": "finished", "stage": "adapt"}, lambda: None)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [
        "warning",
        "finished",
    ]


def test_a_command_prints_json_lines_only(
    write_recipe: Callable[[dict[str, Any]], Path], tiny_settings: dict[str, Any]
) -> None:
    answer = json_lines("finetune-teacher", str(write_recipe(tiny_settings)), "--json")
    kinds = [event["event"] for event in answer]
    assert {"planned", "stage_started", "progress", "stage_finished"} <= set(kinds)
    assert kinds[-1] == "finished"
    assert answer[-1]["outputs"]["model"].endswith("model")
    broken = json_lines("compress", "no-such.yaml", "--json", code=2)
    assert [event["event"] for event in broken] == ["error"]


def json_lines(*words: str, code: int = 0) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
