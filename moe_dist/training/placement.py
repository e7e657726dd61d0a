"""Where a job's workers go: the wish checked against the cluster, and the wait for places."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.errors import ClusterError, MoeDistError
from moe_dist.training.capacity import (
    Capacity,
    WorkerNeed,
    describe_nodes,
    read_capacity,
)
from moe_dist.training.job_errors import note_stop

if TYPE_CHECKING:
    from ray.train import ScalingConfig

NumWorkers = int | tuple[int, int]
"""A number of workers, or the least and the most of them."""

RESIZE_INTERVAL_S = 60.0
"""How often Ray Train looks whether an elastic job can have more workers."""
LOOK_EVERY_S = 2.0
NOTICE_AFTER_S = 5.0
NOTICE_EVERY_S = 10.0

logger = logging.getLogger("moe_dist.training")


@dataclass(frozen=True)
class Placement:
    """How many workers are wanted, and what each of them reserves.

    Args:
        least: with fewer workers the job does not run.
        most: more of them are not started.
        need: of one worker.
    """

    least: int
    most: int
    need: WorkerNeed

    @property
    def wish(self) -> str:
        """Name the wish by its keys."""
        if self.least == self.most:
            return f"parallel.num_workers={self.least}"
        return f"parallel.num_workers=[{self.least}, {self.most}] asks for at least {self.least}"

    @property
    def resources(self) -> dict[str, float]:
        """What one worker reserves, as Ray names it."""
        gpus = {"GPU": float(self.need.gpus)} if self.need.gpus else {}
        return {"CPU": float(self.need.cpus)} | gpus

    def scaling(self) -> ScalingConfig:
        """Say it to Ray Train.

        Workers are packed on as few nodes as hold them, and Ray Train numbers the ranks node by
        node, so that consecutive ranks, which share a set of experts, share a node.
        """
        from ray.train import ScalingConfig

        return ScalingConfig(
            num_workers=self.least if self.least == self.most else (self.least, self.most),
            use_gpu=self.need.gpus > 0,
            resources_per_worker=self.resources,
            placement_strategy="PACK",
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        )


def plan_placement(
    num_workers: NumWorkers, cpus_per_worker: int, use_gpu: bool | None
) -> Placement:
    """Check a wish against the cluster that this process is connected to.

    Args:
        num_workers: processes, or the least and the most of them.
        cpus_per_worker: CPUs that each of them reserves.
        use_gpu: one GPU for each worker; None takes them where there can be enough of them.

    Returns:
        The wish, which can be met now or later.

    Raises:
        ClusterError: if the cluster can never meet it.
    """
    return choose_placement(read_capacity(), num_workers, cpus_per_worker, use_gpu)


def choose_placement(
    capacity: Capacity, num_workers: NumWorkers, cpus_per_worker: int, use_gpu: bool | None
) -> Placement:
    """Check a wish against what a cluster has and may get.

    Args:
        capacity: of the cluster.
        num_workers: see `plan_placement`.
        cpus_per_worker: see `plan_placement`.
        use_gpu: see `plan_placement`.

    Returns:
        The wish, which can be met now or later.

    Raises:
        ClusterError: if the cluster can never meet it; with the arithmetic.
    """
    least, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    on_gpu = Placement(least, most, WorkerNeed(cpus_per_worker, gpus=1))
    on_cpu = Placement(least, most, WorkerNeed(cpus_per_worker))
    if use_gpu is None:
        # An autoscaler that does not tell its bounds is not waited for on a mere chance.
        known = capacity if capacity.kinds is not None else Capacity(capacity.nodes)
        use_gpu = known.most_places(on_gpu.need) >= least
    chosen = on_gpu if use_gpu else on_cpu
    if capacity.most_places(chosen.need) < least:
        raise _impossible(capacity, chosen)
    return chosen


def _impossible(capacity: Capacity, placement: Placement) -> ClusterError:
    need, least = placement.need, placement.least
    cpus, gpus = _most(capacity)
    has = f"the Ray cluster has {cpus:g} ({describe_nodes(capacity)})"
    if capacity.max_added:
        has = (
            f"the Ray cluster can grow to {cpus:g} at most ({describe_nodes(capacity)}; the "
            f"autoscaler may add {capacity.max_added} nodes)"
        )
    fitting = int(capacity.most_places(need))
    fewer = (
        f"Set parallel.num_workers to {fitting} or less, reserve fewer CPUs for each worker, or "
        "add nodes."
        if fitting
        else "Reserve fewer CPUs for each worker (parallel.cpus_per_worker), or add larger nodes."
    )
    if need.gpus and least > gpus:
        return ClusterError(
            f"{placement.wish} on GPUs needs {least} GPUs, and the Ray cluster has "
            f"{gpus:g} ({describe_nodes(capacity)})",
            remedy="Set parallel.use_gpu=false, lower parallel.num_workers, or add GPU nodes.",
        )
    if least * need.cpus > cpus:
        return ClusterError(
            f"{placement.wish} x parallel.cpus_per_worker={need.cpus} = {least * need.cpus} CPUs, "
            f"and {has}",
            remedy=fewer,
        )
    return ClusterError(
        f"{placement.wish} needs {least} places of {need}, each on one node, and "
        f"{fitting} fit on the nodes: {has}",
        remedy=fewer,
    )


def _most(capacity: Capacity) -> tuple[float, float]:
    """Count the CPUs and GPUs that there can ever be."""
    cpus = sum(node.cpus for node in capacity.nodes)
    gpus = sum(node.gpus for node in capacity.nodes)
    for name in ("cpus", "gpus"):
        left, added = capacity.max_added, 0.0
        for kind in sorted(capacity.kinds or (), key=lambda kind: -getattr(kind, name)):
            count = min(left, kind.max_nodes)
            added += count * getattr(kind, name)
            left -= count
        cpus, gpus = (cpus + added, gpus) if name == "cpus" else (cpus, gpus + added)
    return cpus, gpus


@contextmanager
def watched_places(placement: Placement, records: Path, wait_s: float) -> Iterator[None]:
    """Say what a job waits for while it has no places, and end a wait that lasts too long.

    Ray Train waits for places for ever, at the start and after each lost node, and says nothing.

    Args:
        placement: what the job wants.
        records: the job's directory, where the reason of an end is left.
        wait_s: the longest wait, in seconds.

    Yields:
        While the job runs.
    """
    over = threading.Event()

    def watch() -> None:
        waiter = PlaceWait(placement, wait_s)
        while not over.wait(LOOK_EVERY_S):
            try:
                waiter.look(time.monotonic(), read_capacity(), has_places(placement))
            except MoeDistError as too_long:
                note_stop(records, too_long)
                _end_job()
                return
            except Exception as fault:
                # The head may be gone for a moment; the job itself finds out whether it returns.
                logger.debug("could not look for free places: %s", fault)

    thread = threading.Thread(target=watch, name="place-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end_job() -> None:
    """Take down what governs this process's job; its workers and places go with it."""
    import ray
    from ray._private.state import actors

    own = ray.get_runtime_context().get_job_id()
    core_worker = ray._private.worker.global_worker.core_worker
    for actor_id, actor in actors(actor_state_name="ALIVE").items():
        if actor["JobID"] == own and actor["ActorClassName"] == "TrainController":
            # As `ray.kill`, which wants the handle that Ray Train keeps to itself.
            core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)


class PlaceWait:
    """Tells a wait for places from a run, looking from time to time.

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
        """Compare what the job wants with what is free.

        Args:
            now_s: a clock that only goes forward.
            capacity: of the cluster.
            placed: whether the job has its places.

        Raises:
            ClusterError: if it has waited too long.
        """
        placement, need = self._placement, self._placement.need
        free = capacity.free_places(need)
        # An elastic job that finds all places there are is not waiting, however few they be.
        wanted = max(placement.least, min(placement.most, capacity.present_places(need)))
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
                f"waited {waited_s:.0f} s for places (parallel.wait_s={self._wait_s:g}): {state}",
                remedy="See `ray status` for what holds them, lower parallel.num_workers, or "
                "raise parallel.wait_s. The same command continues from the newest checkpoint.",
            )
        if now_s >= self._notice_s:
            self._notice_s = now_s + NOTICE_EVERY_S
            logger.warning(
                "waiting for places since %.0f s (at most %g s): %s", waited_s, self._wait_s, state
            )


def has_places(placement: Placement) -> bool:
    """Tell whether this process's jobs hold places such as a wish asks for.

    Args:
        placement: the wish.

    Returns:
        Whether Ray has reserved between the least and the most of them.
    """
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
