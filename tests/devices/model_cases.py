"""Whole models: every objective, family and kind of task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.devices.prepared import Prepared, autocast, tiny_student


def objective_case(objective: str, precision: str, device: torch.device) -> Prepared:
    """One loss of a small student and its teacher, or all that routers have."""
    from moe_dist.config import ObjectivesConfig
    from moe_dist.conversion.shrink import plan_shrink, shrink_model
    from moe_dist.training.balance import balance_term, made_choices, sum_choices
    from moe_dist.training.companion import build_companion
    from moe_dist.training.objectives import OBJECTIVES, ObjectiveSettings, pair_states
    from moe_dist.training.step import distill_terms, freeze
    from tests.training.tiny import tiny_batch, tiny_bert

    is_router = objective == "router"
    dense = tiny_bert(dropout=0.0)
    layers: Sequence[int] = range(2)
    if is_router:
        plan, student = None, tiny_student(dense, capacity_factor=1.0)
        own = {"hidden_weight": 1.0}
    else:
        plan = plan_shrink(
            dense, num_layers=1, hidden_size=8, intermediate_size=16, init="truncate"
        )
        layers, student = plan.layers, shrink_model(dense, plan)
        own = {OBJECTIVES[objective].weight_key: 1.0}
    section = ObjectivesConfig(**({"kl_weight": 0, "hidden_weight": 0} | own))
    pairs = pair_states(layers, section.hidden_layers)
    teacher = freeze(dense).to(device)
    companion = build_companion(
        student,
        teacher,
        section,
        num_pairs=len(pairs),
        hidden_ids=plan.hidden_ids if plan else None,
    ).to(device)
    student = student.to(device).train()
    batch = {name: column.to(device) for name, column in tiny_batch().items()}

    def forward() -> Tensor:
        with autocast(precision, device):
            computed = distill_terms(
                student,
                teacher,
                batch,
                objectives=() if is_router else (objective,),
                settings=ObjectiveSettings(pairs=pairs),
                companion=companion,
                load_balancing=is_router,
                z_loss=is_router,
                entropy=is_router,
                with_task=is_router,
            )
        terms = dict(computed.terms)
        if computed.gate_sums:
            choices = sum_choices([made_choices(computed)])
            terms["load_balancing"] = balance_term(computed.gate_sums, choices)
        return torch.stack([term.sum for term in terms.values()]).sum()

    return Prepared(forward, tuple(student.parameters()))


def family_case(family: str, router: str, precision: str, device: torch.device) -> Prepared:
    """A whole student of a family, by its own head's loss."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.conversion.families import half_fault
    from tests.conversion.dense_models import labelled_batch, random_scores, tiny_model

    dense = tiny_model(family)
    if half_fault(dense):
        precision = "fp32"
    plan = plan_partition(random_scores(dense), num_experts=4, expert_size=8, num_shared_neurons=8)
    student = dense_to_moe(dense, plan, router=router, seed=1)
    batch = {name: column.to(device) for name, column in labelled_batch(student).items()}
    student = student.to(device).eval()

    def forward() -> Tensor:
        with autocast(precision, device):
            return student(**batch).loss

    return Prepared(forward, tuple(student.parameters()))


def kind_case(kind: str, precision: str, device: torch.device) -> Prepared:
    """A step of distillation of a kind of task, with its own loss where it has one."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.tasks import TASK_KINDS
    from moe_dist.training.step import distill_terms, freeze
    from tests.conversion.dense_models import random_scores, tiny_model, token_batch

    family, head = MODELS_OF_KINDS[kind]
    changes: dict[str, Any] = {"num_labels": 1} if kind == "regression" else {}
    dense = tiny_model(family, head, **changes)
    names = ("no", "yes") if kind == "classification" else None
    for name, value in TASK_KINDS[kind].model_settings(names).items():
        setattr(dense.config, name, value)
    plan = plan_partition(random_scores(dense), num_experts=4, expert_size=8, num_shared_neurons=8)
    student = dense_to_moe(dense, plan, router="token_gate", seed=1).to(device).train()
    teacher = freeze(dense).to(device)
    host = token_batch()
    ids, mask = host["input_ids"], host["attention_mask"]
    has_target = mask.roll(-1, dims=1) * mask
    has_target[:, -1] = 0
    labels = {
        "regression": torch.tensor([0.5, 1.0, -1.0, 0.0]),
        "question_answering": torch.tensor([[1, 2], [0, 0], [0, 1], [1, 1]]),
    }
    host |= {
        "labels": labels.get(kind, torch.tensor([0, 1, 1, 0])),
        "next_ids": (ids.roll(-1, dims=1) + 1) * has_target,
        "targets": ids.masked_fill(mask == 0, -100),
        "num_targets": has_target.sum(dim=1),
    }
    batch = {name: column.to(device) for name, column in host.items()}

    def forward() -> Tensor:
        with autocast(precision, device):
            computed = distill_terms(
                student, teacher, batch, z_loss=True, with_task=kind != "embedding"
            )
        return torch.stack([term.sum for term in computed.terms.values()]).sum()

    return Prepared(forward, tuple(student.parameters()))


MODELS_OF_KINDS = {
    "classification": ("bert", "ForSequenceClassification"),
    "regression": ("bert", "ForSequenceClassification"),
    "embedding": ("bert", "Model"),
    "causal_lm": ("llama", "ForCausalLM"),
    "question_answering": ("roberta", "ForQuestionAnswering"),
    "seq2seq": ("t5", "ForConditionalGeneration"),
}
