"""Weights, their schedules, and the sum."""

from __future__ import annotations

import pytest
import torch

from moe_dist.losses.total import CountKind, LossTerm, LossWeight, weighted_total

COUNTS: dict[CountKind, int] = {"samples": 4, "tokens": 10}


def test_constant_weight() -> None:
    assert [LossWeight(0.5).at(step) for step in (0, 9)] == [0.5, 0.5]


def test_warmup_rises_linearly_to_the_weight() -> None:
    weight = LossWeight(2.0, "warmup", 4)
    assert [weight.at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert LossWeight(2.0, "warmup", 0).at(0) == 2.0


def test_decay_falls_linearly_to_zero() -> None:
    weight = LossWeight(2.0, "decay", 4)
    assert [weight.at(step) for step in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]


def test_a_delayed_weight_waits() -> None:
    weight = LossWeight(2.0, "delayed", 2)
    assert [weight.at(step) for step in range(4)] == [0.0, 0.0, 2.0, 2.0]


def test_terms_are_divided_by_their_counts_and_weighed() -> None:
    a = torch.tensor(8.0, requires_grad=True)
    b = torch.tensor(5.0, requires_grad=True)
    terms = {"a": LossTerm(a, "samples"), "b": LossTerm(b, "tokens")}
    total, values = weighted_total(terms, {"a": 1.0, "b": 3.0, "unused": 1.0}, COUNTS)
    total.backward()
    assert float(total) == pytest.approx(8 / 4 + 3 * 5 / 10)
    assert {name: float(value) for name, value in values.items()} == pytest.approx(
        {"a": 2.0, "b": 0.5, "total": 3.5}
    )
    assert a.grad is not None and b.grad is not None
    assert (float(a.grad), float(b.grad)) == pytest.approx((0.25, 0.3))


def test_a_term_at_weight_zero_cannot_spoil_the_total() -> None:
    good = torch.tensor(1.0, requires_grad=True)
    terms = {"a": LossTerm(good, "samples"), "b": LossTerm(torch.tensor(torch.nan), "samples")}
    total, values = weighted_total(terms, {"a": 1.0, "b": 0.0}, COUNTS)
    assert float(total) == 0.25
    assert bool(values["b"].isnan())


def test_all_weights_at_zero_still_give_a_graph() -> None:
    good = torch.tensor(1.0, requires_grad=True)
    total, _ = weighted_total({"a": LossTerm(good, "samples")}, {"a": 0.0}, COUNTS)
    total.backward()
    assert good.grad is not None and float(good.grad) == 0.0


def test_a_term_without_weight_is_named() -> None:
    with pytest.raises(ValueError, match="without a weight: b"):
        weighted_total({"b": LossTerm(torch.tensor(1.0), "samples")}, {"a": 1.0}, COUNTS)
