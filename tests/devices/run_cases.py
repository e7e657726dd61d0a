"""Run cases on the fake accelerator and on the CPU: `python -m tests.devices.run_cases [PART]`.

Writes to standard output one JSON line for each case whose name holds PART, with the waits by
place. With `--commit` it writes their numbers into the table of all cases instead.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_dist.moe import grouped_linear
from tests.devices import fake_accelerator
from tests.devices.cases import all_cases
from tests.devices.layer_cases import faulty_cases
from tests.devices.prepared import OLDER, Case

TABLE = Path(__file__).with_name("waits.json")


def run_case(case: Case, device: torch.device, watch: fake_accelerator.Watch | None) -> Any:
    """Give waits of forward and backward, and the numbers that came out."""
    prepared = case(device)
    if watch is not None:
        watch.taken()
    found = prepared.forward()
    forward = dict(watch.taken()) if watch is not None else {}
    grads: list[Tensor | None] = []
    if found.requires_grad:
        found.backward()
        grads = [leaf.grad for leaf in prepared.leaves]
    backward = dict(watch.taken()) if watch is not None else {}
    numbers = [found, *(grad for grad in grads if grad is not None)]
    return forward, backward, [one.detach().to("cpu").double() for one in numbers]


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str:
    """Say what differs."""
    if len(found) != len(expected):
        return f"{len(found)} gradients where the CPU has {len(expected)}"
    for own, other in zip(found, expected, strict=True):
        gap = (own - other).abs().max() if own.numel() else torch.zeros(())
        limit = tolerance * max(1.0, float(other.abs().max()) if other.numel() else 0.0)
        if not float(gap) <= limit:
            return f"a value of shape {tuple(own.shape)} is off by {float(gap):.3g}"
    return ""


def _is_new(name: str) -> Callable[[torch.device], bool]:
    """Whether the accelerator multiplies groups in one kernel, as a case asks for."""
    return lambda device: device.type == fake_accelerator.NAME and not name.endswith(OLDER)


def run_all(cases: Mapping[str, Case]) -> Iterator[dict[str, Any]]:
    """Give for each case its waits, and an error or what differs from the CPU."""
    device = fake_accelerator.set_up()
    for name, case in cases.items():
        result: dict[str, Any] = {"name": name}
        try:
            with (
                fake_accelerator.accelerator() as watch,
                mock.patch.object(grouped_linear, "has_grouped_products", _is_new(name)),
            ):
                forward, backward, numbers = run_case(case, device, watch)
            result |= {"forward": forward, "backward": backward}
            expected = run_case(case, torch.device("cpu"), None)[2]
            result["differs"] = compare(numbers, expected, 3e-2 if "bf16" in name else 1e-4)
        except Exception:
            result["error"] = traceback.format_exc()
        yield result


def main(part: str) -> None:
    """Run the cases whose name holds `part`, or all for the table."""
    if part == "--commit":
        table: dict[str, list[int]] = {}
        for result in run_all(all_cases()):
            if "error" in result:
                sys.exit(f"{result['name']}: {result['error']}")
            table[result["name"]] = [sum(result[way].values()) for way in ("forward", "backward")]
        rows = [f"  {json.dumps(name)}: {json.dumps(waits)}" for name, waits in table.items()]
        TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    else:
        cases = all_cases() | faulty_cases()
        for result in run_all({name: case for name, case in cases.items() if part in name}):
            print(json.dumps(result), flush=True)
    # Torch's guards of a device in Python abort an interpreter that takes itself apart.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
