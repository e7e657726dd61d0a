"""Losses in chunks of tokens: the naive ones, their gradients, and no more memory than is set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.losses import tokens
from moe_dist.losses.tokens import TokenScores, token_cross_entropy, token_kl

T, D, V = 23, 6, 40
HELD = 2
"""Tensors of a chunk's size that a CPU holds at once."""


def scores(seed: int, *, bias: bool = True) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    return TokenScores(draw(T, D), draw(V, D), draw(V) if bias else None)


def naive(own: TokenScores) -> Tensor:
    return functional.linear(own.hidden_TD, own.weight_VD, own.bias_V)


def leaves(own: TokenScores) -> list[Tensor]:
    return [one for one in (own.hidden_TD, own.weight_VD, own.bias_V) if one is not None]


@pytest.fixture(params=[1, 5, 1000])
def few_rows(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of logits in a chunk; two at a time are compared."""
    rows: int = request.param
    monkeypatch.setattr(tokens, "MAX_BYTES", rows * V * 4 * HELD)
    monkeypatch.setattr(tokens, "CACHED_BYTES", 2 * V * 4)
    monkeypatch.setattr(tokens, "_LAYERS", 0)
    return rows


@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_is_the_naive_one_with_its_gradients(few_rows: int, bias: bool) -> None:
    own = scores(0, bias=bias)
    targets_T = torch.arange(T) % V
    weights_T = torch.linspace(0.1, 2.0, T)
    found_T = token_cross_entropy(own, targets_T)
    expected_T = functional.cross_entropy(naive(own), targets_T, reduction="none")
    assert torch.allclose(found_T, expected_T, atol=1e-6)
    found = torch.autograd.grad((found_T * weights_T).sum(), leaves(own))
    expected = torch.autograd.grad((expected_T * weights_T).sum(), leaves(own))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_from_teacher_to_student_with_gradients_of_the_student(
    few_rows: int, temperature: float
) -> None:
    own, other = scores(0), scores(1)
    found_T = token_kl(own, other, temperature)
    p_TV = (naive(other) / temperature).softmax(-1)
    q_TV = (naive(own) / temperature).softmax(-1)
    expected_T = temperature**2 * (p_TV * (p_TV.log() - q_TV.log())).sum(-1)
    assert torch.allclose(found_T, expected_T, atol=1e-5)
    found = torch.autograd.grad(found_T.sum(), leaves(own), retain_graph=True)
    expected = torch.autograd.grad(expected_T.sum(), leaves(own), retain_graph=True)
    for one, right in zip(found, expected, strict=True):
        assert torch.allclose(one, right, atol=1e-4)
    of_teacher = torch.autograd.grad(found_T.sum(), leaves(other), allow_unused=True)
    assert all(one is None for one in of_teacher)
    assert token_kl(own, own).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_tokens_that_count_differently_have_their_own_gradients(
    few_rows: int, temperature: float
) -> None:
    own, other = scores(0), scores(1)
    weights_T = torch.linspace(-1.0, 2.0, T)
    q_TV = (naive(own) / temperature).log_softmax(-1)
    p_TV = (naive(other) / temperature).softmax(-1)
    expected_T = temperature**2 * (p_TV * (p_TV.log() - q_TV)).sum(-1)
    found_T = token_kl(own, other, temperature)
    for weights in (weights_T, 0.5 * torch.ones(T)):
        found = torch.autograd.grad((found_T * weights).sum(), leaves(own), retain_graph=True)
        right = torch.autograd.grad((expected_T * weights).sum(), leaves(own), retain_graph=True)
        for one, expected in zip(found, right, strict=True):
            assert torch.allclose(one, expected, atol=1e-4)


def test_under_autocast_products_are_in_bf16_and_sums_in_fp32(few_rows: int) -> None:
    own, other = scores(0), scores(1)
    with torch.autocast("cpu", torch.bfloat16):
        found_T = token_kl(own, other)
        logits_TV, other_TV = naive(own).float(), naive(other).float()
    expected_T = (
        other_TV.softmax(-1) * (other_TV.log_softmax(-1) - logits_TV.log_softmax(-1))
    ).sum(-1)
    assert found_T.dtype == torch.float32
    assert torch.allclose(found_T, expected_T, atol=1e-5)
    found = torch.autograd.grad(found_T.sum(), leaves(own))
    right = torch.autograd.grad(expected_T.sum(), leaves(own))
    for one, expected in zip(found, right, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, expected, atol=0.05 * float(expected.abs().max()))


def wanted_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """Which gradients each pass over the tokens takes."""
    passes: list[tuple[bool, ...]] = []
    own = tokens._differentiate

    def watched(layer: Any, loss: Any, wanted: Any, weight_T: Any = None) -> Any:
        passes.append(tuple(wanted))
        return own(layer, loss, wanted, weight_T)

    monkeypatch.setattr(tokens, "_differentiate", watched)
    return passes


def test_nothing_is_differentiated_where_a_model_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = wanted_of(monkeypatch)
    own, other = scores(0), scores(1)
    trained_T = token_kl(own, other).detach()
    with torch.no_grad():
        measured_T = token_kl(own, other)
    assert torch.equal(measured_T, trained_T) and not measured_T.requires_grad
    assert passes == [(True, True, True), (False, False, False)]


def test_hidden_states_alone_take_one_pass_whatever_tokens_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = wanted_of(monkeypatch)
    own, weights_T = scores(0), torch.linspace(-1.0, 2.0, T)
    frozen = TokenScores(own.hidden_TD, own.weight_VD.detach(), None)
    found_T = token_cross_entropy(frozen, torch.arange(T) % V)
    expected_T = functional.cross_entropy(naive(frozen), torch.arange(T) % V, reduction="none")
    (found,) = torch.autograd.grad((found_T * weights_T).sum(), [own.hidden_TD])
    (right,) = torch.autograd.grad((expected_T * weights_T).sum(), [own.hidden_TD])
    assert torch.allclose(found, right, atol=1e-5)
    assert passes == [(True, False, False)]


def test_a_frozen_output_layer_has_no_gradient() -> None:
    own, other = scores(0), scores(1)
    frozen = TokenScores(own.hidden_TD, own.weight_VD.detach(), None)
    token_kl(frozen, other).sum().backward()  # type: ignore[no-untyped-call]
    assert own.hidden_TD.grad is not None and own.weight_VD.grad is None


def test_no_tokens_give_no_losses_and_keep_the_graph() -> None:
    own = scores(0)
    empty = TokenScores(own.hidden_TD[:0], own.weight_VD, own.bias_V)
    losses_T = token_cross_entropy(empty, torch.zeros(0, dtype=torch.long))
    assert losses_T.shape == (0,)
    losses_T.sum().backward()  # type: ignore[no-untyped-call]


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                self.num_elements = max(self.num_elements, one.numel())
        return made


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_BYTES", 3 * V * 4 * HELD)
    own, other = scores(0), scores(1)
    with LargestTensor() as largest:
        loss = token_kl(own, other).sum() + token_cross_entropy(own, torch.zeros(T).long()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    # The gradient of the output layer is V x D; all logits would be T x V.
    assert largest.num_elements == V * D < T * V


class Float32Logits(TorchDispatchMode):
    """Finds the most rows of float32 logits that anything gives."""

    num_rows = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor) and one.dtype is torch.float32 and one.shape[1:] == (V,):
                self.num_rows = max(self.num_rows, len(one))
        return made


def test_under_autocast_few_logits_are_float32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHED_BYTES", 2 * V * 4)
    own, other = scores(0, bias=False), scores(1, bias=False)
    with Float32Logits() as made, torch.autocast("cpu", torch.bfloat16):
        token_kl(own, other).sum().backward()  # type: ignore[no-untyped-call]
    assert made.num_rows == 2


def test_no_tokens_have_no_loss_and_zeros_for_gradients() -> None:
    own, other = scores(0), scores(1)
    none = [TokenScores(one.hidden_TD[:0], one.weight_VD, one.bias_V) for one in (own, other)]
    found_T = token_kl(*none)
    assert found_T.shape == (0,)
    grads = torch.autograd.grad(found_T.sum(), [own.weight_VD, other.bias_V], allow_unused=True)
    assert float(grads[0].abs().max()) == 0 and grads[1] is None


@pytest.mark.parametrize(("width", "rows"), [(4, 4), (20, 12)])
def test_a_wide_layer_is_added_to_seldom(
    width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one size: 23 tokens in six of 4, or in two of 12 where 20 have room."""
    monkeypatch.setattr(tokens, "MAX_BYTES", 4 * V * 4 * HELD)
    layer = tokens._OutputLayer(torch.zeros(T, width), torch.zeros(V, width), None)
    assert tokens._rows_at_a_time(layer)[0] == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: TokenScores(one.hidden_TD, one.weight_VD[1:], None), "vocabulary of 40"),
        (lambda one: TokenScores(one.hidden_TD[1:], one.weight_VD, None), "the same tokens"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: Callable[[TokenScores], TokenScores], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_kl(scores(0), change(scores(1)))
    with pytest.raises(ValueError, match="temperature"):
        token_kl(scores(0), scores(1), 0.0)
