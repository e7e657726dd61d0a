"""Messages through shared memory arrive whole and in any order of taking, small and large."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.distributed import spawn_gloo
from moe_dist.distributed.all_to_all import AllToAllDispatcher
from moe_dist.distributed.expert_parallel import ExpertParallelMoE
from moe_dist.distributed.mailboxes import Mailboxes
from moe_dist.distributed.parameter_groups import moe_layers
from tests.distributed.test_exchange import run_dispatch
from tests.distributed.tiny_moe import Case, make_engine, train_steps

BOX_BYTES = 2048


def mailboxes(box_bytes: int = BOX_BYTES) -> Mailboxes:
    world = dist.group.WORLD
    assert world is not None
    made = Mailboxes.over(world, box_bytes)
    assert made is not None
    return made


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_messages_arrive(tmp_path: Path) -> None:
    spawn_gloo(run_messages, 3, tmp_path)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == []


def message(source: int, target: int, number: int) -> list[Tensor]:
    """Two pieces; every fourth message is larger than a box, every fifth is empty."""
    generator = torch.Generator().manual_seed(100 * number + 10 * source + target)
    num_rows = 0 if number % 5 == 4 else 400 if number % 4 == 3 else 9
    rows = torch.randn(num_rows, 5, generator=generator)
    return [rows, torch.randn(3, generator=generator).to(torch.bfloat16)]


def run_messages(rank: int, num_ranks: int, out: Path) -> None:
    boxes, wrong = mailboxes(), []
    others = [other for other in range(num_ranks) if other != rank]
    number = 0
    # So many under way at once; the last is taken first. Two boxes hold two.
    for num_pending in (1, 1, 2, 1, 4, 1, 3, 1, 1):
        works, pending = [], []
        for _ in range(num_pending):
            for other in others:
                works.append(boxes.send(other, message(rank, other, number)))
                pending.append((other, boxes.expect(other), message(other, rank, number)))
            number += 1
        for other, expected, right in reversed(pending):
            got = [torch.empty_like(piece) for piece in right]
            boxes.take(other, expected, got)
            if not all(map(torch.equal, got, right)):
                wrong.append([other, expected])
        for work in works:
            if work is not None:
                work.wait()
    (out / f"{rank}.json").write_text(json.dumps(wrong))


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_message_of_another_size_is_an_error() -> None:
    spawn_gloo(run_other_size, 2)


def run_other_size(rank: int, num_ranks: int) -> None:
    boxes = mailboxes()
    boxes.send(1 - rank, [torch.ones(2)])
    with pytest.raises(RuntimeError, match="another message than expected"):
        boxes.take(1 - rank, boxes.expect(1 - rank), [torch.zeros(4)])
    dist.barrier()


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_dispatch_through_mailboxes_is_exact(tmp_path: Path, num_ranks: int) -> None:
    spawn_gloo(run_dispatches, num_ranks, tmp_path)
    for rank in range(num_ranks):
        for seen in json.loads((tmp_path / f"{rank}.json").read_text()):
            assert seen["sent"] == 2 * (seen["leaving"] + seen["coming"])
            assert seen["difference"] < 1e-6


def run_dispatches(rank: int, num_ranks: int, out: Path) -> None:
    # Boxes that hold all messages, and some that hold few.
    seen = [
        run_dispatch(rank, num_ranks, top_k, mailboxes(box_bytes))
        for box_bytes in (1 << 16, 512)
        for top_k in (1, 3)
    ]
    (out / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_an_engine_on_one_machine_has_mailboxes() -> None:
    spawn_gloo(run_engine, 2)


def run_engine(rank: int, num_ranks: int) -> None:
    case = Case(num_ranks, num_ranks, 0)
    engine = make_engine(case)
    # All tokens go through boxes: nothing is left to the backend.
    with mock.patch.object(dist, "isend", side_effect=AssertionError("a message by gloo")):
        train_steps(engine, case, 0, 1)
    found = []
    for _, layer in moe_layers(engine.module):
        if isinstance(layer, ExpertParallelMoE):
            assert isinstance(layer.dispatcher, AllToAllDispatcher)
            found.append(layer.dispatcher.mailboxes)
    # One set for all layers.
    assert found and found[0] is not None and len(set(map(id, found))) == 1
