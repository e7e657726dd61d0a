"""Routers choose as they say, keep their tables, and name what they miss."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe import ROUTERS, HashRouter, Router, RoutingContext, TokenGate, build_router
from moe_dist.router_spec import ROUTER_FACTS

SENDERS = [name for name in ROUTERS if not ROUTER_FACTS[name].merges]
D_MODEL, NUM_EXPERTS, VOCAB_SIZE = 6, 4, 30


def build(name: str, **options: object) -> torch.nn.Module:
    given = {
        "d_model": D_MODEL,
        "num_experts": NUM_EXPERTS,
        "vocab_size": VOCAB_SIZE,
        "token_counts": torch.arange(VOCAB_SIZE),
        "num_tasks": 3,
        "seed": 5,
    }
    return build_router(name, **{**given, **options})


def build_gate(**options: object) -> TokenGate:
    router = build("token_gate", **options)
    assert isinstance(router, TokenGate)
    return router


def build_hash(**options: object) -> HashRouter:
    router = build("hash_random", **options)
    assert isinstance(router, HashRouter)
    return router


@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_every_router_returns_distinct_experts_and_weights_of_sum_one(
    name: str, top_k: int
) -> None:
    router = build(name, top_k=top_k)
    assert isinstance(router, Router)
    hidden_TD = torch.randn(10, D_MODEL)
    ids = torch.randint(VOCAB_SIZE, (2, 5))
    routing = router(hidden_TD, RoutingContext(ids, task_ids=torch.tensor([2, 0])))
    assert routing.expert_ids.shape == routing.expert_weights.shape == (10, top_k)
    assert routing.expert_ids.dtype is torch.int64
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
    assert int(routing.expert_ids.min()) >= 0
    assert int(routing.expert_ids.max()) < NUM_EXPERTS
    torch.testing.assert_close(routing.expert_weights.sum(1), torch.ones(10))
    assert routing.expert_weights.dtype is hidden_TD.dtype


@pytest.mark.parametrize("name", SENDERS)
def test_a_seed_decides_the_start(name: str) -> None:
    first, same, other = build(name).state_dict(), build(name).state_dict(), build(name, seed=6)
    assert first.keys() == same.keys()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other.state_dict()[key]) for key in first)


def test_building_a_router_leaves_the_global_generator_of_tables_alone() -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    build("hash_random")
    build("hash_balanced")
    assert torch.equal(torch.rand(3), want)


def test_hash_follows_its_table_and_ignores_hidden_states() -> None:
    table = torch.arange(VOCAB_SIZE) % NUM_EXPERTS
    router = build_hash(table=table)
    ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
    routing = router(torch.full((6, D_MODEL), torch.nan), RoutingContext(ids))
    assert routing.expert_ids.view(-1).tolist() == [3, 1, 3, 0, 1, 2]
    assert routing.unit_weights
    assert routing.logits is None


def test_the_table_travels_with_the_state_dict() -> None:
    router, fresh = build_hash(), build_hash(seed=9)
    assert set(router.state_dict()) == {"table"}
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.table, router.table)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "needs the token ids"),
        (RoutingContext(), "needs the token ids"),
        (RoutingContext(torch.zeros(2, 2, dtype=torch.int64)), "4 token ids for 3 tokens"),
        (RoutingContext(torch.tensor([0, -1, 1])), "token id -1 is not"),
    ],
)
def test_hash_names_what_is_missing(context: RoutingContext | None, message: str) -> None:
    with pytest.raises(MissingInputError, match=message) as caught:
        build("hash_random")(torch.zeros(3, D_MODEL), context)
    assert caught.value.remedy


def test_ids_beyond_the_table_take_a_fixed_row() -> None:
    router = build_hash(table=torch.arange(VOCAB_SIZE) % NUM_EXPERTS)
    ids = torch.tensor([2, VOCAB_SIZE + 2, 7 * VOCAB_SIZE + 3])
    assert router(torch.zeros(3, D_MODEL), RoutingContext(ids)).expert_ids.tolist() == [
        [2],
        [2],
        [3],
    ]


def test_token_gate_takes_the_largest_logits_first() -> None:
    router = build_gate(top_k=3)
    hidden_TD = torch.randn(8, D_MODEL)
    routing = router(hidden_TD, None)
    logits = hidden_TD @ router.gate.weight.T
    torch.testing.assert_close(routing.logits, logits)
    want = logits.argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(routing.expert_ids, want)
    chosen = logits.softmax(1).gather(1, want)
    torch.testing.assert_close(routing.expert_weights, chosen / chosen.sum(1, keepdim=True))


def test_gate_scales_of_one_expert() -> None:
    hidden_TD = torch.randn(8, D_MODEL)
    straight = build_gate()
    plain = build_gate(gate_scale="probability")
    probability = (hidden_TD @ plain.gate.weight.T).softmax(1).amax(1, keepdim=True)
    torch.testing.assert_close(plain(hidden_TD, None).expert_weights, probability)
    routing = straight(hidden_TD, None)
    assert torch.equal(routing.expert_weights, torch.ones(8, 1))
    (grad,) = torch.autograd.grad(routing.expert_weights.sum(), straight.gate.weight)
    (want,) = torch.autograd.grad(probability.log().sum(), plain.gate.weight)
    torch.testing.assert_close(grad, want)


def test_the_constant_weight_is_marked_only_where_nothing_learns() -> None:
    hidden_TD = torch.randn(8, D_MODEL)
    straight, plain = build_gate(), build_gate(gate_scale="probability")
    assert not straight(hidden_TD, None).unit_weights
    with torch.no_grad():
        assert straight(hidden_TD, None).unit_weights
        assert not plain(hidden_TD, None).unit_weights
        assert not build_gate(top_k=2)(hidden_TD, None).unit_weights
    straight.requires_grad_(False)
    assert straight(hidden_TD, None).unit_weights


@pytest.mark.parametrize("top_k", [1, 2])
def test_extreme_logits_stay_finite(top_k: int) -> None:
    for scale in ("straight_through", "probability"):
        router = build_gate(top_k=top_k, gate_scale=scale)
        routing = router(torch.randn(8, D_MODEL) * 1e6, None)
        routing.expert_weights.sum().backward()
        assert routing.expert_weights.isfinite().all()
        assert router.gate.weight.grad is not None
        assert router.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    router = build_gate(gate_scale="probability").to(dtype)
    hidden_TD = torch.randn(8, D_MODEL, dtype=dtype)
    routing = router(hidden_TD, None)
    assert routing.logits.dtype is torch.float32
    assert routing.expert_weights.dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(hidden_TD, None)
    assert routing.logits.dtype is torch.float32
    assert routing.expert_weights.dtype is torch.bfloat16


def test_a_gate_can_be_built_without_values() -> None:
    with torch.device("meta"):
        gate = build_gate()
        router = build_hash()
    assert gate.gate.weight.is_meta
    assert not router.table.is_meta


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("typo", {}, ConversionError, "no router named 'typo'"),
        ("token_gate", {"top_k": 5}, ConversionError, "top_k=5"),
        ("hash_random", {"top_k": 0}, ConversionError, "top_k=0"),
        ("token_gate", {"gate_scale": "loud"}, ValueError, "gate_scale='loud'"),
        ("token_gate", {"gate_noise": -1.0}, ValueError, "gate_noise=-1.0"),
        ("sentence_gate", {"gate_jitter": 1.0}, ValueError, "gate_jitter=1.0"),
        ("task_gate", {"num_tasks": None}, MissingInputError, "number of tasks"),
        ("task_gate", {"task_map": "drawn"}, ConversionError, "learned, fixed"),
        ("task_gate", {"table": torch.tensor([0, 4])}, ConversionError, "experts 0 to 3"),
        ("hash_random", {"vocab_size": None}, MissingInputError, "vocab_size"),
        ("hash_balanced", {"token_counts": None}, MissingInputError, "token_counts"),
        ("hash_balanced", {"token_counts": torch.ones(3)}, MissingInputError, "3 token counts"),
        ("hash_random", {"table": torch.tensor([0, 4])}, ConversionError, "experts 0 to 3"),
        ("hash_random", {"table": torch.tensor([0, -1])}, ConversionError, "experts 0 to 3"),
    ],
)
def test_faults_are_named(
    name: str, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(name, **options)


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match="top_k=3"):
        TokenGate(D_MODEL, 2, top_k=3)
    with pytest.raises(ConversionError, match="shape"):
        HashRouter(torch.empty(0, dtype=torch.int64), 2)
