"""Run cases on the fake accelerator and on the CPU: `python -m tests.devices.run_cases [PART]`.

Writes to standard output one JSON line for each case, whose waits are by place.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.devices import fake_accelerator
from tests.devices.cases import Case, all_cases


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


def main(part: str) -> None:
    """Run the cases whose name holds `part`."""
    device = fake_accelerator.set_up()
    cases: Mapping[str, Case] = {n: c for n, c in all_cases().items() if part in n}
    for name, case in cases.items():
        result: dict[str, Any] = {"name": name}
        try:
            with fake_accelerator.accelerator() as watch:
                forward, backward, numbers = run_case(case, device, watch)
            result |= {"forward": forward, "backward": backward}
            expected = run_case(case, torch.device("cpu"), None)[2]
            result["differs"] = compare(numbers, expected, 1e-4 if "fp32" in name else 3e-2)
        except Exception:
            result["error"] = traceback.format_exc()
        print(json.dumps(result), flush=True)
    # Torch's guards of a device in Python abort an interpreter that takes itself apart.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
