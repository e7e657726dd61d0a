"""Tables are fixed by their seed, cover every expert, and balance what they promise to."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import MissingInputError
from moe_dist.moe.hash_tables import balanced_table, random_table


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_random_tables_spread_ids_evenly(top_k: int) -> None:
    table = random_table(8000, 8, seed=1, top_k=top_k)
    assert table.shape == ((8000,) if top_k == 1 else (8000, top_k))
    share = torch.bincount(table.view(-1), minlength=8) / (8000 * top_k)
    assert (share - 1 / 8).abs().max() < 0.02
    assert torch.equal(table, random_table(8000, 8, seed=1, top_k=top_k))
    if top_k < 8:
        assert not torch.equal(table, random_table(8000, 8, seed=2, top_k=top_k))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_balanced_tables_level_a_zipf_load(num_experts: int, top_k: int) -> None:
    counts = (1e5 / torch.arange(1, 3001)).long()
    counts[0] = counts[1:].sum() // (2 * num_experts)
    shuffled = counts[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    table = balanced_table(shuffled, num_experts, seed=0, top_k=top_k).view(3000, top_k)
    load = torch.zeros(num_experts, dtype=torch.int64)
    for k in range(top_k):
        load.index_add_(0, table[:, k], shuffled)
    assert load.max() / load.float().mean() < 1.01
    assert all(len(set(row)) == top_k for row in table.tolist())


def test_unseen_ids_go_to_random_experts() -> None:
    counts = torch.zeros(1000, dtype=torch.int64)
    counts[:4] = 10
    table = balanced_table(counts, 4, seed=3)
    assert sorted(table[:4].tolist()) == [0, 1, 2, 3]
    assert torch.bincount(table[4:], minlength=4).min() > 150
    assert torch.equal(balanced_table(torch.zeros(9), 4, seed=3), random_table(9, 4, seed=3))


@pytest.mark.parametrize("counts", [torch.tensor([1, -1]), torch.empty(0), torch.ones(2, 2)])
def test_counts_that_are_none(counts: torch.Tensor) -> None:
    with pytest.raises(MissingInputError, match="one non-negative count"):
        balanced_table(counts, 2, seed=0)


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_k_must_fit(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k={top_k}"):
        random_table(10, 2, seed=0, top_k=top_k)
