"""Sums through shared memory are those of the backend, on every rank alike, or are not made."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed import shared_memory, spawn_gloo
from moe_dist.distributed.reduction import BackendReduction, reduction_over
from moe_dist.distributed.shared_memory import SharedMemory, share_memory
from moe_dist.distributed.shared_reduction import SharedReduction

CHUNK_BYTES = 4096
SHAPES = ((), (0,), (1,), (7,), (1023,), (1,), (33, 65), (3, 5, 1024), (2,))
CPU = torch.device("cpu")


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_sums_are_those_of_all_reduce(tmp_path: Path, num_ranks: int) -> None:
    spawn_gloo(run_sums, num_ranks, tmp_path)
    for rank in range(num_ranks):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen == {"failed": [], "maximum": True, "idle": None}


def run_sums(rank: int, num_ranks: int, out: Path) -> None:
    reduction = SharedReduction.over(world(), CHUNK_BYTES)
    assert reduction is not None
    failed = []
    for number in range(6):
        tensors = make_tensors(rank, number)
        before = [tensor.clone() for tensor in tensors]
        time.sleep(0.01 * ((rank + number) % num_ranks))
        reduction.average(tensors, num_ranks)
        for index, (own, tensor) in enumerate(zip(before, tensors, strict=True)):
            if not is_average(own, tensor, num_ranks):
                failed.append([number, index])
    marks = torch.zeros(5 * CHUNK_BYTES + 3, dtype=torch.uint8)
    marks[[rank, -1 - rank]] = 1 + rank
    right = marks.clone()
    dist.all_reduce(right, op=dist.ReduceOp.MAX)
    reduction.maximum(marks)
    seen = {"failed": failed, "maximum": torch.equal(marks, right)}
    seen["idle"] = reduction.average([], num_ranks)  # type: ignore[func-returns-value]
    (out / f"{rank}.json").write_text(json.dumps(seen))


def make_tensors(rank: int, number: int) -> list[Tensor]:
    """Both dtypes, in turn, of every shape; then some whose elements do not lie side by side."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    transposed = torch.randn(65, 40, generator=generator).t()
    return [*tensors, transposed, torch.randn(50, 60, generator=generator)[:, ::3]]


def is_average(own: Tensor, averaged: Tensor, num_ranks: int) -> bool:
    """Compare with the sum in the order of ranks, bit by bit, and nearly with the backend's."""
    parts = [torch.empty(own.shape, dtype=own.dtype) for _ in range(num_ranks)]
    dist.all_gather(parts, own.contiguous())
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    backend = own.float().contiguous()
    dist.all_reduce(backend)
    tolerance = 1e-2 if own.dtype is torch.bfloat16 else 1e-6
    return torch.equal(averaged, (total / num_ranks).to(own.dtype)) and torch.allclose(
        averaged.float(), backend / num_ranks, rtol=tolerance, atol=tolerance
    )


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "no room")


# On which rank what fails.
OBSTACLES: dict[str, tuple[int, Any, str, Any]] = {
    "other machine": (1, shared_memory, "own_machine", lambda: "another one"),
    "unknown machine": (0, shared_memory, "own_machine", lambda: ""),
    "no memory": (0, os, "posix_fallocate", refuse),
    "no memory without a name": (0, os, "memfd_create", refuse),
    "no such call in this Python": (0, os, "memfd_create", None),
    "a fault of another kind": (1, shared_memory, "_limit_wait", None),
    "no way to the host": (1, socket.socket, "connect", refuse),
    "nothing handed over": (0, socket, "send_fds", refuse),
    "nothing received": (1, socket, "recv_fds", refuse),
    "nothing mapped": (1, shared_memory.mmap, "mmap", refuse),
}


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_without_shared_memory_all_ranks_take_the_backend(tmp_path: Path) -> None:
    spawn_gloo(run_obstacles, 2, tmp_path)
    for rank in range(2):
        kinds, leaked = json.loads((tmp_path / f"{rank}.json").read_text())
        assert kinds == {
            **dict.fromkeys(OBSTACLES, "BackendReduction"),
            "none": "SharedReduction",
        }
        assert leaked == 0


def run_obstacles(rank: int, num_ranks: int, out: Path) -> None:
    descriptors = num_descriptors()
    kinds = {}
    for name, (where, owner, attribute, replacement) in OBSTACLES.items():
        with mock.patch.object(
            owner, attribute, replacement if rank == where else getattr(owner, attribute)
        ):
            if rank == where and replacement is None:
                delattr(owner, attribute)
            reduction = reduction_over(world(), CPU)
        kinds[name] = type(reduction).__name__
        assert isinstance(reduction, BackendReduction)
        check_average(rank, num_ranks, reduction)
    held = os.listdir("/dev/shm")
    reduction = reduction_over(world(), CPU)
    kinds["none"] = type(reduction).__name__
    assert isinstance(reduction, SharedReduction)
    check_average(rank, num_ranks, reduction)
    assert os.listdir("/dev/shm") == held
    # The memory, and a link to the other rank.
    assert num_descriptors() == descriptors + 2
    dist.barrier()
    del reduction
    gc.collect()
    (out / f"{rank}.json").write_text(json.dumps([kinds, num_descriptors() - descriptors]))


def check_average(rank: int, num_ranks: int, reduction: BackendReduction | SharedReduction) -> None:
    value = torch.full((3,), float(rank))
    reduction.average([value], num_ranks)
    assert value.tolist() == [(num_ranks - 1) / 2] * 3


