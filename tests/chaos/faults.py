"""What can be done to a run: one table, from a fault's name to the function that strikes."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_dist.distributed.checkpoint import list_checkpoints
from tests.chaos.marks import Reached
from tests.chaos.run import Run, RunLost
from tests.chaos.testbeds import HostsTestbed, wait_until_clean

FILLER = "filler"
SHORT_CUT_S = 5.0
LONG_CUT_S = 60.0
SERVER_AWAY_S = 4.0
END_TIMEOUT_S = 240.0

Strike = Callable[[Run, Reached, random.Random], None]


@dataclass(frozen=True)
class Fault:
    """One kind of harm.

    Args:
        strike: does it, while a worker waits at the mark, and lets that worker go on if it lives.
        points: where in a step a worker may wait for it.
        needs_hosts: whether it takes two hosts.
        needs_small_disk: whether it takes a disk that may be filled, which only root can make.
        needs_server: whether it takes an MLflow server.
        damages: whether the newest checkpoint is of no use afterwards.
    """

    strike: Strike
    points: tuple[str, ...] = ("forward", "backward", "step")
    needs_hosts: bool = False
    needs_small_disk: bool = False
    needs_server: bool = False
    damages: bool = False


def kill_worker(run: Run, reached: Reached, draw: random.Random) -> None:
    """SIGKILL the worker that waits."""
    os.kill(reached.pid, signal.SIGKILL)


def stop_worker(run: Run, reached: Reached, draw: random.Random) -> None:
    """SIGSTOP the worker that waits: it lives and does nothing, not even close its connections."""
    os.kill(reached.pid, signal.SIGSTOP)
    run.board.release(reached.mark)


def damage_checkpoint(run: Run, reached: Reached, draw: random.Random) -> None:
    """Spoil a file of the newest checkpoint, and kill a worker, so that it is looked for."""
    newest = list_checkpoints(run.stage_directory / "checkpoints")[0]
    path = draw.choice(sorted(newest.iterdir()))
    if draw.random() < 0.5:
        os.truncate(path, path.stat().st_size // 2)
    else:
        _flip_a_bit(path, draw)
    os.kill(reached.pid, signal.SIGKILL)


def stop_tracking_server(run: Run, reached: Reached, draw: random.Random) -> None:
    """Kill the MLflow server, let training go on without it, and start it again."""
    server = run.testbed.server
    assert server is not None
    server.stop()
    run.board.release(reached.mark)
    time.sleep(SERVER_AWAY_S)
    server.start()


def kill_driver(run: Run, reached: Reached, draw: random.Random) -> None:
    """Kill the program that the user started, and give its command again, at once or later."""
    run.kill_driver()
    if draw.random() < 0.5:
        left = wait_until_clean(run.testbed)
        if left:
            raise RunLost(f"a killed driver left {left}")
    run.start()


def fill_disk(run: Run, reached: Reached, draw: random.Random) -> None:
    """Fill the disk until the run gives up, make room, and give its command again."""
    filler = run.directory.parent / FILLER
    _fill(filler)
    try:
        run.board.release(reached.mark)
        code = run.wait_for_end(END_TIMEOUT_S)
        if code == 0 or "disk is full" not in run.log_tail():
            raise RunLost(f"a full disk ended the run with {code}:\n{run.log_tail()}")
    finally:
        filler.unlink()
    run.start()


def kill_raylet(run: Run, reached: Reached, draw: random.Random) -> None:
    """Kill the raylet of the worker node; the supervisor starts another one."""
    testbed = _hosts(run)
    testbed.cluster.kill_raylet(testbed.hosts.b)
    run.board.release(reached.mark)


def cut_for(duration_s: float) -> Strike:
    """Return a strike that pulls the worker node's cable for so long."""

    def cut(run: Run, reached: Reached, draw: random.Random) -> None:
        testbed = _hosts(run)
        testbed.hosts.set_cable(testbed.hosts.b, plugged=False)
        run.board.release(reached.mark)
        time.sleep(duration_s)
        testbed.hosts.set_cable(testbed.hosts.b, plugged=True)

    return cut


def kill_head(run: Run, reached: Reached, draw: random.Random) -> None:
    """Kill Ray on the head, wait for the driver's end, start a new cluster and the command."""
    testbed = _hosts(run)
    testbed.lose_head()
    run.board.release(reached.mark)
    if run.wait_for_end(END_TIMEOUT_S) == 0:
        raise RunLost("the run ended well without a cluster")
    testbed.restore_cluster()
    run.start()


FAULTS: dict[str, Fault] = {
    "worker killed in forward": Fault(kill_worker, points=("forward",)),
    "worker killed in backward": Fault(kill_worker, points=("backward",)),
    "worker killed in a checkpoint": Fault(kill_worker, points=("checkpoint",)),
    "worker stopped": Fault(stop_worker),
    "checkpoint damaged": Fault(damage_checkpoint, damages=True),
    "driver killed": Fault(kill_driver),
    "MLflow stopped": Fault(stop_tracking_server, needs_server=True),
    "disk full": Fault(fill_disk, needs_small_disk=True),
    "raylet killed": Fault(kill_raylet, needs_hosts=True),
    "cable pulled for 5 s": Fault(cut_for(SHORT_CUT_S), needs_hosts=True),
    "cable pulled for 60 s": Fault(cut_for(LONG_CUT_S), needs_hosts=True),
    "head killed": Fault(kill_head, needs_hosts=True),
}


def _hosts(run: Run) -> HostsTestbed:
    assert isinstance(run.testbed, HostsTestbed), "this fault takes two hosts"
    return run.testbed


def _flip_a_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12, 1):
            block = b"\0" * size
            with suppress(OSError):
                while True:
                    stream.write(block)
    assert _is_full(path.parent), "the disk still takes data"


def _is_full(directory: Path) -> bool:
    try:
        (directory / "probe").write_bytes(b"\0" * 4096)
    except OSError as fault:
        return fault.errno == errno.ENOSPC
    finally:
        (directory / "probe").unlink(missing_ok=True)
    return False
