"""Loss terms of a micro-batch: what is in them and what is not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from moe_dist.losses.router import noisy_load, router_entropy, router_z_loss, squared_variation
from moe_dist.moe.merge_gates import NoisyTopK
from moe_dist.moe.routing import record_routing, use_samples
from moe_dist.training.balance import balance_term, count_choices, made_choices, sum_choices
from moe_dist.training.step import (
    StepTerms,
    distill_terms,
    expert_counts,
    finetune_terms,
    freeze,
)
from tests.training.tiny import model_inputs, padded, tiny_batch, tiny_bert, tiny_data, tiny_student

EVERYTHING: dict[str, Any] = {"load_balancing": True, "z_loss": True, "entropy": True}


def pair(**options: Any) -> tuple[Any, Any]:
    teacher = tiny_bert(dropout=0.0)
    student = tiny_student(teacher, **options)
    return student, freeze(teacher)


def values(computed: StepTerms) -> dict[str, float]:
    return {name: term.sum.item() for name, term in computed.terms.items()}


def test_finetune_is_the_models_own_loss() -> None:
    model = tiny_bert(dropout=0.0)
    batch = tiny_batch()
    own = model(**batch).loss.item()
    term = finetune_terms(model, batch).terms["task"]
    assert term.count_kind == "samples"
    assert term.sum.item() / len(batch["labels"]) == pytest.approx(own, rel=1e-6)


def test_float_labels_mean_regression() -> None:
    model = tiny_bert(dropout=0.0, num_labels=1)
    batch = tiny_batch(tiny_data(regression=True))
    gaps = model(**model_inputs(model, batch)).logits[:, 0] - batch["labels"]
    assert values(finetune_terms(model, batch))["task"] == pytest.approx(
        gaps.square().sum().item(), rel=1e-6
    )
    terms = distill_terms(model, freeze(tiny_bert(seed=1, num_labels=1)), batch).terms
    assert set(terms) == {"task", "prediction_mse", "hidden_mse"}


def test_distillation_compares_embeddings_and_all_layers() -> None:
    student, teacher = pair()
    batch = tiny_batch()
    hidden_s = student(**model_inputs(student, batch), output_hidden_states=True).hidden_states
    hidden_t = teacher(**model_inputs(teacher, batch), output_hidden_states=True).hidden_states
    assert len(hidden_s) == 3
    mask = batch["attention_mask"].bool()
    expected = sum(
        (s[mask] - t[mask]).square().mean(dim=-1).sum().item()
        for s, t in zip(hidden_s, hidden_t, strict=True)
    )
    terms = distill_terms(student, teacher, batch).terms
    assert terms["hidden_mse"].sum.item() == pytest.approx(expected, rel=1e-5)
    assert terms["hidden_mse"].count_kind == "tokens"


def test_a_teachers_copy_is_at_distance_zero() -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student = copy.deepcopy(teacher).train()
    found = values(distill_terms(student, teacher, tiny_batch()))
    assert found["prediction_kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["hidden_mse"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("router", ["token_gate", "hash_random"])
def test_padding_changes_no_term_and_no_count(router: str) -> None:
    student, teacher = pair(router=router)
    batch = tiny_batch()
    narrow = distill_terms(student, teacher, batch, **EVERYTHING)
    wide = distill_terms(student, teacher, padded(batch, 5), **EVERYTHING)
    assert values(wide) == pytest.approx(values(narrow), rel=1e-4)
    assert set(wide.gate_sums) == set(narrow.gate_sums)
    for name, gate in narrow.gate_sums.items():
        torch.testing.assert_close(wide.gate_sums[name].probability_E, gate.probability_E)
    for name, counts in narrow.tokens_per_expert.items():
        assert torch.equal(counts, wide.tokens_per_expert[name])
        assert counts.sum().item() == batch["attention_mask"].sum().item()
    assert len(narrow.tokens_per_expert) == 2


def test_router_terms_are_means_over_layers_weighed_by_tokens() -> None:
    student, teacher = pair()
    batch = tiny_batch()
    with record_routing() as record:
        student(**model_inputs(student, batch))
    mask = batch["attention_mask"].reshape(-1).bool()
    num_tokens = int(mask.sum())
    logits = [entry.routing.logits[mask] for entry in record.entries]  # type: ignore[index]
    ids = [entry.routing.expert_ids[mask] for entry in record.entries]
    computed = distill_terms(student, teacher, batch, **EVERYTHING)
    found = values(computed)
    shares = [torch.bincount(one.reshape(-1), minlength=4) / num_tokens for one in ids]
    balance = [
        4 * (one.softmax(-1).mean(0) * share_E).sum().item()
        for one, share_E in zip(logits, shares, strict=True)
    ]
    term = balance_term(computed.gate_sums, computed.tokens_per_expert)
    assert term.count_kind == "steps"
    assert term.sum.item() == pytest.approx(sum(balance) / 2, rel=1e-5)
    z_loss = sum(router_z_loss(x).item() for x in logits) / 2
    assert found["z_loss"] == pytest.approx(z_loss * num_tokens, rel=1e-5)
    entropy = sum(router_entropy(x).item() for x in logits) / 2
    assert found["router_entropy"] == pytest.approx(entropy * num_tokens, rel=1e-5)


MERGED = pytest.mark.parametrize("router", ["merged_task", "merged_sequence", "merged_token"])


def merged_student(router: str, teacher: Any, **options: Any) -> Any:
    """Gates that are no longer zero, in training mode."""
    student = tiny_student(teacher, router=router, num_tasks=1, **({"top_k": 2} | options))
    torch.manual_seed(4)
    for module in student.modules():
        if isinstance(module, NoisyTopK):
            torch.nn.init.normal_(module.gate.weight)
    return student.train()


@MERGED
def test_the_balance_of_merges_is_that_of_their_groups(router: str) -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student, batch = merged_student(router, teacher), tiny_batch()
    samples = torch.arange(len(batch["labels"]))
    with use_samples(samples, 7), record_routing() as record:
        student(**model_inputs(student, batch))
    with use_samples(samples, 7):
        computed = distill_terms(student, teacher, batch, load_balancing=True)
        wide = distill_terms(student, teacher, padded(batch, 5), load_balancing=True)
    expected = []
    for entry in record.entries:
        routing = entry.routing
        assert routing.clean_logits is not None and routing.noise_std is not None
        assert routing.logits is not None
        weights_GE = torch.zeros(routing.logits.shape)
        weights_GE.scatter_(1, routing.expert_ids, routing.expert_weights)
        load_GE = noisy_load(routing.clean_logits, routing.logits, routing.noise_std, top_k=2)
        expected.append(squared_variation(weights_GE.sum(0)) + squared_variation(load_GE.sum(0)))
        assert len(load_GE) == (1 if router == "merged_task" else len(samples))
        # Each merge counts 1, whatever its group's tokens and K.
        assert float(computed.tokens_per_expert[entry.name].sum()) == pytest.approx(len(load_GE))
    assert len(expected) == 2 * 2  # two layers, each with two linear layers
    term = balance_term(computed.gate_sums, made_choices(computed))
    assert float(term.sum) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    padding = balance_term(wide.gate_sums, made_choices(wide))
    assert float(padding.sum) == pytest.approx(float(term.sum), rel=1e-4)
    term.sum.backward()
    gates = [module for module in student.modules() if isinstance(module, NoisyTopK)]
    for gate in gates:
        for weight in (gate.gate.weight, gate.noise.weight):
            assert weight.grad is not None and float(weight.grad.abs().sum()) > 0


@MERGED
def test_merges_that_use_all_experts_have_an_even_load(router: str) -> None:
    teacher = freeze(tiny_bert(dropout=0.0))
    student, batch = merged_student(router, teacher, top_k=4), tiny_batch()
    computed = distill_terms(student, teacher, batch, load_balancing=True)
    for gate in computed.gate_sums.values():
        assert gate.load_E is not None
        assert float(squared_variation(gate.load_E)) == 0
        assert float(squared_variation(gate.probability_E)) > 0


def test_hash_routing_has_no_router_terms() -> None:
    student, teacher = pair(router="hash_random")
    computed = distill_terms(student, teacher, tiny_batch(), **EVERYTHING)
    assert set(computed.terms) == {"task", "prediction_kl", "hidden_mse"}
    assert computed.gate_sums == {}


def test_hidden_states_are_asked_for_only_where_they_count() -> None:
    student, teacher = pair()
    asked: list[bool] = []
    for model in (student, teacher):
        model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs["output_hidden_states"]),
            with_kwargs=True,
        )
    assert set(
        distill_terms(student, teacher, tiny_batch(), objectives=["prediction_kl"]).terms
    ) == {
        "task",
        "prediction_kl",
    }
    assert asked == [False, False]
    distill_terms(student, teacher, tiny_batch(), objectives=())
    assert asked == [False, False, False], "a teacher that nothing needs is not run"


def test_the_teacher_is_left_as_it_is() -> None:
    student, teacher = pair()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.train()
    sum(
        term.sum for term in distill_terms(student, teacher, tiny_batch()).terms.values()
    ).backward()
    assert not teacher.training
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert any(p.grad is not None for p in student.parameters())
    owned = {id(p) for p in student.parameters()}
    assert owned.isdisjoint(id(p) for p in teacher.parameters())


def test_expert_counts_add_up_over_forwards() -> None:
    student, _ = pair()
    batch = tiny_batch()
    with record_routing() as record:
        student(**model_inputs(student, batch))
        student(**model_inputs(student, batch))
    for count_E in expert_counts(record).values():
        assert count_E.shape == (4,)
        assert count_E.sum().item() == 2 * batch["attention_mask"].sum().item()


def test_routing_sums_tell_of_entropy_and_drops() -> None:
    from moe_dist.moe import Capacity, MoELayer

    student, teacher = pair()
    batch = tiny_batch()
    num_tokens = int(batch["attention_mask"].sum())
    plain = distill_terms(student.train(), teacher, batch).routing_sums
    for entropy, num_gated, dropped, num_slots in (sums.tolist() for sums in plain.values()):
        assert 0 < entropy / num_gated <= math.log(4) + 1e-6
        assert (num_gated, dropped, num_slots) == (num_tokens, 0, 0)
    for layer in student.modules():
        if isinstance(layer, MoELayer):
            layer.capacity = Capacity(0.25)
    limited = distill_terms(student, teacher, batch)
    wide = distill_terms(student, teacher, padded(batch, 5))
    for name, sums in limited.routing_sums.items():
        most = math.ceil(0.25 * num_tokens / 4)
        counts = limited.tokens_per_expert[name]
        assert sums[2].item() == (counts - most).clamp(min=0).sum().item()
        assert sums[3].item() == num_tokens
        torch.testing.assert_close(wide.routing_sums[name], sums)
    assert len(limited.routing_sums) == 2
    hashed = pair(router="hash_random")[0]
    assert finetune_terms(hashed, batch).routing_sums == {}


def test_choices_are_counted_as_the_step_will_make_them() -> None:
    """With dropout too, if the generator stands where the step will start."""
    student = tiny_student(tiny_bert(dropout=0.5)).train()
    batches = [tiny_batch(), tiny_batch(tiny_data(seed=4))]
    torch.manual_seed(8)
    counted = sum_choices([count_choices(student, batch) for batch in batches])
    torch.manual_seed(8)
    made = sum_choices([finetune_terms(student, batch).tokens_per_expert for batch in batches])
    torch.manual_seed(9)
    other = sum_choices([count_choices(student, batch) for batch in batches])
    assert counted.keys() == made.keys()
    assert all(torch.equal(counted[name], made[name]) for name in made)
    assert any(not torch.equal(counted[name], other[name]) for name in made)
    assert all(parameter.grad is None for parameter in student.parameters())
