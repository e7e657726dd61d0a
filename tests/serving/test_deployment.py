"""What is counted, with counters that take no 0, as those of Ray; when a replica leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.serving.batching import BatchFacts, ModelGoneError
from moe_dist.serving.requests import HttpAnswer


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


class EndedService:
    """Its model has ended, or hangs."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    async def handle(self, request: Any) -> HttpAnswer:
        return HttpAnswer(503, {"error": "ask again later"})

    def check(self) -> None:
        raise self.fault


@pytest.mark.parametrize(
    ("fault", "codes"), [(ModelGoneError("SIGKILL"), [1, 1]), (RuntimeError("it hangs"), [])]
)
def test_a_replica_whose_model_has_ended_answers_and_leaves(
    fault: Exception, codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = pytest.importorskip("moe_dist.serving.deployment")
    left: list[int] = []
    monkeypatch.setattr(deployment, "LEAVE_S", 0.01)
    monkeypatch.setattr(deployment.os, "_exit", left.append)
    replica = object.__new__(deployment.ServedModel)
    replica._service = EndedService(fault)
    request = SimpleNamespace(
        scope={"path": "/predict"}, method="POST", headers={}, stream=lambda: None
    )

    async def act() -> int:
        with pytest.raises(RuntimeError, match=str(fault)):
            await replica.check_health()
        status: int = (await replica(request)).status_code
        assert not left
        await asyncio.sleep(0.1)
        return status

    assert asyncio.run(act()) == 503 and left == codes
