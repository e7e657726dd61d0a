"""Averaged gradients are exact, whichever rows of a table a rank touched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.distributed import spawn_gloo
from moe_dist.distributed.reduction import MIN_TABLE_ROWS, BackendReduction, average_gradients
from moe_dist.distributed.shared_reduction import SharedReduction

NUM_ROWS, WIDTH = MIN_TABLE_ROWS + 3, 4


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_tables_and_experts_are_averaged(tmp_path: Path) -> None:
    spawn_gloo(run_reduction, 2, tmp_path)
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["differences"] == dict.fromkeys(("few", "most", "bias", "experts"), 0.0)
        assert seen["poisoned_rows"] == [5]
        # A mark for each row of both tables, then the packed rows and what is sent whole.
        assert seen["sent"] == [NUM_ROWS, NUM_ROWS, (3 + NUM_ROWS + 1) * WIDTH]


def gradients(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    few = torch.zeros(NUM_ROWS, WIDTH)
    # One row is touched by both ranks, and so small that its square vanishes.
    few[[7, 100 + rank]] = 1e-30
    return {
        "few": few,
        "most": torch.randn(NUM_ROWS, WIDTH, generator=generator),
        "bias": torch.randn(WIDTH, generator=generator),
        "experts": torch.randn(2, WIDTH, generator=generator),
    }


def make_parameters(rank: int) -> list[nn.Parameter]:
    parameters = []
    for name, gradient in gradients(rank).items():
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        if name == "experts":
            parameter.allreduce = False  # type: ignore[attr-defined]
        parameters.append(parameter)
    return parameters


def run_reduction(rank: int, num_ranks: int, out: Path) -> None:
    parameters = make_parameters(rank)
    sent: list[int] = []
    original, world = dist.all_reduce, dist.group.WORLD
    assert world is not None

    def counted(tensor: torch.Tensor, **options: object) -> object:
        sent.append(tensor.numel())
        return original(tensor, **options)

    with patch.object(dist, "all_reduce", counted):
        average_gradients(parameters, BackendReduction(world), None)
    shared_parameters = make_parameters(rank)
    average_gradients(shared_parameters, SharedReduction.over(world), None)
    for own, other in zip(parameters, shared_parameters, strict=True):
        assert own.grad is not None and other.grad is not None
        assert torch.equal(own.grad, other.grad)
    everyone = [gradients(other) for other in range(num_ranks)]
    expected = {name: sum(g[name] for g in everyone) / num_ranks for name in everyone[0]}
    expected["experts"] = everyone[rank]["experts"] / num_ranks
    differences = {
        name: float((parameter.grad - value).abs().max())
        for parameter, (name, value) in zip(parameters, expected.items(), strict=True)
    }
    table = nn.Parameter(torch.zeros(NUM_ROWS, WIDTH))
    table.grad = torch.zeros_like(table)
    if rank == 1:
        table.grad[5, 0] = math.nan
    average_gradients([table], BackendReduction(world), None)
    poisoned = table.grad.isnan().any(dim=1).nonzero().flatten().tolist()
    seen = {"differences": differences, "poisoned_rows": poisoned, "sent": sent}
    (out / f"{rank}.json").write_text(json.dumps(seen))
