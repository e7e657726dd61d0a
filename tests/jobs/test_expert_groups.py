"""The ep_size that a job settles on with the ranks it finds, and what it says about it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.distributed.launch import spawn_gloo
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.jobs import expert_groups
from moe_dist.jobs.expert_groups import settle_ep_size, settle_expert_orders
from moe_dist.moe.routing import record_routing, use_samples
from moe_dist.training.loop import step_seed
from moe_dist.training.step import expert_counts
from tests.distributed.tiny_moe import TinyMoE
from tests.training.tiny import model_inputs, tiny_batches, tiny_bert, tiny_student


def settle(rank: int, world_size: int, out: Path) -> None:
    """Settle several wishes, with one rank less on the first of two nodes than on the second."""
    os.environ["NODE_RANK"] = "0" if rank == 0 else "1"
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_dist").addHandler(handler)
    sizes = [settle_ep_size(TinyMoE(), wished) for wished in (1, 2, 3, 4)]
    (out / f"{rank}.json").write_text(json.dumps({"sizes": sizes, "lines": lines}))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for world_size in (2, 3):
        out = tmp_path_factory.mktemp(f"world{world_size}")
        spawn_gloo(settle, world_size, out)
        found[world_size] = [
            json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)
        ]
    return found


@pytest.mark.distributed
def test_ep_size_falls_where_it_does_not_fit(told: dict[int, list[dict[str, Any]]]) -> None:
    assert [rank["sizes"] for rank in told[2]] == [[1, 2, 2, 2]] * 2
    assert [rank["sizes"] for rank in told[3]] == [[1, 1, 1, 1]] * 3


@pytest.mark.distributed
def test_rank_zero_says_so(told: dict[int, list[dict[str, Any]]]) -> None:
    assert told[3][0]["lines"] == [
        f"3 workers and 4 experts: parallel.ep_size={wished} falls to 1" for wished in (2, 3, 4)
    ]
    crossing = [line for line in told[2][0]["lines"] if "cross nodes" in line]
    assert len(crossing) == 3 and "1 + 1 workers on the nodes" in crossing[0]
    assert told[2][1]["lines"] == told[3][1]["lines"] == []


def test_a_dense_model_has_nothing_to_spread() -> None:
    assert settle_ep_size(nn.Linear(2, 2), 4) == 1


def test_one_process_keeps_all_experts(caplog: pytest.LogCaptureFixture) -> None:
    assert settle_ep_size(TinyMoE(), 4) == 1
    assert caplog.messages == ["1 workers and 4 experts: parallel.ep_size=4 falls to 1"]


CPU = torch.device("cpu")


def skewed_student() -> Any:
    """A student whose gates send nearly all tokens to its last two experts."""
    student = tiny_student(tiny_bert(dropout=0.0)).train()
    for _, layer in moe_layers(student):
        router: Any = layer.router
        with torch.no_grad():
            torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(1))
            router.gate.weight[:2] *= 0.1
    return student


@pytest.mark.parametrize("options", [{"gate_noise": 2.0}, {"gate_jitter": 0.5}])
def test_noisy_gates_are_counted_as_the_first_steps_route(options: dict[str, float]) -> None:
    student = tiny_student(tiny_bert(), **options).eval()
    state = torch.get_rng_state()
    loads = expert_groups._counted_loads(
        student, tiny_batches(accumulation=2).epoch(0), seed=3, precision="fp32", device=CPU
    )
    assert torch.equal(torch.get_rng_state(), state) and not student.training
    student.train()
    totals: dict[str, Any] = {}
    for number, step in enumerate(list(tiny_batches(accumulation=2).epoch(0))[:2]):
        # As `training/loop.py` does it.
        torch.manual_seed(step_seed(3, number, 0))
        sizes = [len(batch["labels"]) for batch in step.micro_batches]
        for batch, ids in zip(
            step.micro_batches, torch.tensor(step.sample_ids).split(sizes), strict=True
        ):
            with (
                use_samples(ids, step_seed(3, number, 0)),
                record_routing() as record,
                torch.no_grad(),
            ):
                student(**model_inputs(student, batch))
            for name, count_E in expert_counts(record).items():
                totals[name] = totals.get(name, 0) + count_E
    assert loads == {name: count_E.tolist() for name, count_E in totals.items()}


@pytest.mark.parametrize(("free", "fits"), [(2.0, True), (1.9, False)])
def test_a_model_is_counted_on_a_gpu_that_has_twice_its_room(
    free: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(8, 8, bias=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 256), 10**6))
    assert expert_groups._fits(model, torch.device("cuda", 0)) == fits
    assert expert_groups._fits(model, CPU)


def place(rank: int, world_size: int, out: Path) -> None:
    """Place experts by the texts, and by what a checkpoint says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_dist").addHandler(handler)
    found: dict[str, Any] = {}
    for name, ep_size, directory in (
        ("whole", 1, None),
        ("counted", 2, out / "none"),
        ("saved", 2, out / "checkpoints"),
        ("damaged", 2, out / "damaged"),
    ):
        student = skewed_student()
        steps = tiny_batches(rank=rank, world_size=world_size).epoch(0)
        found[name] = settle_expert_orders(
            student, ep_size, steps, directory, seed=0, precision="fp32", device=CPU
        )
        assert student.training
    (out / f"placed-{rank}.json").write_text(json.dumps({"orders": found, "lines": lines}))


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("placed")
    names = [layer.name for _, layer in moe_layers(skewed_student())]
    saved, damaged = (out / name / "step-00000003" for name in ("checkpoints", "damaged"))
    for directory in (saved, damaged):
        directory.mkdir(parents=True)
    loads = {names[0]: [10.0, 9.0, 1.0, 0.0], names[1]: [5.0, 5.0, 5.0, 5.0]}
    (saved / "state.json").write_text(json.dumps({"state": {"expert_loads": loads}}))
    (damaged / "state.json").write_text("{")
    spawn_gloo(place, 2, out)
    return [json.loads((out / f"placed-{rank}.json").read_text()) for rank in range(2)]


