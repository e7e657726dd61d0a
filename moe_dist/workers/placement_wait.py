"""The wait for worker slots: what it waits for, and its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_dist.background import in_background
from moe_dist.errors import ClusterError, MoeDistError
from moe_dist.workers.cluster_capacity import Capacity, describe_nodes, read_capacity
from moe_dist.workers.job_errors import note_stop
from moe_dist.workers.placement import Placement

LOOK_EVERY_S = 2.0
NOTICE_AFTER_S = 5.0
NOTICE_EVERY_S = 10.0

logger = logging.getLogger("moe_dist.training")


@contextmanager
def watched_placement(placement: Placement, records: Path, wait_s: float) -> Iterator[None]:
    """Say what a job waits for while it has no worker slots, and end a wait that lasts too long.

    Ray Train waits for them for ever, at the start and after each lost node, and says nothing.

    Args:
        placement: what the job wants.
        records: the job's directory, where the reason of an end is left.
        wait_s: the longest wait, in seconds.

    Yields:
        While the job runs.
    """

    def watch(over: threading.Event) -> None:
        waiter = PlacementWait(placement, wait_s)
        while not over.wait(LOOK_EVERY_S):
            try:
                waiter.look(time.monotonic(), read_capacity(), is_placed(placement))
            except MoeDistError as too_long:
                note_stop(records, too_long)
                # Again, if there is nothing to end yet: starting may take longer than the wait.
                while not over.is_set():
                    _end_job()
                    over.wait(LOOK_EVERY_S)
                return
            except Exception as fault:
                # The head may be gone for a moment; the job itself finds out whether it returns.
                logger.debug("could not look for free worker slots: %s", fault)

    with in_background(watch, "placement-wait"):
        yield


def _end_job() -> None:
    """Take down what governs this process's job; its workers and worker slots go with it."""
    import ray
    from ray._private.state import actors

    own = ray.get_runtime_context().get_job_id()
    core_worker = ray._private.worker.global_worker.core_worker
    for actor_id, actor in actors(actor_state_name="ALIVE").items():
        if actor["JobID"] == own and actor["ActorClassName"] == "TrainController":
            # As `ray.kill`, which wants the handle that Ray Train keeps to itself.
            core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)


class PlacementWait:
    """Tells a wait for worker slots from a run, looking from time to time.

    Args:
        placement: what the job wants.
        wait_s: the longest wait, in seconds.
    """

    def __init__(self, placement: Placement, wait_s: float) -> None:
        self._placement = placement
        self._wait_s = wait_s
        self._since_s: float | None = None
        self._notice_s = 0.0

    def look(self, now_s: float, capacity: Capacity, placed: bool) -> None:
        """Compare what the job wants with what is free; ClusterError after too long a wait.

        `now_s` is of a clock that only goes forward; `placed` says that the job has its worker
        slots.
        """
        placement, need = self._placement, self._placement.need
        free = capacity.free_slots(need)
        # An elastic job that finds all worker slots there are is not waiting, however few they be.
        wanted = max(placement.least, min(placement.most, capacity.present_slots(need)))
        if placed or free >= wanted:
            self._since_s = None
            return
        if self._since_s is None:
            self._since_s, self._notice_s = now_s, now_s + NOTICE_AFTER_S
        waited_s = now_s - self._since_s
        state = (
            f"{wanted} workers of {need} each, and {free} fit now "
            f"(free: {describe_nodes(capacity, free=True)})"
        )
        if waited_s > self._wait_s:
            raise ClusterError(
                f"waited {waited_s:.0f} s for worker slots (parallel.wait_s={self._wait_s:g}): "
                f"{state}",
                remedy="See `ray status` for what holds them, lower parallel.num_workers, or "
                "raise parallel.wait_s. The same command continues from the newest checkpoint.",
            )
        if now_s >= self._notice_s:
            self._notice_s = now_s + NOTICE_EVERY_S
            logger.warning(
                "waiting for worker slots since %.0f s (at most %g s): %s",
                waited_s,
                self._wait_s,
                state,
            )


def is_placed(placement: Placement) -> bool:
    """Tell whether Ray has reserved as many worker slots for this process as a wish asks for."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    own = bytes.fromhex(ray.get_runtime_context().get_job_id())
    wanted = {name: value for name, value in placement.resources.items() if value}
    # `ray.util.placement_group_table` leaves out whose a group is.
    table = state._connect_and_get_accessor().get_placement_group_table()
    groups = (PlacementGroupTableData.FromString(entry) for entry in table)
    return any(
        group.creator_job_id == own
        and group.state == PlacementGroupTableData.CREATED
        and placement.least <= len(group.bundles) <= placement.most
        and all(dict(bundle.unit_resources) == wanted for bundle in group.bundles)
        for group in groups
    )
