"""Train a student to do what the teacher does."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.conversion.half_blocks import half_blocks
from moe_dist.conversion.hidden_states import stack_depths
from moe_dist.distributed.update import Precision
from moe_dist.inference.backends.native_blocks import UnsuitedError
from moe_dist.inference.backends.teacher import quick_teacher
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.job import TrainJob
from moe_dist.jobs.job_data import AnyJobData
from moe_dist.jobs.precision import model_precision
from moe_dist.jobs.teacher_answers import kept_answers
from moe_dist.jobs.train_job import Report, keep_model, train_model
from moe_dist.losses.total import LossWeight
from moe_dist.training.collectives import gather_values, own_rank
from moe_dist.training.companion import build_companion
from moe_dist.training.dropout import set_dropout
from moe_dist.training.hardware import pick_device
from moe_dist.training.loop import StepWeights
from moe_dist.training.objectives import (
    ObjectiveSettings,
    chosen_objectives,
    objective_weights,
    pair_stacks,
    pair_states,
    reads,
)
from moe_dist.training.step import StepTerms, distill_terms, freeze

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.tasks import Split

logger = logging.getLogger("moe_dist.training")


@dataclass(frozen=True, kw_only=True)
class DistillJob(TrainJob):
    """Distil a teacher, which stays outside the student: frozen, in eval mode, never saved with it.

    Args:
        student: its directory.
        teacher: its directory.
        distill: the losses.
        layers: of a student of another depth, the teacher's layer of each of its own.
        hidden_ids: of a narrower student, the teacher's dimension of each of its own.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher")
    TRAINS_ON: ClassVar[Split] = "distilled"

    student: str
    teacher: str
    distill: ObjectivesConfig
    layers: tuple[int, ...] | None = None
    hidden_ids: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: RunConfig, stage_dir: str, **fields: Any) -> Self:
        """Take over what a recipe says of the student's training."""
        own = {"train": config.train, "distill": config.distill}
        return super().of(config, stage_dir, **(own | fields))

    def run(self) -> dict[str, Any]:
        """Train and save the student; see `train_model`. No epochs: `keep_model`."""
        rows = self.rows()
        student = load_model(Path(self.student))
        data = self.tokenised(rows, load_tokenizer(Path(self.student)))
        if self.train.num_epochs == 0:
            return keep_model(student, data, self)
        # The engine takes this device too, and the two must meet in the losses.
        teacher = freeze(load_model(Path(self.teacher), pick_device(self.parallel.use_gpu)))
        return distill(student, teacher, data, self)


def distill(
    student: Any,
    teacher: nn.Module,
    data: AnyJobData,
    job: DistillJob,
    *,
    report: Report | None = None,
    keep: bool = True,
) -> dict[str, Any]:
    """Train a student that is in memory already.

    Args:
        student: what is trained.
        teacher: frozen, on the device that `pick_device` names.
        data: the task's data.
        job: how; of its models only the student's directory is read, and only where experts are
            spread over ranks.
        report: see `train_model`.
        keep: see `train_model`.

    Returns:
        See `train_model`.
    """
    section = job.distill
    if section.dropout is not None:
        set_dropout(student, section.dropout)
    which, layers = section.hidden_layers, job.layers
    pairs = pair_states(layers, which) if layers else pair_stacks(stack_depths(student), which)
    companion = build_companion(
        student,
        teacher,
        section,
        num_pairs=len(pairs),
        hidden_ids=job.hidden_ids,
        seed=job.seed,
    )
    objectives = chosen_objectives(section)
    settings = ObjectiveSettings(
        temperature=section.temperature, pairs=pairs, pooling=section.alignment_pooling
    )

    device = pick_device(job.parallel.use_gpu)
    precision = model_precision(job.train.precision, device, student)
    answers = kept_answers(
        teacher,
        data,
        split=job.TRAINS_ON,
        objectives=objectives,
        max_gib=section.keep_answers_gib,
        asked=section.keep_answers_gib != ObjectivesConfig.model_fields["keep_answers_gib"].default,
        train=job.train,
        precision=precision,
        device=device,
    )
    if answers is None and objectives:
        teacher = _asked_in(section.teacher_precision, teacher, objectives, precision, device)

    def compute(model: nn.Module, batch: Mapping[str, Tensor]) -> StepTerms:
        return distill_terms(
            model,
            teacher,
            batch,
            objectives=objectives,
            settings=settings,
            companion=companion,
            load_balancing=section.load_balancing_weight > 0,
            z_loss=section.z_loss_weight > 0,
            entropy=section.entropy_weight > 0,
            with_task=section.task_weight > 0,
            answers=answers,
        )

    with half_blocks(teacher):
        return train_model(
            student,
            data,
            compute,
            partial(distill_weights, section),
            job,
            whole_model=job.student,
            companion=companion,
            report=report,
            keep=keep,
        )


def _asked_in(
    wanted: Literal["same", "int8"],
    teacher: nn.Module,
    objectives: Collection[str],
    precision: Precision,
    device: torch.device,
) -> nn.Module:
    """Bring a teacher into the form that all ranks ask it in; collective.

    Where that is not `wanted`, rank 0 says why.
    """
    obstacle = "it is on a GPU" if device.type != "cpu" else ""
    if reads(objectives, "attention"):
        obstacle = "losses read its attention"
    for form in ("int8", "bf16"):
        is_asked = form == wanted
        if not is_asked and form != precision:
            continue
        quick, reason = (None, obstacle) if obstacle else _quick_form(teacher, form)
        reasons = [reason for reason in gather_values(reason) if reason]
        if quick is not None and not reasons:
            return quick
        if own_rank() == 0:
            said = f"the teacher is not asked in {form}, in layers of its own: {reasons[0]}"
            if is_asked:
                said = f"the teacher is asked in {precision}, not in int8: {reasons[0]}"
            logger.log(logging.WARNING if is_asked else logging.INFO, said)
    return teacher


def _quick_form(teacher: nn.Module, precision: str) -> tuple[nn.Module | None, str]:
    """Give the quick form, or why there is none."""
    try:
        return quick_teacher(teacher, precision), ""
    except UnsuitedError as reason:
        return None, str(reason)


def distill_weights(section: ObjectivesConfig, num_steps: int) -> StepWeights:
    """Turn the recipe's weights into one schedule for each term, over so many steps."""
    return {
        "task": LossWeight(section.task_weight),
        **objective_weights(section, num_steps),
        "load_balancing": LossWeight(section.load_balancing_weight),
        "z_loss": LossWeight(section.z_loss_weight),
        "router_entropy": LossWeight(section.entropy_weight),
    }