def num_descriptors() -> int:
    """Count open Unix sockets and memory without a name: what is not the group's own."""
    own = Path("/proc/net/unix").read_text().split()
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum(
        target.startswith("/memfd:moe-dist") or target[len("socket:[") : -1] in own
        for target in targets
    )


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_groups_have_memory_of_their_own(tmp_path: Path) -> None:
    spawn_gloo(run_groups, 4, tmp_path)
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == str([1.5, 1.0 + rank % 2])


def run_groups(rank: int, num_ranks: int, out: Path) -> None:
    pairs = [dist.new_group([first, first + 2]) for first in range(2)]
    everyone, pair = reduction_over(world(), CPU), reduction_over(pairs[rank % 2], CPU)
    assert isinstance(everyone, SharedReduction) and isinstance(pair, SharedReduction)
    values = [torch.tensor([float(rank)]) for _ in range(2)]
    pair.average(values[1:], 2)
    everyone.average(values[:1], num_ranks)
    (out / str(rank)).write_text(str([float(value) for value in values]))
    dist.barrier()


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_rank_alone_or_too_many_share_nothing(tmp_path: Path) -> None:
    spawn_gloo(run_alone, 2)


def run_alone(rank: int, num_ranks: int) -> None:
    own = [dist.new_group([other]) for other in range(num_ranks)][rank]
    assert share_memory(own, 4096) is None
    assert reduction_over(own, CPU) is None
    with mock.patch.object(shared_memory, "MAX_RANKS", 1):
        assert share_memory(world(), 4096) is None


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_who_does_not_know_the_token_is_not_let_in(tmp_path: Path) -> None:
    spawn_gloo(run_stranger, 2)


def run_stranger(rank: int, num_ranks: int) -> None:
    connect = socket.socket.connect
    strangers = []

    def after_a_stranger(own: socket.socket, address: bytes) -> None:
        stranger = socket.socket(socket.AF_UNIX)
        connect(stranger, address)
        stranger.sendall(bytes(17))
        strangers.append(stranger)
        connect(own, address)

    with mock.patch.object(socket.socket, "connect", after_a_stranger):
        assert isinstance(reduction_over(world(), CPU), SharedReduction)
    dist.barrier()
    for stranger in strangers:
        assert stranger.recv(1) == b""


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_ranks_that_do_something_else_are_an_error() -> None:
    spawn_gloo(run_disagreements, 2)


def run_disagreements(rank: int, num_ranks: int) -> None:
    for size, is_maximum in ((4 if rank else 40, False), (4, bool(rank))):
        reduction = SharedReduction.over(world(), CHUNK_BYTES)
        assert reduction is not None
        values = torch.ones(size)
        with pytest.raises(RuntimeError, match=r"for something else|closed its shared memory"):
            reduction.maximum(values) if is_maximum else reduction.average([values], num_ranks)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_stranger_that_says_nothing_costs_little() -> None:
    spawn_gloo(run_silent_stranger, 2)


def run_silent_stranger(rank: int, num_ranks: int) -> None:
    connect = socket.socket.connect
    strangers = []

    def after_a_stranger(own: socket.socket, address: bytes) -> None:
        strangers.append(socket.socket(socket.AF_UNIX))
        connect(strangers[-1], address)
        connect(own, address)

    started = time.monotonic()
    with mock.patch.object(socket.socket, "connect", after_a_stranger):
        memory = share_memory(world(), 4096)
    assert memory is not None
    assert time.monotonic() - started < 10
    # No program that is started later keeps a link of a dead rank open.
    assert not any(link.get_inheritable() for link in memory._links.values())


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_ranks", "dying"), [(3, 2), (5, 3)])
def test_a_rank_that_dies_between_is_an_error_on_the_others(
    tmp_path: Path, num_ranks: int, dying: int
) -> None:
    """Also on those that would be told, or be heard of, only after the dead one."""
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=run_until_death, args=(rank, num_ranks, dying, tmp_path))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert not process.is_alive()
    assert ranks[dying].exitcode == -signal.SIGKILL
    for rank in set(range(num_ranks)) - {dying}:
        name, waited_s = json.loads((tmp_path / f"{rank}.json").read_text())
        # The kind that gloo raises, long before the group's timeout.
        assert name in ("RuntimeError", "DistBackendError", "DistNetworkError")
        assert waited_s < 30


def run_until_death(rank: int, num_ranks: int, dying: int, out: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "store"), num_ranks)
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    reduction = SharedReduction.over(world(), CHUNK_BYTES)
    assert reduction is not None
    tensors = make_tensors(rank, 0)
    reduction.average(tensors, num_ranks)
    wait, waits = SharedMemory.wait, 0

    def wait_or_die(memory: SharedMemory, purpose: int) -> None:
        nonlocal waits
        waits += 1
        if waits == 3 and rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        if waits == 3 and rank == 0:
            # All others are there before it, and wait for it.
            time.sleep(2)
        wait(memory, purpose)

    started = time.monotonic()
    with mock.patch.object(SharedMemory, "wait", wait_or_die):
        try:
            reduction.average(tensors, num_ranks)
        except Exception as fault:
            seen = [type(fault).__name__, time.monotonic() - started]
            (out / f"{rank}.json").write_text(json.dumps(seen))
    os._exit(0)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_wait_ends_with_the_groups_timeout(tmp_path: Path) -> None:
    spawn_gloo(run_late, 2)


def run_late(rank: int, num_ranks: int) -> None:
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    memory = share_memory(pair, 4096)
    assert memory is not None
    if rank == 0:
        with pytest.raises(RuntimeError, match="timed out after 1 s"):
            memory.wait()
    dist.barrier()
