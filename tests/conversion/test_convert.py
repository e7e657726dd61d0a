"""Conversion keeps the function where it must, and the rest of the model always."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition, score_importance
from moe_dist.conversion.moe_slots import MoeSettings
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe import ROUTERS as ROUTER_TABLE
from moe_dist.moe import Capacity
from moe_dist.moe.layer import MoELayer, moe_layers
from moe_dist.moe.routing import record_routing
from moe_dist.router_spec import RouterSpec
from moe_dist.training.step import expert_counts
from tests.conversion.dense_models import (
    FAMILY_NAMES,
    NUM_NEURONS,
    VOCAB_SIZE,
    labelled_batch,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)

ROUTERS: list[dict[str, Any]] = [
    {"router": "hash_random"},
    {"router": "hash_random", "top_k": 2},
    {"router": "hash_balanced", "token_counts": torch.arange(VOCAB_SIZE)},
    {"router": "token_gate"},
    {"router": "token_gate", "top_k": 2},
    {"router": "sentence_gate"},
    {"router": "sentence_gate", "top_k": 2},
    {"router": "task_gate", "num_tasks": 1},
    {"router": "task_gate", "num_tasks": 1, "top_k": 2, "task_map": "fixed"},
    {"router": "merged_task", "top_k": 2},
    {"router": "merged_sequence"},
    {"router": "merged_sequence", "top_k": 3, "merge_gates": "one"},
    {"router": "merged_token", "top_k": 2},
]
SIZES: dict[str, Any] = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}


def plan_for(model: Any, **changes: Any) -> Any:
    return plan_partition(random_scores(model), **(SIZES | changes))


def assert_same_function(model: Any, student: Any) -> None:
    batch = token_batch()
    expected = logits_of(model, batch)
    assert float(expected.std()) > 0.1, "a trivial case proves nothing"
    torch.testing.assert_close(logits_of(student, batch), expected, rtol=1e-5, atol=1e-5)


def test_every_router_is_among_the_cases() -> None:
    assert {options["router"] for options in ROUTERS} == set(ROUTER_TABLE)


@pytest.mark.parametrize("options", ROUTERS, ids=lambda o: f"{o['router']}-{o.get('top_k', 1)}")
def test_function_is_kept(options: dict[str, Any]) -> None:
    model = tiny_model("bert")
    everything = {"expert_size": NUM_NEURONS, "num_shared_neurons": NUM_NEURONS}
    copies = {"expert_size": NUM_NEURONS, "num_shared_neurons": 0, "method": "full_copy"}
    half_tied = copies | {"num_shared_neurons": 16, "tie_shared": True}
    for changes in (everything, everything | {"tie_shared": True}, copies, half_tied):
        student = dense_to_moe(model, plan_for(model, **changes), **options)
        assert_same_function(model, student)


def test_one_expert_of_all_neurons_is_the_model() -> None:
    model = tiny_model("bert")
    student = dense_to_moe(model, plan_for(model, num_experts=1, expert_size=NUM_NEURONS))
    assert all(one.router is None for one in student.modules() if isinstance(one, MoELayer))
    assert_same_function(model, student)


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_tied_and_untied_start_alike(router: str) -> None:
    model = tiny_model("bert")
    untied = dense_to_moe(model, plan_for(model), router=router)
    tied = dense_to_moe(model, plan_for(model, tie_shared=True), router=router)
    batch = token_batch()
    dense, one, other = (logits_of(each, batch) for each in (model, untied, tied))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, dense, atol=1e-2), "most neurons are gone"
    layer = next(each for each in tied.modules() if isinstance(each, MoELayer))
    assert layer.shared is not None
    assert (layer.shared.expert_size, layer.experts.expert_size) == (4, 4)


def test_probability_scales_the_output() -> None:
    model = tiny_model("bert")
    plan = plan_for(model, expert_size=NUM_NEURONS, num_shared_neurons=NUM_NEURONS)
    student = dense_to_moe(model, plan, router="token_gate", gate_scale="probability")
    batch = token_batch()
    assert not torch.allclose(logits_of(student, batch), logits_of(model, batch), atol=1e-2)


def test_source_model_is_left_untouched() -> None:
    model = tiny_model("bert").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    student = dense_to_moe(model, plan_for(model))
    assert torch.equal(torch.rand(1), expected), "conversion must not consume random numbers"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_mode_frozen_weights_and_settings_come_along() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.3, num_labels=3)
    model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model.bert.embeddings.requires_grad_(False)
    student = dense_to_moe(model.train(), plan_for(model))
    assert student.training
    assert type(student).__name__ == "MoeBertForSequenceClassification"
    assert not student.bert.embeddings.word_embeddings.weight.requires_grad
    assert student.bert.encoder.layer[0].intermediate.experts.w_in.requires_grad
    assert student.bert.encoder.layer[0].output.dropout.p == 0.3
    assert student.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert student.config.model_type == "moe_bert"
    assert student.config.moe["num_experts"] == 4
    assert student.config.hidden_act == model.config.hidden_act


def test_dropout_between_the_linear_layers_moves_into_the_experts() -> None:
    for family, dropout in (("bart", 0.2), ("t5", 0.1)):
        student = dense_to_moe(tiny_model(family), plan_for(tiny_model(family)))
        layers = [one for one in student.modules() if isinstance(one, MoELayer)]
        assert [one.experts.dropout for one in layers] == [dropout] * 4
    assert student.config.model_type == "moe_t5"
    bart = dense_to_moe(tiny_model("bart"), plan_for(tiny_model("bart")))
    assert bart.model.encoder.layers[0].activation_dropout == 0.0


def test_noise_and_capacity_are_kept_in_the_configuration() -> None:
    model = tiny_model("bert")
    options = {"gate_noise": 0.5, "gate_jitter": 0.1, "capacity_factor": 1.5}
    student = dense_to_moe(
        model, plan_for(model), router="token_gate", drop_policy="probability", **options
    )
    for layer in (one for one in student.modules() if isinstance(one, MoELayer)):
        assert (layer.router.noise, layer.router.jitter) == (0.5, 0.1)
        assert layer.capacity == Capacity(1.5, "probability")
    again = type(student)(student.config)
    assert again.bert.encoder.layer[0].intermediate.capacity == Capacity(1.5, "probability")
    values = dict(student.config.moe)
    for name in (*options, "drop_policy", "task_map", "vocab_size"):
        del values[name]
    old = MoeSettings.from_dict(values)
    assert (Capacity.of(old.router), old.router.gate_noise, old.vocab_size) == (None, 0.0, None)
    with pytest.raises(ConversionError, match=r"lacks moe\.router"):
        MoeSettings.from_dict({name: v for name, v in values.items() if name != "router"})
    with pytest.raises(ConversionError, match="no capacity"):
        dense_to_moe(model, plan_for(model), capacity_factor=-1.0)


def test_a_router_with_its_options_is_one_value() -> None:
    model = tiny_model("bert")
    spec = RouterSpec(router="token_gate", top_k=2, gate_noise=0.5, capacity_factor=1.5)
    plan = plan_for(model)
    student = dense_to_moe(model, plan, router=spec)
    named = dense_to_moe(
        model, plan, router="token_gate", top_k=2, gate_noise=0.5, capacity_factor=1.5
    )
    assert student.config.moe == named.config.moe
    assert MoeSettings.from_dict(student.config.moe).router == spec
    for name, value in student.state_dict().items():
        assert torch.equal(value, named.state_dict()[name]), name
    single = dense_to_moe(model, plan, router=spec, top_k=1, gate_noise=0.0)
    assert (single.config.moe["top_k"], single.config.moe["gate_noise"]) == (1, 0.0)
    assert single.config.moe["capacity_factor"] == 1.5
    with pytest.raises(TypeError, match="gate_nose"):
        dense_to_moe(model, plan, gate_nose=0.5)


def test_every_option_of_a_router_is_kept_in_the_configuration() -> None:
    student = dense_to_moe(tiny_model("bert"), plan_for(tiny_model("bert")))
    assert {one.name for one in fields(RouterSpec)} <= set(student.config.moe)


# As version 0.1.0 wrote it.
SAVED: dict[str, Any] = {
    "activation": {"hidden_act": "gelu"},
    "capacity_factor": 1.25,
    "drop_policy": "probability",
    "expert_size": 8,
    "gate_jitter": 0.1,
    "gate_noise": 0.5,
    "gate_scale": "probability",
    "layers": [0, 1],
    "num_experts": 4,
    "num_shared_neurons": 4,
    "num_tasks": None,
    "partition": "importance",
    "router": "token_gate",
    "seed": 3,
    "task_map": "learned",
    "tie_shared": True,
    "top_k": 1,
    "vocab_size": VOCAB_SIZE,
}


def test_a_model_saved_before_is_read_as_it_was(tmp_path: Path) -> None:
    from moe_dist.inference import load_model, save_model

    options = {name: SAVED[name] for name in ("gate_noise", "gate_jitter", "drop_policy")}
    student = dense_to_moe(
        tiny_model("bert"),
        plan_for(tiny_model("bert"), tie_shared=True, layers=[0, 1]),
        router="token_gate",
        seed=3,
        gate_scale="probability",
        capacity_factor=1.25,
        **options,
    )
    file = save_model(student, tmp_path / "model") / "config.json"
    written = json.loads(file.read_text())["moe"]
    assert written == SAVED | {"merge_gates": "each", "segment_length": 128}
    assert MoeSettings.from_dict(SAVED) == MoeSettings.from_dict(written)
    loaded = load_model(file.parent)
    for name, value in student.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    for layer in moe_layers(loaded):
        assert (layer.router.noise, layer.router.jitter) == (0.5, 0.1)
        assert layer.router.gate_scale == "probability"
        assert layer.capacity == Capacity(1.25, "probability")


def test_one_expert_is_saved_without_a_router() -> None:
    model = tiny_model("bert")
    plan = plan_for(model, num_experts=1, expert_size=NUM_NEURONS)
    student = dense_to_moe(model, plan, router="task_gate", top_k=2, capacity_factor=2.0)
    saved = student.config.moe
    assert (saved["router"], saved["top_k"], saved["capacity_factor"]) == ("none", 1, None)
    assert [layer.router for layer in moe_layers(type(student)(student.config))] == [None] * 2


def test_tokens_added_later_are_routed(tmp_path: Path) -> None:
    from moe_dist.inference import load_model, save_model

    model = tiny_model("bert")
    student = dense_to_moe(model, plan_for(model))
    student.resize_token_embeddings(VOCAB_SIZE + 6)
    ids = torch.tensor([[3, VOCAB_SIZE, VOCAB_SIZE + 5]])
    with torch.no_grad():
        expected = student(input_ids=ids).logits
    loaded = load_model(save_model(student, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_copies_become_different_experts() -> None:
    """Sparse upcycling: each copy sees other tokens from the first step on."""
    model = tiny_model("bert")
    copies = {"expert_size": NUM_NEURONS, "num_shared_neurons": 0, "method": "full_copy"}
    batch = token_batch(16, 12) | {"labels": torch.arange(16) % 2}
    for router in ("hash_random", "token_gate", "sentence_gate"):
        student = dense_to_moe(model, plan_for(model, **copies), router=router, top_k=2).train()
        experts = student.bert.encoder.layer[0].intermediate.experts
        assert torch.equal(experts.w_in[0], experts.w_in[1])
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        with record_routing() as record:
            student(**batch).loss.backward()
        assert all(int((count_E > 0).sum()) >= 3 for count_E in expert_counts(record).values())
        optimizer.step()
        pairs = itertools.combinations(range(4), 2)
        assert all(not torch.equal(experts.w_in[a], experts.w_in[b]) for a, b in pairs)


def test_only_chosen_layers_are_converted() -> None:
    model = tiny_model("bert")
    student = dense_to_moe(model, plan_for(model, layers=[1]))
    names = [one.name for one in student.modules() if isinstance(one, MoELayer)]
    assert names == ["bert.encoder.layer.1"]
    dense = student.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(dense, model.bert.encoder.layer[0].intermediate.dense.weight)


def test_seed_decides_tables_and_gates() -> None:
    model = tiny_model("bert")
    plan = plan_for(model)
    for router in ("hash_random", "token_gate"):
        first, again, other = (
            dense_to_moe(model, plan, router=router, seed=seed).state_dict() for seed in (1, 1, 2)
        )
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        routers = [name for name in first if ".router." in name]
        assert len(routers) == 2
        assert not torch.equal(first[routers[0]], first[routers[1]]), "a fresh one each layer"
        assert not any(torch.equal(first[name], other[name]) for name in routers)


def test_gates_get_a_gradient_at_top_1() -> None:
    model = tiny_model("bert")
    student = dense_to_moe(model, plan_for(model), router="token_gate")
    student(**token_batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    gate = student.bert.encoder.layer[0].intermediate.router.gate.weight
    assert float(gate.grad.abs().max()) > 0


def test_reentrant_checkpointing_is_refused() -> None:
    student = dense_to_moe(tiny_model("bert"), plan_for(tiny_model("bert")))
    with pytest.raises(ConversionError, match="reentrant"):
        student.activation_checkpointing_enable({"use_reentrant": True})


def test_scored_planned_and_converted_in_one_go() -> None:
    for family in FAMILY_NAMES:
        model = tiny_model(family)
        batch = token_batch()
        scores = score_importance(model, [labelled_batch(model)])
        plan = plan_partition(scores, **SIZES, tie_shared=True, model=model)
        student = dense_to_moe(model, plan, router="token_gate", top_k=2)
        assert torch.isfinite(logits_of(student, batch)).all()


def test_a_plan_of_another_model() -> None:
    bert = tiny_model("bert")
    with pytest.raises(ConversionError, match="plan is for 2 FFNs, but the model has 4"):
        dense_to_moe(tiny_model("t5"), plan_for(bert))
    with pytest.raises(ConversionError, match="32 neurons of FFN 0, but the model's has 48"):
        dense_to_moe(tiny_model("bert", intermediate_size=48), plan_for(bert))


def test_models_that_cannot_be_converted() -> None:
    plan = plan_for(tiny_model("bert"))
    with pytest.raises(ConversionError, match="no feed-forward networks that moe-dist knows"):
        dense_to_moe(torch.nn.Linear(2, 2), plan)
    student = dense_to_moe(tiny_model("bert"), plan)
    with pytest.raises(ConversionError, match="mixture of experts already"):
        dense_to_moe(student, plan)


def test_routers_that_cannot_be_built() -> None:
    model = tiny_model("bert")
    plan = plan_for(model)
    with pytest.raises(ConversionError, match="no router named 'magic'"):
        dense_to_moe(model, plan, router="magic")
    with pytest.raises(ConversionError, match="top_k=5"):
        dense_to_moe(model, plan, top_k=5)
    with pytest.raises(MissingInputError, match="token counts"):
        dense_to_moe(model, plan, router="hash_balanced")


def test_a_model_built_without_its_pooler_stays_without() -> None:
    from transformers import BertModel

    torch.manual_seed(0)
    model = BertModel(tiny_model("bert").config, add_pooling_layer=False).eval()
    everything = {"expert_size": NUM_NEURONS, "num_shared_neurons": NUM_NEURONS}
    student = dense_to_moe(model, plan_for(model, **everything), router="token_gate")
    assert student.pooler is None
    with torch.no_grad():
        expected = model(**token_batch()).last_hidden_state
        torch.testing.assert_close(student(**token_batch()).last_hidden_state, expected)
    assert student.config.moe["absent"] == ["pooler"]


def _add_module(model: Any) -> None:
    model.extra = torch.nn.Linear(2, 2)


def _take_module(model: Any) -> None:
    model.classifier = torch.nn.Identity()


def _widen_head(model: Any) -> None:
    model.classifier = torch.nn.Linear(16, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [(_add_module, "extra.bias"), (_take_module, "classifier.bias"), (_widen_head, "classifier")],
)
def test_a_model_that_its_configuration_does_not_describe_is_refused(
    change: Any, named: str
) -> None:
    model = tiny_model("bert")
    change(model)
    with pytest.raises(ConversionError, match="is not what its configuration describes") as caught:
        dense_to_moe(model, plan_for(model))
    assert named in caught.value.message


def test_embeddings_that_are_tied_by_their_configuration_alone_are_refused() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    dense_to_moe(model, plan_for(model))
    model.lm_head.weight = torch.nn.Parameter(torch.rand_like(model.lm_head.weight))
    with pytest.raises(ConversionError, match=r"lm_head\.weight, which differs from model\.embed"):
        dense_to_moe(model, plan_for(model))
