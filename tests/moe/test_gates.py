"""Gates on sentences and tasks, and what makes gates random in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist.errors import MissingInputError
from moe_dist.moe import (
    RoutingContext,
    SentenceGate,
    TaskGate,
    TokenGate,
    build_router,
    checkpoint_context_fn,
    use_context,
)
from tests.moe.test_layer import batch as layer_batch
from tests.moe.test_layer import build_layer

D_MODEL, NUM_EXPERTS = 6, 4
LENGTHS = (5, 1, 3)


def sentence_gate(**options: Any) -> SentenceGate:
    gate = SentenceGate(D_MODEL, NUM_EXPERTS, seed=1, **options)
    torch.nn.init.normal_(gate.gate.weight, generator=torch.Generator().manual_seed(0))
    return gate


def sentences(width: int) -> tuple[Tensor, Tensor]:
    """The same sentences at any width; padding is garbage."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.full((len(LENGTHS), width, D_MODEL), 1e3)
    for row, length in enumerate(LENGTHS):
        hidden[row, :length] = torch.randn(length, D_MODEL, generator=generator)
    mask = torch.arange(width) < torch.tensor(LENGTHS).unsqueeze(1)
    return hidden, mask


def slow_choice(gate: SentenceGate, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of the real tokens, one by one, and what the gate says of it."""
    total = torch.zeros(D_MODEL)
    for token in tokens:
        total = total + token
    logits = gate.gate.weight @ (total / len(tokens))
    best = logits.argsort(descending=True)[: gate.top_k]
    chosen = logits[best].softmax(0) if gate.top_k > 1 else torch.ones(1)
    return best, chosen


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("width", [5, 9])
def test_sentence_gate_equals_one_sentence_after_another(width: int, top_k: int) -> None:
    gate = sentence_gate(top_k=top_k)
    hidden, mask = sentences(width)
    routing = gate(hidden.flatten(0, 1), RoutingContext(mask=mask))
    ids = routing.expert_ids.view(len(LENGTHS), width, top_k)
    weights = routing.expert_weights.view(len(LENGTHS), width, top_k)
    for row, length in enumerate(LENGTHS):
        best, chosen = slow_choice(gate, list(hidden[row, :length]))
        assert (ids[row] == best).all(), "every token of a sentence, padding too"
        torch.testing.assert_close(weights[row], chosen.expand(width, top_k))


def test_sentence_gate_is_the_same_at_every_batch_size_and_padding() -> None:
    gate = sentence_gate()
    wide, mask = sentences(9)
    together = gate(wide.flatten(0, 1), RoutingContext(mask=mask)).logits.view(3, 9, -1)
    for row, length in enumerate(LENGTHS):
        alone = gate(wide[row, :length], RoutingContext(mask=mask[row : row + 1, :length]))
        torch.testing.assert_close(alone.logits, together[row, :length])
        no_mask = gate(wide[row, :length], RoutingContext(torch.zeros(1, length)))
        torch.testing.assert_close(no_mask.logits, alone.logits)


@pytest.mark.parametrize("width", [5, 8])
def test_in_a_decoder_each_token_reads_the_past_alone(width: int) -> None:
    gate = sentence_gate()
    hidden, mask = sentences(width)
    routing = gate(hidden.flatten(0, 1), RoutingContext(mask=mask, causal=True))
    ids = routing.expert_ids.view(len(LENGTHS), width)
    for row, length in enumerate(LENGTHS):
        for last in range(length):
            best, _ = slow_choice(gate, list(hidden[row, : last + 1]))
            assert ids[row, last] == best


def test_a_sentence_of_padding_only_is_routed_somewhere() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for causal in (False, True):
        routing = sentence_gate()(torch.randn(6, D_MODEL), RoutingContext(mask=mask, causal=causal))
        assert routing.logits.isfinite().all()


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "nothing for 6 tokens"),
        (RoutingContext(), "nothing for 6 tokens"),
        (RoutingContext(torch.zeros(2, 2)), r"a shape of \(2, 2\) for 6 tokens"),
        (RoutingContext(torch.zeros(6)), r"a shape of \(6,\) for 6 tokens"),
        (RoutingContext(torch.zeros(6, 1), causal=True, has_past=True), "key-value cache"),
    ],
)
def test_sentence_gate_names_what_is_missing(context: RoutingContext, message: str) -> None:
    with pytest.raises(MissingInputError, match=message) as caught:
        sentence_gate()(torch.zeros(6, D_MODEL), context)
    assert caught.value.remedy


@pytest.mark.parametrize("task_map", ["learned", "fixed"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_of_a_task_go_to_the_same_experts(task_map: str, top_k: int) -> None:
    router = task_router(task_map=task_map, top_k=top_k)
    tasks = torch.tensor([2, 0, 2, 1])
    routing = router(torch.randn(20, D_MODEL), RoutingContext(task_ids=tasks))
    ids = routing.expert_ids.view(4, 5, top_k)
    assert (ids == ids[:, :1]).all()
    assert torch.equal(ids[0], ids[2])
    assert len({tuple(one.tolist()) for one in ids[[0, 1, 3], 0]}) == 3, "tasks begin apart"
    other = router(torch.zeros(20, D_MODEL), RoutingContext(task_ids=tasks))
    assert torch.equal(other.expert_ids, routing.expert_ids)


def task_router(**options: Any) -> torch.nn.Module:
    given = {"d_model": D_MODEL, "num_experts": 6, "num_tasks": 3, "seed": 2}
    return build_router("task_gate", **(given | options))


def test_fixed_tasks_share_all_experts_evenly() -> None:
    table = task_router(task_map="fixed", top_k=2).get_buffer("table")
    assert sorted(table.flatten().tolist()) == list(range(6))


def test_one_task_needs_no_name() -> None:
    router = task_router(num_tasks=1)
    assert len(router(torch.randn(7, D_MODEL), None).expert_ids.unique()) == 1


def test_task_scores_learn() -> None:
    gate = task_router()
    assert isinstance(gate, TaskGate)
    routing = gate(torch.randn(4, D_MODEL), RoutingContext(task_ids=torch.tensor([1, 1])))
    assert torch.equal(routing.expert_weights, torch.ones(4, 1))
    (grad,) = torch.autograd.grad(routing.expert_weights.sum(), gate.task_scores)
    assert grad[1].abs().max() > 0
    assert not grad[[0, 2]].any()


@pytest.mark.parametrize(
    ("task_ids", "message"),
    [
        (None, "3 tasks, and this forward call names none"),
        (torch.tensor([0, 1, 2, 0]), "4 samples for 6 tokens"),
        (torch.tensor([0, 3]), r"\[0, 3\] are not all among the 3 tasks"),
        (torch.tensor([-1]), "not all among"),
    ],
)
def test_task_gate_names_what_is_missing(task_ids: Tensor | None, message: str) -> None:
    with pytest.raises(MissingInputError, match=message) as caught:
        task_router()(torch.zeros(6, D_MODEL), RoutingContext(task_ids=task_ids))
    assert caught.value.remedy


@pytest.mark.parametrize("options", [{"noise": 2.0}, {"jitter": 0.9}])
@pytest.mark.parametrize("kind", [TokenGate, SentenceGate])
def test_noise_is_in_training_only_and_follows_the_seed(
    kind: type[TokenGate], options: dict[str, float]
) -> None:
    gate = kind(D_MODEL, NUM_EXPERTS, **options)
    hidden_TD = torch.randn(40, D_MODEL)
    context = RoutingContext(torch.zeros(8, 5))
    plain = kind(D_MODEL, NUM_EXPERTS)(hidden_TD, context).logits

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = gate(hidden_TD, context).logits
        return found

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.allclose(logits(1), plain)
    gate.eval()
    assert torch.equal(logits(1), plain)


def test_noise_on_tasks_lets_them_try_other_experts() -> None:
    gate = task_router(gate_noise=1.0)
    tasks = RoutingContext(task_ids=torch.zeros(50, dtype=torch.int64))
    assert len(gate(torch.zeros(50, D_MODEL), tasks).expert_ids.unique()) > 1
    gate.eval()
    assert len(gate(torch.zeros(50, D_MODEL), tasks).expert_ids.unique()) == 1


@pytest.mark.parametrize("options", [{"noise": 1.0}, {"jitter": 0.5}])
def test_recomputation_repeats_the_noise(options: dict[str, float]) -> None:
    layer = build_layer("token_gate")
    for name, value in options.items():
        setattr(layer.router, name, value)
    hidden, context = layer_batch()
    results = []
    for recomputed in (False, True):
        own = copy.deepcopy(layer)
        torch.manual_seed(4)
        with use_context(context):
            if recomputed:
                out = checkpoint(own, hidden, use_reentrant=False, context_fn=checkpoint_context_fn)
            else:
                out = own(hidden)
        out.square().sum().backward()
        results.append([parameter.grad for parameter in own.parameters()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, atol=0, rtol=0)
