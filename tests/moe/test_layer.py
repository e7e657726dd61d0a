"""The layer equals its per-token oracle, outputs and gradients, in every corner."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_dist.errors import MissingInputError
from moe_dist.moe import (
    ROUTERS,
    Experts,
    HashRouter,
    MoELayer,
    RoutingContext,
    TokenGate,
    build_router,
    checkpoint_context_fn,
    current_context,
    install_routing_hooks,
    record_routing,
    use_context,
)
from moe_dist.moe.reference import reference_layer
from moe_dist.router_spec import ROUTER_FACTS

SENDERS = [name for name in ROUTERS if not ROUTER_FACTS[name].merges]
D_MODEL, EXPERT_SIZE, VOCAB_SIZE, NUM_TASKS = 12, 8, 40, 3


def build_layer(
    router: str = "token_gate",
    *,
    num_experts: int = 4,
    top_k: int = 1,
    gated: bool = False,
    biases: bool = True,
    num_shared: int = 0,
    expert_size: int = EXPERT_SIZE,
    gate_scale: str = "straight_through",
    dtype: torch.dtype = torch.float32,
) -> MoELayer:
    torch.manual_seed(0)
    experts = Experts(
        num_experts,
        D_MODEL,
        expert_size,
        activation="gelu",
        gated=gated,
        bias_in=biases,
        bias_out=biases,
    )
    shared = None
    if num_shared:
        shared = Experts(1, D_MODEL, num_shared, activation="gelu", gated=gated, bias_out=False)
    chosen = None
    if num_experts > 1:
        chosen = build_router(
            router,
            d_model=D_MODEL,
            num_experts=num_experts,
            top_k=top_k,
            vocab_size=VOCAB_SIZE,
            seed=3,
            token_counts=torch.arange(VOCAB_SIZE),
            num_tasks=NUM_TASKS,
            gate_scale=gate_scale,
        )
    if isinstance(chosen, TokenGate):
        # Gates start near zero; larger weights make probabilities, and their gradients, differ.
        nn.init.normal_(chosen.gate.weight)
    return MoELayer(experts, chosen, shared=shared, name="layer").to(dtype)


def batch(
    num_sentences: int = 3, length: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, RoutingContext]:
    generator = torch.Generator().manual_seed(1)
    shape = (num_sentences, length)
    hidden = torch.randn(*shape, D_MODEL, generator=generator).to(dtype)
    token_ids = torch.randint(VOCAB_SIZE, shape, generator=generator)
    task_ids = torch.arange(num_sentences) % NUM_TASKS
    return hidden, RoutingContext(token_ids, task_ids=task_ids)


def gradients(layer: MoELayer) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    present = {name: grad for name, grad in found.items() if grad is not None}
    assert present.keys() == found.keys()
    return present


def assert_equals_oracle(
    layer: MoELayer, hidden: Tensor, context: RoutingContext, atol: float = 1e-5
) -> None:
    hidden = hidden.requires_grad_()
    wanted = [hidden, *layer.parameters()]
    results = []
    for forward in (layer, lambda value: reference_layer(layer, value)):
        with use_context(context):
            out = forward(hidden)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
        zeros = [torch.zeros_like(value) for value in wanted]
        filled = [zero if g is None else g for g, zero in zip(grads, zeros, strict=True)]
        results.append([out, *filled])
    assert results[0][0].shape == hidden.shape
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=atol, rtol=atol)


@pytest.mark.parametrize(
    ("router", "top_k", "gated", "num_shared"),
    list(itertools.product(SENDERS, (1, 2, 4), (False, True), (0, 3))),
)
def test_outputs_and_gradients_equal_the_oracle(
    router: str, top_k: int, gated: bool, num_shared: int
) -> None:
    layer = build_layer(router, top_k=top_k, gated=gated, num_shared=num_shared)
    assert_equals_oracle(layer, *batch())


@pytest.mark.parametrize("gate_scale", ["straight_through", "probability"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("biases", [False, True])
def test_gate_scales_and_missing_biases(gate_scale: str, top_k: int, biases: bool) -> None:
    layer = build_layer(top_k=top_k, gate_scale=gate_scale, biases=biases)
    assert_equals_oracle(layer, *batch())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (4, 16)])
@pytest.mark.parametrize("num_experts", [2, 3, 16])
def test_odd_shapes_and_empty_experts(shape: tuple[int, int], num_experts: int) -> None:
    layer = build_layer("hash_random", num_experts=num_experts, num_shared=2)
    assert_equals_oracle(layer, *batch(*shape))


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_at_all(top_k: int) -> None:
    layer = build_layer("hash_random", top_k=top_k, num_shared=2)
    hidden = torch.empty(0, 5, D_MODEL, requires_grad=True)
    with use_context(RoutingContext(torch.empty(0, 5, dtype=torch.int64))):
        out = layer(hidden)
    out.sum().backward()
    assert out.shape == hidden.shape
    assert all(not grad.any() for grad in gradients(layer).values())


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_all_tokens_to_one_expert(expert: int) -> None:
    layer = build_layer("hash_random")
    layer.router = HashRouter(torch.full((VOCAB_SIZE,), expert), 4)
    hidden, context = batch()
    assert_equals_oracle(layer, hidden, context)
    with use_context(context):
        layer(hidden).sum().backward()
    assert layer.experts.w_in is not None
    grad = layer.experts.w_in.grad
    assert grad is not None
    moved = grad.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [index == expert for index in range(4)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_shared", [0, 3])
def test_one_expert_needs_no_router(gated: bool, num_shared: int) -> None:
    layer = build_layer(num_experts=1, gated=gated, num_shared=num_shared)
    assert (layer.router, layer.num_experts, layer.top_k) == (None, 1, 1)
    assert_equals_oracle(layer, *batch())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_experts_without_neurons_leave_their_bias(biases: bool, num_experts: int) -> None:
    layer = build_layer(
        "hash_random", expert_size=0, num_shared=3, biases=biases, num_experts=num_experts
    )
    names = [name for name, _ in layer.experts.named_parameters()]
    assert names == (["b_out"] if biases else [])
    assert_equals_oracle(layer, *batch())


def test_flat_tokens_give_the_same_as_sentences() -> None:
    layer = build_layer(top_k=2)
    hidden, _ = batch()
    torch.testing.assert_close(layer(hidden.flatten(0, 1)), layer(hidden).flatten(0, 1))


def test_non_contiguous_input() -> None:
    layer = build_layer(top_k=2, num_shared=2)
    hidden, context = batch()
    assert_equals_oracle(layer, hidden.transpose(0, 1).contiguous().transpose(0, 1), context)


def test_gradient_of_a_plain_sum() -> None:
    layer = build_layer(top_k=2)
    hidden, _ = batch()
    layer(hidden).sum().backward()
    fast = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    reference_layer(layer, hidden).sum().backward()
    for grad, parameter in zip(fast, layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, atol=1e-5, rtol=1e-5)


def test_gradients_equal_finite_differences() -> None:
    layer = build_layer("hash_random", top_k=2, gated=True, num_shared=2, dtype=torch.float64)
    hidden, context = batch(1, 4, torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(value: Tensor, *new: Tensor) -> Tensor:
        with use_context(context):
            return functional_call(layer, dict(zip(names, new, strict=True)), (value,))

    assert gradcheck(forward, (hidden.requires_grad_(), *parameters), fast_mode=True)


def test_frozen_parameters_get_no_gradient_and_change_no_other() -> None:
    layer = build_layer(top_k=2)
    hidden, context = batch()
    with use_context(context):
        layer(hidden).square().sum().backward()
    parameters = dict(layer.named_parameters())
    want = {name: parameter.grad for name, parameter in parameters.items()}
    layer.zero_grad()
    frozen = {"experts.w_in", "experts.b_in", "experts.b_out"}
    for name in frozen:
        parameters[name].requires_grad_(False)
    layer(hidden).square().sum().backward()
    for name, parameter in parameters.items():
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, want[name])


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_bfloat16_stays_near_float32(router: str, top_k: int) -> None:
    layer = build_layer(router, top_k=top_k, num_shared=2)
    hidden, context = batch()
    low = copy.deepcopy(layer).to(torch.bfloat16)
    with use_context(context), record_routing() as record:
        exact, rounded = layer(hidden), low(hidden.bfloat16())
    assert rounded.dtype is torch.bfloat16
    same = (record.entries[0].routing.expert_ids == record.entries[1].routing.expert_ids).all(1)
    assert same.float().mean() > 0.8
    gap = (rounded.float() - exact).flatten(0, 1)[same].abs().max()
    assert gap < 0.05


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_autocast_computes_in_bfloat16_and_keeps_float32_gradients(router: str) -> None:
    layer = build_layer(router, top_k=2, num_shared=2)
    hidden, context = batch()
    with use_context(context), torch.autocast("cpu", torch.bfloat16), record_routing() as record:
        out = layer(hidden)
        plain = nn.functional.linear(hidden, torch.ones(3, D_MODEL))
    assert out.dtype is plain.dtype is torch.bfloat16
    logits = record.entries[0].routing.logits
    assert logits is None or logits.dtype is torch.float32
    with use_context(context):
        torch.testing.assert_close(out.float(), layer(hidden), atol=0.03, rtol=0.03)
    out.float().square().sum().backward()
    assert {grad.dtype for grad in gradients(layer).values()} == {torch.float32}


def test_autocast_routes_as_full_precision_does() -> None:
    layer = build_layer(num_experts=8)
    hidden, _ = batch(8, 32)
    with record_routing() as record:
        layer(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            layer(hidden)
    full, low = (entry.routing for entry in record.entries)
    assert torch.equal(full.expert_ids, low.expert_ids)
    torch.testing.assert_close(full.logits, low.logits, atol=0, rtol=0)


def test_double_input_is_not_cast_by_autocast() -> None:
    layer = build_layer("hash_random", dtype=torch.float64)
    hidden, context = batch(dtype=torch.float64)
    with use_context(context), torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden).dtype is torch.float64


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("router", SENDERS)
def test_equal_experts_make_routing_invisible(router: str, top_k: int) -> None:
    layer = build_layer(router, top_k=top_k)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    dense = build_layer(num_experts=1)
    dense.experts.load_state_dict(
        {name: value[:1] for name, value in layer.experts.state_dict().items()}
    )
    hidden, context = batch()
    with use_context(context):
        torch.testing.assert_close(layer(hidden), dense(hidden), atol=1e-5, rtol=1e-5)


def test_straight_through_gate_learns_though_its_weight_is_one() -> None:
    layer = build_layer()
    hidden, _ = batch()
    with record_routing() as record:
        layer(hidden).square().sum().backward()
    routing = record.entries[0].routing
    assert torch.equal(routing.expert_weights, torch.ones_like(routing.expert_weights))
    assert not routing.unit_weights
    assert isinstance(layer.router, TokenGate)
    grad = layer.router.gate.weight.grad
    assert grad is not None
    assert grad.abs().max() > 1e-3
    with torch.no_grad():
        trained = layer(hidden)
    torch.testing.assert_close(trained, layer(hidden), atol=0, rtol=0)


def test_expert_dropout_only_in_training() -> None:
    layer = build_layer("hash_random")
    layer.experts.dropout = 0.5
    hidden, context = batch()
    with use_context(context):
        assert not torch.equal(layer(hidden), layer(hidden))
        layer.eval()
        assert torch.equal(layer(hidden), layer(hidden))


def test_layer_survives_copy_and_state_dict() -> None:
    layer = build_layer("hash_random", top_k=2, num_shared=2)
    other = build_layer("hash_random", top_k=2, num_shared=2)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert isinstance(other.router, HashRouter)
    other.router.table.zero_()
    other.load_state_dict(layer.state_dict())
    hidden, context = batch()
    with use_context(context):
        assert torch.equal(layer(hidden), other(hidden))
        assert torch.equal(layer(hidden), copy.deepcopy(layer)(hidden))


def test_a_permutation_of_tokens_permutes_the_output() -> None:
    layer = build_layer(top_k=2)
    hidden = batch()[0].flatten(0, 1)
    shuffled = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(layer(hidden[shuffled]), layer(hidden)[shuffled])


class Stack(nn.Module):
    """A tiny model of two MoE layers, with hooks and, if asked, gradient checkpoints."""

    def __init__(self, router: str, *, checkpointed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.layers = nn.ModuleList(build_layer(router, num_shared=2) for _ in range(2))
        self.checkpointed = checkpointed
        install_routing_hooks(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            if self.checkpointed:
                hidden = hidden + checkpoint(
                    layer, hidden, use_reentrant=False, context_fn=checkpoint_context_fn
                )
            else:
                hidden = hidden + layer(hidden)
        return hidden


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
@pytest.mark.parametrize("thread", [False, True])
def test_checkpointing_changes_neither_gradients_nor_the_record(router: str, thread: bool) -> None:
    token_ids = batch()[1].token_ids
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        stack = Stack(router, checkpointed=checkpointed)
        with record_routing() as record:
            out = stack(token_ids)
            loss = out.square().sum()
            for entry in record.entries:
                if entry.routing.logits is not None:
                    loss = loss + entry.routing.logits.logsumexp(-1).square().sum()
            if thread:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(loss.backward).result()
            else:
                loss.backward()
        assert len(record.entries) == 2
        assert current_context() is None
        results.append([parameter.grad for parameter in stack.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_checkpointing_without_the_context_is_a_named_error() -> None:
    layer = build_layer("hash_random")
    hidden, context = batch()
    with use_context(context):
        out = checkpoint(layer, hidden.requires_grad_(), use_reentrant=False)
    with pytest.raises(MissingInputError, match="checkpoint_context_fn"):
        out.sum().backward()


def test_two_models_and_many_threads_do_not_see_each_other() -> None:
    layers = [build_layer("hash_random", num_experts=4), build_layer("hash_random", num_experts=3)]
    generator = torch.Generator().manual_seed(2)
    hidden, _ = batch()
    contexts = [
        RoutingContext(torch.randint(VOCAB_SIZE, (3, 5), generator=generator)) for _ in range(8)
    ]
    want = []
    for index, context in enumerate(contexts):
        with use_context(context):
            want.append(layers[index % 2](hidden).detach())
    barrier = threading.Barrier(len(contexts))

    def work(index: int) -> list[Tensor]:
        outputs = []
        with use_context(contexts[index]), record_routing() as record:
            for _ in range(5):
                barrier.wait(timeout=30)
                outputs.append(layers[index % 2](hidden).detach())
        assert [entry.num_experts for entry in record.entries] == [4 - index % 2] * 5
        return outputs

    with ThreadPoolExecutor(len(contexts)) as pool:
        for index, outputs in enumerate(pool.map(work, range(len(contexts)))):
            assert all(torch.equal(out, want[index]) for out in outputs)


@pytest.mark.parametrize(
    ("experts", "router", "shared", "message"),
    [
        (Experts(4, 8, 4, activation="relu"), None, None, "give a router"),
        (Experts(1, 8, 4, activation="relu"), TokenGate(8, 1), None, "none for one"),
        (Experts(4, 8, 4, activation="relu"), TokenGate(8, 3), None, "the router knows 3"),
        (
            Experts(1, 8, 4, activation="relu"),
            None,
            Experts(1, 8, 4, activation="relu"),
            "without b_out",
        ),
    ],
)
def test_parts_that_do_not_fit(
    experts: Experts, router: nn.Module | None, shared: Experts | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(experts, router, shared=shared)
