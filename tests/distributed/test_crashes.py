"""A writer that dies at any moment leaves a checkpoint that loads.

The writer runs in a child process that ends, as by SIGKILL, before its n-th operation on files;
n grows until the writer gets through. A process without threads forks these children: a fork of
one that has threads, as that of the tests, may hang for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.distributed import list_checkpoints, load_checkpoint, save_checkpoint
from moe_dist.distributed.checkpoint_files import (
    MODEL_FILE,
    prune_checkpoints,
    step_directory,
    write_checkpoint,
)
from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.manifest import read_experts, read_json
from tests.distributed.tiny_moe import Case, make_engine, train_steps

LOCAL = Case(1, 1, 0)
FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
KILLED = 9


@pytest.fixture(scope="module")
def engine() -> TrainEngine:
    return make_engine(LOCAL)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One process that is started anew, and so has no threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield pool


def test_write_beside_two_older_ones(
    tmp_path: Path, engine: TrainEngine, pool: ProcessPoolExecutor
) -> None:
    """A new step, after which the oldest checkpoint is pruned."""
    source = three_checkpoints(tmp_path / "all", engine)
    before = tmp_path / "before"
    for step in (1, 2):
        shutil.copytree(step_directory(source, step), step_directory(before, step))
    stages = pool.submit(crash_everywhere, before, partial(rewrite, source, step=3)).result()
    assert check_each(stages, engine, source) == {2, 3}


def test_write_over_the_only_one(
    tmp_path: Path, engine: TrainEngine, pool: ProcessPoolExecutor
) -> None:
    """The same step again, with nothing else to fall back on."""
    source = three_checkpoints(tmp_path / "all", engine)
    before = tmp_path / "before"
    shutil.copytree(step_directory(source, 3), step_directory(before, 3))
    stages = pool.submit(crash_everywhere, before, partial(rewrite, source, step=3)).result()
    assert check_each(stages, engine, source) == {3}
    names = {path.name for stage in stages for path in stage.iterdir()}
    assert ".replaced-step-00000003" in names, "the moment between the renames was not met"


def three_checkpoints(directory: Path, engine: TrainEngine) -> Path:
    for step in (1, 2, 3):
        train_steps(engine, LOCAL, step - 1, step)
        save_checkpoint(directory, engine, step=step, state={"mark": step}, keep=3)
    return directory


def rewrite(source: Path, directory: Path, step: int) -> None:
    """Write a step's checkpoint as the writer does: files, renames, pruning."""
    place = step_directory(source, step)
    files = {path.name: load_file(path) for path in place.glob("*.safetensors")}
    state, experts = read_json(place / "state.json"), read_experts(place)
    write_checkpoint(step_directory(directory, step), files, state, experts)
    prune_checkpoints(directory, step, keep=2)


def crash_everywhere(before: Path, write: Callable[[Path], None]) -> list[Path]:
    """Kill the writer before each operation in turn; return what each left, the last one whole."""
    stages: list[Path] = []
    while True:
        directory = before.with_name(f"crash-{len(stages)}")
        shutil.copytree(before, directory)
        stages.append(directory)
        if run_until(len(stages), directory, write) == 0:
            return stages
        assert len(stages) < 500


def run_until(operation: int, directory: Path, write: Callable[[Path], None]) -> int:
    """Run the writer in a child that ends before its n-th operation on files."""
    child = os.fork()
    if child == 0:
        left = operation
        real_fsync, here = os.fsync, str(directory)

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(KILLED)

        def on_event(event: str, arguments: tuple[object, ...]) -> None:
            if event in FILE_EVENTS and _is_under(here, arguments):
                count()

        def counted_fsync(descriptor: int) -> None:
            # Before this a file may hold less than was written.
            count()
            real_fsync(descriptor)

        status = 1
        try:
            sys.addaudithook(on_event)
            with mock.patch.object(os, "fsync", counted_fsync):
                write(directory)
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code


def _is_under(directory: str, arguments: tuple[object, ...]) -> bool:
    # Inside a tree that is being removed, paths are relative to an open directory.
    path = str(arguments[0])
    return path.startswith(directory) or not path.startswith("/")


def check_each(stages: list[Path], engine: TrainEngine, source: Path) -> set[int]:
    """Load what each crash left; return the steps that were found."""
    assert len(stages) > 25, "fewer operations than a checkpoint has"
    found = set()
    for stage in stages:
        for parameter in engine.module.parameters():
            parameter.data.zero_()
        state = load_checkpoint(stage, engine)
        assert state is not None and state["mark"] == state["step"], stage
        expected = load_file(step_directory(source, state["step"]) / MODEL_FILE)
        for name, value in engine.module.state_dict().items():
            assert torch.equal(value, expected[name]), (stage, name)
        found.add(state["step"])
    # The one that got through, and any other after the next whole write, is tidy.
    rewrite(source, stages[len(stages) // 2], 3)
    for stage in (stages[-1], stages[len(stages) // 2]):
        assert sorted(stage.iterdir()) == sorted(list_checkpoints(stage))
    return found
