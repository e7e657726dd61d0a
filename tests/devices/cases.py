"""What runs on an accelerator: every router, objective, family and kind of task, and whole jobs.

A case makes its parts on the CPU and brings them to a device; what it returns is run there once,
and if its answer has a graph, differentiated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from moe_dist.moe import Experts, MergedLayer, MoELayer, RoutingContext, build_router, use_context
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.routing import record_routing, use_samples
from moe_dist.router_spec import RouterSpec, router_facts

D_MODEL, EXPERT_SIZE, NUM_EXPERTS, VOCAB_SIZE, NUM_TASKS = 16, 16, 4, 50, 2
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Prepared:
    """A case on a device.

    Args:
        forward: gives a scalar.
        leaves: whose gradients are compared, if the scalar has some.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()


Case = Callable[[torch.device], Prepared]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What an engine computes in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def layer_case(
    router: str, precision: str, device: torch.device, *, expert_size: int = EXPERT_SIZE, **options: Any
) -> Prepared:
    """One layer in training, over padded sentences, with shared neurons and noise."""
    torch.manual_seed(0)
    merges = router_facts(router).merges
    spec = RouterSpec.of(
        router, **({} if merges else {"gate_noise": 0.1}), **({"top_k": 2} | options)
    )
    gate = build_router(
        spec,
        d_model=D_MODEL,
        num_experts=NUM_EXPERTS,
        vocab_size=VOCAB_SIZE,
        token_counts=torch.ones(VOCAB_SIZE),
        num_tasks=NUM_TASKS,
        seed=3,
    )
    experts = Experts(NUM_EXPERTS, D_MODEL, expert_size, activation="gelu")
    shared = Experts(1, D_MODEL, 8, activation="gelu", bias_out=False)
    if merges:
        layer: MoELayer = MergedLayer(experts, gate, shared=shared, name="layer")
    else:
        layer = MoELayer(experts, gate, shared=shared, name="layer", capacity=Capacity.of(spec))
    layer = layer.to(device).train()
    hidden = torch.randn(3, 8, D_MODEL).to(device).requires_grad_()
    ids = torch.randint(VOCAB_SIZE, (3, 8)).to(device)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).to(device)
    context = RoutingContext(
        ids,
        mask,
        # As the loop hands them over.
        task_ids=torch.tensor([1]).expand(3),
        sample_ids=torch.tensor([11, 12, 13]),
        noise_seed=5,
    )

    def forward() -> Tensor:
        with use_context(context), record_routing(), autocast(precision, device):
            out = layer(hidden)
        return out.float().square().mean()

    return Prepared(forward, (hidden, *layer.parameters()))


def _layer_cases() -> dict[str, Case]:
    from moe_dist.moe.routers import ROUTERS

    found: dict[str, Case] = {}
    for precision in PRECISIONS:
        for router in ROUTERS:
            for top_k in (1, 2):
                found[f"layer {router}, top {top_k}, {precision}"] = partial(
                    layer_case, router, precision, top_k=top_k
                )
        for policy in ("position", "probability"):
            found[f"layer token_gate, capacity by {policy}, {precision}"] = partial(
                layer_case, "token_gate", precision, capacity_factor=0.75, drop_policy=policy
            )
        found[f"layer token_gate, jitter, {precision}"] = partial(
            layer_case, "token_gate", precision, gate_jitter=0.1
        )
        found[f"layer token_gate, no neurons, {precision}"] = partial(
            layer_case, "token_gate", precision, expert_size=0
        )
    return found


def objective_case(objective: str, precision: str, device: torch.device) -> Prepared:
    """One loss of a small student and its teacher, or all that routers have."""
    from moe_dist.config import ObjectivesConfig
    from moe_dist.conversion.shrink import plan_shrink, shrink_model
    from moe_dist.training.balance import balance_term, made_choices, sum_choices
    from moe_dist.training.companion import build_companion
    from moe_dist.training.objectives import OBJECTIVES, ObjectiveSettings, pair_states
    from moe_dist.training.step import distill_terms, expert_counts, freeze, routing_sums
    from tests.training.tiny import tiny_batch, tiny_bert, tiny_student

    is_router = objective == "router"
    dense = tiny_bert(dropout=0.0)
    if is_router:
        plan, layers, student = None, range(2), tiny_student(dense, capacity_factor=1.0)
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


def adversary_case(regularizer: str, device: torch.device) -> Prepared:
    """The discriminator's own step, after the student's loss."""
    from moe_dist.training.adversary import Adversary

    adversary = Adversary(6, regularizer=regularizer, learning_rate=1e-2, seed=3).to(device)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 6, generator=generator).to(device)
    student = student.clone().requires_grad_()

    def forward() -> Tensor:
        loss = adversary.student_loss(student, teacher)
        adversary.update(8)
        return loss

    return Prepared(forward, (student,))


