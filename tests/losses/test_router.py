"""Router losses against hand-computed values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dist.losses.router import (
    load_balancing_loss,
    noisy_load,
    router_entropy,
    router_z_loss,
    squared_variation,
    token_weights,
    variation_of_part,
    without_padding,
)


def balance(logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """The loss of tokens that are a whole step."""
    choices_E = torch.bincount(ids_TK.reshape(-1), minlength=logits_TE.shape[1]).float()
    return load_balancing_loss(logits_TE.softmax(-1).sum(0), choices_E, ids_TK.shape[1])


def test_even_routing_costs_one() -> None:
    assert float(balance(torch.eye(4) * 5.0, torch.arange(4).unsqueeze(1))) == pytest.approx(1.0)


def test_all_on_one_expert_costs_its_probability_times_the_experts() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    loss = balance(logits, torch.zeros(2, 1, dtype=torch.long))
    assert float(loss) == pytest.approx(2 * 0.75)


def test_two_experts_per_token_count_as_two_choices() -> None:
    logits = torch.randn(6, 3)
    ids = logits.topk(2).indices
    share = torch.bincount(ids.reshape(-1), minlength=3) / 12
    expected = 3 * float((logits.softmax(-1).mean(0) * share).sum())
    assert float(balance(logits, ids)) == pytest.approx(expected, rel=1e-5)


def test_balancing_lowers_the_probability_of_the_crowded_expert() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    balance(logits, torch.zeros(2, 1, dtype=torch.long)).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all()) and bool((logits.grad[:, 1] < 0).all())


@pytest.mark.parametrize("top_k", [1, 2])
def test_parts_of_a_step_add_up(top_k: int) -> None:
    """One part has all its tokens on one expert, and still counts by the whole step's shares."""
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    logits[:4, 1] += 9.0
    ids = logits.topk(top_k).indices
    choices_E = torch.bincount(ids.reshape(-1), minlength=3).float()
    parts = [
        load_balancing_loss(rows.softmax(-1).sum(0), choices_E, top_k)
        for rows in (logits[:4], logits[4:])
    ]
    assert float(sum(parts)) == pytest.approx(float(balance(logits, ids)), rel=1e-6)


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
    loss = router_z_loss(logits) + balance(logits, torch.zeros(2, 1).long())
    loss = loss + router_entropy(logits)
    loss.backward()
    assert math.isfinite(float(loss))
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


def test_no_tokens_cost_nothing_or_are_an_error() -> None:
    assert float(load_balancing_loss(torch.zeros(2), torch.zeros(2))) == 0.0
    with pytest.raises(ValueError, match="at least one token"):
        router_z_loss(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="at least one token"):
        router_entropy(torch.zeros(0, 2))


# Merged experts


def test_squared_variation_by_hand() -> None:
    assert float(squared_variation(torch.tensor([1.0, 3.0]))) == pytest.approx(2 / 4)
    assert float(squared_variation(torch.full((5,), 0.3))) == pytest.approx(0.0, abs=1e-6)
    # One expert of E takes all: E.
    assert float(squared_variation(torch.tensor([0.0, 0.0, 0.0, 7.0]))) == pytest.approx(4.0)
    assert float(squared_variation(torch.zeros(3))) == 0.0
    assert float(squared_variation(torch.tensor([2.0]))) == 0.0


def test_load_is_how_often_an_expert_would_be_chosen() -> None:
    """Against drawing the noise of one expert anew, the others' left as they are."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(2, 4, generator=generator)
    std = torch.rand(2, 4, generator=generator) + 0.2
    noisy = clean + std * torch.randn(2, 4, generator=generator)
    found = noisy_load(clean, noisy, std, top_k=2)
    draws = 40_000
    for group in range(2):
        for expert in range(4):
            tried = noisy[group].repeat(draws, 1)
            noise = torch.randn(draws, generator=generator)
            tried[:, expert] = clean[group, expert] + std[group, expert] * noise
            chosen = (tried.topk(2).indices == expert).any(dim=1).float().mean()
            assert float(found[group, expert]) == pytest.approx(float(chosen), abs=0.01)


def test_all_experts_are_chosen_where_there_are_no_others() -> None:
    clean = torch.randn(3, 2)
    assert torch.equal(noisy_load(clean, clean, torch.ones(3, 2), top_k=2), torch.ones(3, 2))


def test_load_has_a_gradient_where_the_choice_has_none() -> None:
    clean = torch.zeros(1, 3, requires_grad=True)
    noisy = torch.tensor([[0.3, -0.2, 0.1]])
    load = noisy_load(clean, noisy, torch.ones(1, 3), top_k=1).sum(dim=0)
    squared_variation(load).backward()
    assert clean.grad is not None and bool(torch.isfinite(clean.grad).all())
    assert float(clean.grad.abs().sum()) > 0


def test_parts_of_a_merged_step_add_up_with_the_gradient_of_the_whole() -> None:
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    whole = squared_variation(weights.sum(dim=0))
    (expected,) = torch.autograd.grad(whole, weights)
    total = weights.detach().sum(dim=0)
    parts = [variation_of_part(weights[rows].sum(dim=0), total) for rows in ([0, 1], [2, 3, 4, 5])]
    value = torch.stack(parts).sum()
    assert float(value) == pytest.approx(float(whole), rel=1e-6)
    (found,) = torch.autograd.grad(value, weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [router_z_loss, router_entropy])
def test_padding_reaches_neither_a_mean_nor_a_gradient(loss: Callable[..., Tensor]) -> None:
    mask = torch.tensor([True, False, True])
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.5, -3.0]], requires_grad=True)
    found = loss(without_padding(logits, mask), token_weights(mask))
    expected = loss(logits[mask])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    own, other = (torch.autograd.grad(one, logits)[0] for one in (found, expected))
    torch.testing.assert_close(own, other)
    none = torch.zeros(3, dtype=torch.bool)
    assert float(loss(without_padding(logits, none), token_weights(none)).detach()) == 0.0
