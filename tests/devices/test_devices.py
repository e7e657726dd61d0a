"""Ready for an accelerator, shown without one: no tensor on the wrong device, no needless wait.

All cases run in one process of their own, since the fake device changes torch for good.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.devices.cases import all_cases
from tests.devices.layer_cases import FAULTS, LOUD_FAULTS, faulty_cases
from tests.devices.prepared import OLDER
from tests.devices.run_cases import TABLE

# Half a minute of one quiet core, all in the first test's fixture.
pytestmark = pytest.mark.timeout(900)
WAITS: dict[str, list[int]] = json.loads(TABLE.read_text(encoding="utf-8"))
CASES = list(all_cases())


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What every case gave, by its name."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.devices.run_cases"],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line for line in lines}
    assert list(found) == [*CASES, *faulty_cases()], done.stderr[-3000:]
    return found


def waits_of(result: dict[str, Any]) -> list[int]:
    return [sum(result[way].values()) for way in ("forward", "backward")]


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_an_accelerator_as_on_a_cpu(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    assert "error" not in result, result["error"]
    assert not result["differs"], result["differs"]
    assert waits_of(result) == WAITS[name], (
        f"the host waits {result['forward']} in forward and {result['backward']} in backward; "
        "if that must be, commit it: python -m tests.devices.run_cases --commit"
    )


def test_the_table_has_every_case() -> None:
    assert list(WAITS) == CASES


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("layer")])
def test_no_layer_in_bf16_keeps_the_host_waiting(name: str) -> None:
    if "bf16" in name and OLDER not in name and "merged" not in name:
        assert WAITS[name] == [0, 0]
    # Elsewhere one read of the experts' numbers of tokens; a merge has to know who is merged.
    assert WAITS[name][0] <= 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wait_is_counted(fault: str, results: dict[str, Any]) -> None:
    result = results[f"fault: {fault}"]
    assert "error" not in result, result["error"]
    assert waits_of(result) == list(FAULTS[fault]) and not result["differs"]


@pytest.mark.parametrize("fault", LOUD_FAULTS)
def test_a_fault_is_found(fault: str, results: dict[str, Any]) -> None:
    result = results[f"fault: {fault}"]
    assert LOUD_FAULTS[fault] in result.get("error", "") + result.get("differs", "")