def family_case(family: str, router: str, precision: str, device: torch.device) -> Prepared:
    """A whole student of a family, by its own head's loss."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from tests.conversion.dense_models import labelled_batch, random_scores, tiny_model

    dense = tiny_model(family)
    plan = plan_partition(
        random_scores(dense), num_experts=4, expert_size=8, num_shared_neurons=8
    )
    student = dense_to_moe(dense, plan, router=router, seed=1)
    batch = {name: column.to(device) for name, column in labelled_batch(student).items()}
    student = student.to(device).eval()

    def forward() -> Tensor:
        with autocast(precision, device):
            return student(**batch).loss

    return Prepared(forward, tuple(student.parameters()))


def step_case(precision: str, device: torch.device) -> Prepared:
    """Two steps of the loop, from batches in host memory to the log's line."""
    from moe_dist.distributed.engine import build_engine
    from moe_dist.losses.total import LossWeight
    from moe_dist.training.loop import LoopSettings, train
    from moe_dist.training.step import distill_terms, freeze
    from tests.training.tiny import tiny_batches, tiny_bert, tiny_student

    dense = tiny_bert(dropout=0.0)
    student = tiny_student(dense, gate_noise=0.1)
    teacher = freeze(dense).to(device)
    names = ("task", "prediction_kl", "hidden_mse", "load_balancing", "z_loss")

    def forward() -> Tensor:
        engine = build_engine(
            student,
            learning_rate=1e-3,
            weight_decay=0.01,
            num_steps=2,
            precision=precision,
            device=device,
        )
        losses = []
        train(
            engine,
            tiny_batches(),
            lambda model, batch: distill_terms(
                model, teacher, batch, load_balancing=True, z_loss=True
            ),
            {name: LossWeight(1.0) for name in names},
            settings=LoopSettings(num_steps=2, log_every=2),
            report=lambda step, metrics: losses.append(metrics["train/loss/hidden_mse"]),
        )
        return torch.tensor(losses[-1])

    return Prepared(forward)


def job_case(name: str, device: torch.device) -> Prepared:
    """The body of a job, from a directory to its figures."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.inference.saving import load_model, load_tokenizer, save_model
    from moe_dist.jobs import fit_outputs, importance, predict
    from tests.training.tiny_task import job_fields

    scratch = tempfile.TemporaryDirectory(prefix="moe-dist-device-")
    root = Path(scratch.name)
    fields = job_fields(root, name)
    teacher = root / "teacher"
    dense = _classifier(root / "bert")
    save_model(dense, teacher, tokenizer=load_tokenizer(root / "bert"))
    plan = plan_partition([torch.arange(32.0)] * 2, num_experts=4, expert_size=8)
    student = root / "student"
    save_model(
        dense_to_moe(load_model(teacher), plan, router="token_gate"),
        student,
        tokenizer=load_tokenizer(teacher),
    )
    drawn = {"num_samples": 32, "batch_size": 16}

    def forward() -> Tensor:
        # The directory lasts as long as this function.
        assert scratch.name
        if name == "predict":
            job: Any = predict.PredictJob(**fields, model=str(student))
            return torch.tensor(float(next(iter(job.run()["predictions"].values())).sum()))
        if name == "score-importance":
            job = importance.ImportanceJob(**fields, model=str(teacher), **drawn)
        else:
            job = fit_outputs.FitOutputsJob(
                **fields, student=str(student), teacher=str(teacher), **drawn
            )
        job.run()
        return torch.zeros(())

    def on_device() -> Tensor:
        where = (predict, importance, fit_outputs)
        with mock.patch.multiple(where[0], pick_device=lambda _: device):
            with mock.patch.multiple(where[1], pick_device=lambda _: device):
                with mock.patch.multiple(where[2], pick_device=lambda _: device):
                    return forward()

    return Prepared(on_device)


def _classifier(directory: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()


def all_cases() -> dict[str, Case]:
    """Name every case."""
    from moe_dist.training.objectives import OBJECTIVES
    from tests.conversion.dense_models import EVERY_FAMILY

    found = _layer_cases()
    for precision in PRECISIONS:
        for objective in (*OBJECTIVES, "router"):
            found[f"objective {objective}, {precision}"] = partial(
                objective_case, objective, precision
            )
        for family in EVERY_FAMILY:
            found[f"family {family}, {precision}"] = partial(
                family_case, family, "token_gate", precision
            )
        found[f"two steps, {precision}"] = partial(step_case, precision)
    for regularizer in ("spectral", "r1"):
        found[f"adversary {regularizer}"] = partial(adversary_case, regularizer)
    for name in ("predict", "score-importance", "fit-outputs"):
        found[f"job {name}"] = partial(job_case, name)
    return found
