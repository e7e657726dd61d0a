"""The discriminator, steps of the loop, and the bodies of jobs."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.devices.prepared import Prepared, tiny_student


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


def step_case(precision: str, device: torch.device) -> Prepared:
    """Two steps of the loop, from batches in host memory to the log's line."""
    from moe_dist.distributed.engine import build_engine
    from moe_dist.losses.total import LossWeight
    from moe_dist.training.loop import LoopSettings, train
    from moe_dist.training.step import distill_terms, freeze
    from tests.training.tiny import tiny_batches, tiny_bert

    dense = tiny_bert(dropout=0.0)
    student = tiny_student(dense, gate_noise=0.1)
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
    from moe_dist.config.moe_section import MoeConfig
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.inference.saving import load_model, load_tokenizer, save_model
    from moe_dist.jobs import expert_scores, fit_outputs, importance, predict
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
        elif name == "expert-scores":
            moe = MoeConfig(
                num_experts=2,
                partition="token_clusters",
                router="token_gate",
                importance_samples=32,
            )
            job = expert_scores.ExpertScoresJob(**fields, model=str(teacher), moe=moe)
        else:
            job = fit_outputs.FitOutputsJob(
                **fields, student=str(student), teacher=str(teacher), **drawn
            )
        job.run()
        return torch.zeros(())

    def on_device() -> Tensor:
        with ExitStack() as stack:
            for module in (predict, importance, expert_scores, fit_outputs):
                stack.enter_context(mock.patch.object(module, "pick_device", return_value=device))
            stack.enter_context(mock.patch.object(hardware, "_is_fast_at_bf16", return_value=True))
            return forward()

    return Prepared(on_device)


def _classifier(directory: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).eval()
