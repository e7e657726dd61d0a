"""Work whose success or failure all ranks must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.position import collective
from moe_dist.errors import CheckpointError, MoeDistError

T = TypeVar("T")


def on_rank_zero(engine: TrainEngine, work: Callable[[], T]) -> T:
    """Run on rank 0 and return plain values, or raise, on every rank alike; collective."""
    result: T | None = None
    failure: Exception | None = None
    if engine.rank == 0:
        result, failure = _attempt(work)
    if engine.world_size > 1:
        shared = [result, _for_others(failure)]
        with collective("wait for rank 0's result"):
            dist.broadcast_object_list(shared, src=0, device=engine.device)
        if engine.rank > 0:
            result, failure = shared  # type: ignore[assignment]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def on_every_rank(engine: TrainEngine, work: Callable[[], T]) -> T:
    """Run on every rank; if it fails on one, it raises on all, so that none waits for another."""
    result, failure = _attempt(work)
    if engine.world_size > 1:
        failures: list[Exception | None] = [None] * engine.world_size
        with collective("agreement of all ranks"):
            dist.all_gather_object(failures, _for_others(failure))
        failure = failure or next((f for f in failures if f is not None), None)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # Whatever it is, the other ranks must not wait for ever.
        return None, error


def _for_others(failure: Exception | None) -> MoeDistError | None:
    """Return what the other ranks raise: only our own errors surely survive pickling."""
    if failure is None or isinstance(failure, MoeDistError):
        return failure
    return CheckpointError(
        f"another rank failed: {type(failure).__name__}: {failure}", remedy="see that rank's error"
    )
