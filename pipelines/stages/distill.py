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
    from moe_dist.tracking import TrackedRun

NAME = "distill"


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Distil the teacher into the student; `model` is the trained student's directory.

    Inputs must hold the teacher and the adapted student, and what it was cut from the teacher
    by where it is smaller.
    """
    teacher = inputs.result(finetune_teacher.NAME)
    student = inputs.result(adapt.NAME)
    address = inputs.workspace.files.address
    origin: dict[str, Any] = {}
    if config.student.is_smaller:
        details = inputs.result(shrink.NAME).details
        origin = {key: details[key] for key in ("layers", "hidden_ids")}

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.jobs.distill import DistillJob

        job = DistillJob.of(
            config,
            address(stage.directory),
            student=address(student.outputs["model"]),
            teacher=address(teacher.outputs["model"]),
            **origin,
        )
        return run_training(
            job,
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
            **origin,
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
