"""finetune-teacher: train the dense model on the task, or take it as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from ..chain.stage_job import TRAINING_SCRATCH, run_training
from ..chain.training_settings import training_settings

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "finetune-teacher"


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Fine-tune the teacher; needs no earlier stage, and `model` is the teacher's directory."""
    workspace = inputs.workspace
    train = config.teacher_train

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.jobs.finetune import FinetuneJob

        job = FinetuneJob.of(
            config,
            workspace.files.address(stage.directory),
            model=workspace.start_model_address,
            revision=config.model.revision,
            train=train,
            # A dense model has no experts to spread.
            parallel=config.parallel.model_copy(update={"ep_size": 1}),
        )
        return run_training(job, config=config, work=stage, workspace=workspace, title=NAME)

    return execute(
        NAME,
        settings=training_settings(config, train, has_experts=False),
        input_digests={
            "data": workspace.rows.train_digest,
            "start_model": workspace.start_model_digest,
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
        scratch=TRAINING_SCRATCH,
    )
