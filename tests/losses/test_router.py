"""Router losses against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.losses.router import load_balancing_loss, router_entropy, router_z_loss


def test_even_routing_costs_one() -> None:
    logits = torch.eye(4) * 5.0
    assert float(load_balancing_loss(logits, torch.arange(4).unsqueeze(1))) == pytest.approx(1.0)


def test_all_on_one_expert_costs_its_probability_times_the_experts() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    loss = load_balancing_loss(logits, torch.zeros(2, 1, dtype=torch.long))
    assert float(loss) == pytest.approx(2 * 0.75)


def test_two_experts_per_token_count_as_two_choices() -> None:
    logits = torch.randn(6, 3)
    ids = logits.topk(2).indices
    share = torch.bincount(ids.reshape(-1), minlength=3) / 12
    expected = 3 * float((logits.softmax(-1).mean(0) * share).sum())
    assert float(load_balancing_loss(logits, ids)) == pytest.approx(expected, rel=1e-5)


def test_balancing_lowers_the_probability_of_the_crowded_expert() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    load_balancing_loss(logits, torch.zeros(2, 1, dtype=torch.long)).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all()) and bool((logits.grad[:, 1] < 0).all())


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2.0) ** 2 + (1 + math.log(2.0)) ** 2) / 2
    assert float(router_z_loss(logits)) == pytest.approx(expected, rel=1e-6)


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(router_entropy(logits)) == pytest.approx((math.log(2.0) + uneven) / 2, rel=1e-6)
    assert float(router_entropy(torch.tensor([[1e4, -1e4]]))) == 0.0


def test_entropy_falls_as_the_choice_sharpens() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    router_entropy(logits).backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0]) < 0 < float(logits.grad[0, 1])


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = router_z_loss(logits) + load_balancing_loss(logits, torch.zeros(2, 1).long())
    loss = loss + router_entropy(logits)
    loss.backward()
    assert math.isfinite(float(loss))
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        load_balancing_loss(torch.zeros(0, 2), torch.zeros(0, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        router_z_loss(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="at least one token"):
        router_entropy(torch.zeros(0, 2))
