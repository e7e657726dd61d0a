"""The exchange sends what leaves, once, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.distributed import spawn_gloo
from moe_dist.distributed.all_to_all import AllToAllDispatcher
from moe_dist.distributed.exchange import RowExchange, Traffic, plan_route
from moe_dist.distributed.mailboxes import Mailboxes
from moe_dist.moe import Experts, LocalDispatcher, Routing

D_MODEL, NUM_EXPERTS = 8, 8
NUM_TOKENS = (13, 7, 0, 5)


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_ranks", "top_ks"), [(2, (1, 2)), (4, (1, 3))])
def test_only_leaving_tokens_travel(
    tmp_path: Path, num_ranks: int, top_ks: tuple[int, ...]
) -> None:
    spawn_gloo(run_dispatches, num_ranks, top_ks, tmp_path)
    for rank in range(num_ranks):
        for top_k, seen in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            # Out and home, then both gradients the other way.
            assert seen["sent"] == 2 * (seen["leaving"] + seen["coming"]), top_k
            assert seen["num_exchanges"] == 4, top_k
            assert seen["difference"] < 1e-6, top_k


def run_dispatches(rank: int, num_ranks: int, top_ks: tuple[int, ...], out: Path) -> None:
    seen = {top_k: run_dispatch(rank, num_ranks, top_k) for top_k in top_ks}
    (out / f"{rank}.json").write_text(json.dumps(seen))


def run_dispatch(
    rank: int, num_ranks: int, top_k: int, mailboxes: Mailboxes | None = None
) -> dict[str, float]:
    """Dispatch uneven batches, and compare with all experts in one process."""
    torch.manual_seed(0)
    whole = Experts(NUM_EXPERTS, D_MODEL, 6, activation="gelu")
    num_local = NUM_EXPERTS // num_ranks
    mine = Experts(num_local, D_MODEL, 6, activation="gelu")
    first = rank * num_local
    mine.load_state_dict(
        {name: value[first : first + num_local] for name, value in whole.state_dict().items()}
    )
    batches = [make_batch(r, top_k) for r in range(num_ranks)]
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(group)
    dispatcher.mailboxes = mailboxes
    hidden_TD, routing = batches[rank]
    output_TD = dispatcher(hidden_TD, routing, mine)
    output_TD.square().sum().backward()
    differences = []
    for of_rank, (other_TD, other_routing) in enumerate(batches):
        expected_TD = LocalDispatcher()(other_TD.detach(), other_routing, whole)
        expected_TD.square().sum().backward()
        if of_rank == rank and len(hidden_TD):
            differences.append(float((output_TD - expected_TD).detach().abs().max()))
    for name, parameter in mine.named_parameters():
        whole_grad = whole.get_parameter(name).grad
        assert parameter.grad is not None
        assert whole_grad is not None
        differences.append(
            float((parameter.grad - whole_grad[first : first + num_local]).abs().max())
        )
    row_bytes = D_MODEL * hidden_TD.element_size()
    here = [int((ids // num_local == rank).sum()) for ids in (r.expert_ids for _, r in batches)]
    return {
        "sent": dispatcher.traffic.sent_bytes,
        "num_exchanges": dispatcher.traffic.num_exchanges,
        "leaving": (routing.expert_ids.numel() - here[rank]) * row_bytes,
        "coming": (sum(here) - here[rank]) * row_bytes,
        "difference": max(differences),
    }


def make_batch(rank: int, top_k: int) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(rank)
    num_tokens = NUM_TOKENS[rank]
    hidden_TD = torch.randn(num_tokens, D_MODEL, generator=generator).requires_grad_()
    # The last expert gets nothing.
    scores = torch.rand(num_tokens, NUM_EXPERTS - 1, generator=generator)
    weights, expert_ids = scores.topk(top_k)
    return hidden_TD, Routing(expert_ids, weights / weights.sum(1, keepdim=True))


def test_rows_lie_by_expert_then_by_rank() -> None:
    """Three ranks, two experts each; this is rank 1."""
    sent = [[1, 2], [3, 4], [0, 5]]
    received = [[2, 0], [3, 4], [1, 6]]
    route = plan_route(sent, received, 1, None, Traffic())  # type: ignore[arg-type]
    assert route.slots == [(0, slice(0, 1)), (0, slice(1, 3)), (2, slice(10, 15))]
    assert route.kept == slice(3, 10)
    assert route.received == [(0, slice(0, 2)), (2, slice(2, 3)), (2, slice(3, 9))]
    assert (route.num_slots, route.num_received) == (15, 9)


def test_two_ranks_need_one_message() -> None:
    route = plan_route([[3, 1], [2, 2]], [[3, 1], [0, 7]], 0, None, Traffic())  # type: ignore[arg-type]
    assert route.slots == [(1, slice(4, 8))]
    assert route.received == [(1, slice(0, 7))]
    assert route.kept == slice(0, 4)


def test_what_is_noted_of_the_traffic_does_not_grow() -> None:
    traffic = Traffic()
    group: Any = SimpleNamespace()
    for _ in range(1000):
        route = plan_route([[2], [0]], [[2], [0]], 0, group, traffic)
        RowExchange(route).start(torch.zeros(2, 4), outward=True)
    assert asdict(traffic) == {"num_exchanges": 1000, "sent_bytes": 0}
