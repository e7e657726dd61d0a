"""What a layer asks of its device."""

from __future__ import annotations

import pytest
import torch

from moe_dist.moe import on_device
from moe_dist.moe.grouped_linear import can_use_grouped_mm


def test_counts_are_of_all_ids() -> None:
    ids = torch.tensor([3, 0, 3, 1])
    assert on_device.count_ids(ids, 6).tolist() == [1, 1, 0, 2, 0, 0]
    assert on_device.count_ids(ids[:0], 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("device", "capability", "hip", "expected"),
    [
        ("cuda:0", (9, 0), None, True),
        ("cuda:1", (10, 3), None, True),
        # Torch would copy the groups' sizes to the host there, and loop.
        ("cuda:0", (8, 0), None, False),
        ("cuda:0", (12, 0), None, False),
        ("cuda:0", (9, 4), "6.4", False),
        ("cpu", (9, 0), None, False),
    ],
)
def test_grouped_products_are_used_where_they_are_one_kernel(
    device: str,
    capability: tuple[int, int],
    hip: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert on_device.has_grouped_products.__wrapped__(torch.device(device)) is expected


def test_widths_must_be_multiples_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.moe.grouped_linear.has_grouped_products", lambda device: True)
    rows = torch.ones(2, 16, dtype=torch.bfloat16)
    assert can_use_grouped_mm(rows, torch.ones(2, 8, 16))
    assert not can_use_grouped_mm(rows, torch.ones(2, 12, 16))
    assert not can_use_grouped_mm(rows.float(), torch.ones(2, 8, 16))
