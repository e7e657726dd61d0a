"""distill: train the student to do what the teacher does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_dist.config.setting_kinds import settings_of_kind

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute, stage_key
from ..chain.stage_job import TRAINING_SCRATCH, run_training
from ..chain.training_settings import training_settings
from . import adapt, finetune_teacher, shrink

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.jobs.distill import DistillJob
    from moe_dist.tracking import TrackedRun

NAME = "distill"


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Distil the teacher into the student; `model` is the trained student's directory.

    Inputs must hold the teacher and the adapted student, and what it was cut from the teacher
    by where it is smaller.
    """
    teacher = inputs.result(finetune_teacher.NAME)
    student = inputs.result(adapt.NAME)

    def work(stage: StageWork) -> StageOutcome:
        return run_training(
            distill_job(config, inputs, inputs.workspace.files.address(stage.directory)),
            config=config,
            work=stage,
            workspace=inputs.workspace,
            title=stage_key(NAME, inputs.label),
        )

    return execute(
        NAME,
        settings={
            **training_settings(config, config.train),
            "distill": settings_of_kind(config.distill),
            **_origin(config, inputs),
        },
        input_digests={
            "data": inputs.workspace.rows.distill_digest,
            "teacher": teacher.digests["model"],
            "student": student.digests["model"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
        scratch=TRAINING_SCRATCH,
    )


def distill_job(config: RunConfig, inputs: StageInputs, stage_dir: str) -> DistillJob:
    """Give the job that trains the student, in a directory for what it writes."""
    from moe_dist.jobs.distill import DistillJob

    address = inputs.workspace.files.address
    return DistillJob.of(
        config,
        stage_dir,
        student=address(inputs.result(adapt.NAME).outputs["model"]),
        teacher=address(inputs.result(finetune_teacher.NAME).outputs["model"]),
        **_origin(config, inputs),
    )


def _origin(config: RunConfig, inputs: StageInputs) -> dict[str, Any]:
    """Give what a smaller student was cut from its teacher by."""
    if not config.student.is_smaller:
        return {}
    details = inputs.result(shrink.NAME).details
    return {key: details[key] for key in ("layers", "hidden_ids")}
