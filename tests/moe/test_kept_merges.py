"""Merges kept over steps give what merging anew gives, and are recognised with one read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe import Merges, Routing, kept_merges
from moe_dist.moe.kept_merges import KeptMerge, merge_and_keep
from moe_dist.moe.merge import merge_experts
from tests.moe.merged import D_MODEL, merged_layer

WEIGHTS = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.25, 0.75]])
IDS = torch.tensor([[0, 3], [1, 2], [0, 3]])


def asked(rows: list[int], weights: Tensor = WEIGHTS) -> Merges:
    """Ask for merges of one token each, of which the rows 0 and 2 are alike."""
    one = Routing(IDS[rows], weights[rows])
    return Merges({"in": one, "out": one}, torch.arange(len(rows)))


def step(merges: Merges, kept: dict[str, KeptMerge]) -> tuple[Tensor | None, Tensor]:
    experts = merged_layer().experts
    rows_TD = torch.randn(
        len(merges.group_T), D_MODEL, generator=torch.Generator().manual_seed(len(kept))
    )
    with torch.no_grad():
        expected = merge_experts(experts, rows_TD, merges)
        return merge_and_keep(experts, rows_TD, merges, kept, "layer"), expected


def assert_kept(merges: Merges, kept: dict[str, KeptMerge]) -> None:
    found, expected = step(merges, kept)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_asked_for_again_is_merged_once_and_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: dict[str, KeptMerge] = {}
    assert step(asked([0, 1, 2]), kept)[0] is None
    assert_kept(asked([0, 1, 2]), kept)
    reads: list[bool] = []
    equal = torch.equal

    def count(one: Tensor, other: Tensor) -> bool:
        reads.append(True)
        return equal(one, other)

    experts = merged_layer().experts
    merges = asked([0, 1, 2])
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "equal", count)
        for owner, name in (
            (torch, "unique"),
            (Tensor, "tolist"),
            (Tensor, "item"),
            (Tensor, "__bool__"),
            (kept_merges, "stacked_merges"),
        ):
            patch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(name))
        # What the products do with the counts of tokens, on the host, is not asked here.
        patch.setattr(experts, "with_weights", lambda _, rows_TD, __: rows_TD)
        assert merge_and_keep(experts, torch.ones(3, D_MODEL), merges, kept, "layer") is not None
    assert reads == [True]


def test_sequences_in_another_order_share_what_is_kept() -> None:
    kept: dict[str, KeptMerge] = {}
    for _ in range(2):
        step(asked([0, 1, 2]), kept)
    weights = kept["layer"].weights
    for rows in ([1, 0, 2], [1, 0, 0], [0, 1, 1]):
        assert_kept(asked(rows), kept)
        assert kept["layer"].weights is weights


@pytest.mark.parametrize("rows", [[0, 2], [0, 1, 2]])
def test_other_weights_are_merged_anew(rows: list[int]) -> None:
    kept: dict[str, KeptMerge] = {}
    for _ in range(2):
        step(asked(rows), kept)
    other = asked(rows, WEIGHTS.flip(1))
    assert step(other, kept)[0] is None
    assert kept["layer"].weights is None
    assert_kept(other, kept)
    # Other numbers of sequences are not mistaken for each other.
    assert step(asked([1]), kept)[0] is None


def test_as_many_merges_as_experts_are_not_kept() -> None:
    ids = torch.tensor([[0, 1], [1, 0]])
    one = Routing(ids, torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    merges = Merges({"in": one, "out": one}, torch.arange(2))
    kept: dict[str, Any] = {}
    for _ in range(3):
        assert step(merges, kept)[0] is None
    assert kept["layer"].weights is None
