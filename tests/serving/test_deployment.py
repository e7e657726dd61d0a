"""What is counted, with counters that take no 0, as those of Ray."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.serving.batching import BatchFacts


class StrictCounter:
    """Refuses what Ray's refuses."""

    found: dict[str, float]

    def __init__(self, name: str, description: str, **options: Any) -> None:
        self._name = name

    def inc(self, value: float) -> None:
        if value <= 0:
            raise ValueError(f"{value} is no increase")
        self.found[self._name] = value

    observe = inc


def test_texts_without_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = pytest.importorskip("moe_dist.serving.deployment")
    for name in ("Counter", "Histogram"):
        monkeypatch.setattr(deployment.metrics, name, StrictCounter)
    monkeypatch.setattr(StrictCounter, "found", {}, raising=False)
    counters = deployment.Counters()
    counters.count_batch(BatchFacts(num_texts=2, num_tokens=0, num_padded=0))
    assert StrictCounter.found == {"moe_dist_texts": 2, "moe_dist_batch_size": 2}
    counters.count_batch(BatchFacts(num_texts=1, num_tokens=5, num_padded=3))
    assert StrictCounter.found == {
        "moe_dist_texts": 1,
        "moe_dist_tokens": 5,
        "moe_dist_padding_tokens": 3,
        "moe_dist_batch_size": 1,
    }
