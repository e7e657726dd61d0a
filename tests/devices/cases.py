"""What runs on an accelerator: every router, objective, family and kind of task, and whole jobs.

A case makes its parts on the CPU and brings them to a device; what it returns is run there once,
and if its answer has a graph, differentiated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from moe_dist.moe import Experts, MergedLayer, MoELayer, RoutingContext, build_router, use_context
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.routing import record_routing
from moe_dist.router_spec import RouterSpec, router_facts

D_MODEL, EXPERT_SIZE, NUM_EXPERTS, VOCAB_SIZE, NUM_TASKS = 16, 16, 4, 50, 2
PRECISIONS = ("fp32", "bf16")
OLDER = " on an older device"
"""Ends the name of a case whose accelerator has no kernel for groups."""


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
    router: str,
    precision: str,
    device: torch.device,
    *,
    expert_size: int = EXPERT_SIZE,
    **options: Any,
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
    found["layer token_gate, top 2, bf16" + OLDER] = partial(layer_case, "token_gate", "bf16")
    return found


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
        plan, student = None, _student(dense, capacity_factor=1.0)
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


def _student(dense: Any, **options: Any) -> Any:
    """Split a tiny BERT into experts whose widths the kernels of accelerators take."""
    from moe_dist.conversion import dense_to_moe, plan_partition

    plan = plan_partition(
        [torch.arange(32.0)] * 2,
        num_experts=NUM_EXPERTS,
        expert_size=8,
        num_shared_neurons=0,
    )
    return dense_to_moe(dense, plan, router="token_gate", **options)


def adversary_case(regularizer: str, device: torch.device) -> Prepared:
    """The student's loss and its gradient, and then the discriminator's own step."""
    from moe_dist.training.adversary import Adversary

    adversary = Adversary(6, regularizer=regularizer, learning_rate=1e-2, seed=3).to(device)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 6, generator=generator).to(device)
    student = student.clone().requires_grad_()

    def forward() -> Tensor:
        adversary.student_loss(student, teacher).backward()
        loss = adversary.update(8)["adversarial/discriminator_loss"]
        return torch.tensor([loss, *student.grad.sum(dim=0).tolist()])

    return Prepared(forward)


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

    family, head = _MODELS[kind]
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


_MODELS = {
    "classification": ("bert", "ForSequenceClassification"),
    "regression": ("bert", "ForSequenceClassification"),
    "embedding": ("bert", "Model"),
    "causal_lm": ("llama", "ForCausalLM"),
    "question_answering": ("roberta", "ForQuestionAnswering"),
    "seq2seq": ("t5", "ForConditionalGeneration"),
}


def step_case(precision: str, device: torch.device) -> Prepared:
    """Two steps of the loop, from batches in host memory to the log's line."""
    from moe_dist.distributed.engine import build_engine
    from moe_dist.losses.total import LossWeight
    from moe_dist.training.loop import LoopSettings, train
    from moe_dist.training.step import distill_terms, freeze
    from tests.training.tiny import tiny_batches, tiny_bert

    dense = tiny_bert(dropout=0.0)
    student = _student(dense, gate_noise=0.1)
    teacher = freeze(dense).to(device)
    names = ("task", "prediction_kl", "hidden_mse", "load_balancing", "z_loss")

    engine = build_engine(
        student,
        learning_rate=1e-3,
        weight_decay=0.01,
        num_steps=2,
        precision=precision,
        device=device,
    )

    def forward() -> Tensor:
        losses: list[float] = []
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
    from moe_dist.training import hardware
    from tests.training.tiny_task import job_fields

    scratch = tempfile.TemporaryDirectory(prefix="moe-dist-device-")
    root = Path(scratch.name)
    fields = job_fields(root, name)
    teacher = root / "teacher"
    dense = _classifier(root / "bert")
    save_model(dense, teacher, tokenizer=load_tokenizer(root / "bert"))
    plan = plan_partition(
        [torch.arange(32.0)] * 2, num_experts=4, expert_size=8, num_shared_neurons=0
    )
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
        with ExitStack() as stack:
            for module in (predict, importance, fit_outputs):
                stack.enter_context(mock.patch.object(module, "pick_device", return_value=device))
            stack.enter_context(mock.patch.object(hardware, "_is_fast_at_bf16", return_value=True))
            return forward()

    return Prepared(on_device)


def _classifier(directory: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()


class _Faulty(nn.Module):
    """A layer with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """Multiply, and do the wrong thing beside it."""
        out_TD = hidden_TD * self.weight
        ids_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
        if self.fault == "tensor of the host":
            out_TD = out_TD + torch.ones(4)
        elif self.fault == "value":
            out_TD = out_TD * (1.0 if float(out_TD.sum()) > 0 else -1.0)
        elif self.fault == "list":
            out_TD = out_TD * len(ids_T.tolist())
        elif self.fault == "bincount":
            out_TD = out_TD * torch.bincount(ids_T, minlength=4)
        elif self.fault == "mask":
            out_TD = out_TD[ids_T == 0]
        elif self.fault == "index of the host":
            out_TD = out_TD[torch.zeros(3, dtype=torch.int64)]
        elif self.fault == "copy":
            out_TD = out_TD * torch.ones(4).to(out_TD.device)
        elif self.fault == "repeats":
            out_TD = out_TD.repeat_interleave(ids_T + 2, dim=0)
        elif self.fault == "backward":
            out_TD.register_hook(lambda gradient: gradient * float(gradient.sum() != 0))
        elif self.fault == "other values":
            out_TD = out_TD + (hidden_TD.device.type != "cpu")
        return out_TD


def _faulty_case(fault: str, device: torch.device) -> Prepared:
    layer = _Faulty(fault).to(device)
    hidden = torch.arange(12.0).view(3, 4).to(device)
    return Prepared(lambda: layer(hidden).sum(), (layer.weight,))


FAULTS: dict[str, tuple[int, int]] = {
    "none": (0, 0),
    "value": (1, 0),
    "list": (1, 0),
    "bincount": (1, 0),
    "mask": (1, 1),
    "index of the host": (1, 1),
    "copy": (1, 0),
    "repeats": (1, 0),
    "backward": (0, 1),
}
"""Deliberately wrong layers, and the waits that must be found in forward and backward."""
LOUD_FAULTS = {"tensor of the host": "WrongDeviceError", "other values": "is off by"}
"""Others, and what must be said of them."""


def faulty_cases() -> dict[str, Case]:
    """Name the cases that prove that a fault is found."""
    return {f"fault: {name}": partial(_faulty_case, name) for name in (*FAULTS, *LOUD_FAULTS)}


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
        for kind in _MODELS:
            found[f"kind of task {kind}, {precision}"] = partial(kind_case, kind, precision)
        found[f"two steps, {precision}"] = partial(step_case, precision)
    for regularizer in ("spectral", "r1"):
        found[f"adversary {regularizer}"] = partial(adversary_case, regularizer)
    for name, precision in (("predict", ", bf16"), ("score-importance", ""), ("fit-outputs", "")):
        found[f"job {name}{precision}"] = partial(job_case, name)
    return found