def counted_shares(orders: dict[str, list[int]]) -> list[float]:
    """The busiest rank's share of each layer's tokens in the first two steps, in one process."""
    student = skewed_student().eval()
    totals: dict[str, Any] = {}
    for step in list(tiny_batches().epoch(0))[:2]:
        for batch in step.micro_batches:
            with record_routing() as record, torch.no_grad():
                student(**model_inputs(student, batch))
            for name, count_E in expert_counts(record).items():
                totals[name] = totals.get(name, 0) + count_E
    shares = []
    for name, layer in moe_layers(student):
        count_E = totals[layer.name][orders.get(name, [0, 1, 2, 3])]
        shares.append(float(count_E.view(2, 2).sum(1).max() / count_E.sum()))
    return shares


@pytest.mark.distributed
def test_experts_are_placed_by_the_tokens_of_all_ranks(placed: list[dict[str, Any]]) -> None:
    assert placed[0]["orders"] == placed[1]["orders"]
    orders = placed[0]["orders"]
    assert orders["whole"] == {} and len(orders["counted"]) == 2
    before, after = counted_shares({}), counted_shares(orders["counted"])
    assert all(share < plain for share, plain in zip(after, before, strict=True))
    line = placed[0]["lines"][0]
    assert line == (
        f"experts of 2 layers are placed by load: the busiest of 2 ranks has at most "
        f"{100 * max(after):.0f}% of a layer's tokens and {50 * sum(after):.0f}% on average, where "
        f"it had {100 * max(before):.0f}% and {50 * sum(before):.0f}% (an even share is 50%)"
    )
    assert placed[1]["lines"] == []


@pytest.mark.distributed
def test_a_training_that_goes_on_is_placed_by_what_it_had(placed: list[dict[str, Any]]) -> None:
    first = next(name for name, _ in moe_layers(skewed_student()))
    orders = placed[0]["orders"]
    assert orders["saved"] == {first: [0, 3, 1, 2]}
    assert "at most 50%" in placed[0]["lines"][1] and "it had 95%" in placed[0]["lines"][1]
    assert orders["damaged"] == orders["counted"]
