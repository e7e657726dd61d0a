"""score-importance: how much each feed-forward neuron of the teacher matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from ..chain.stage_job import placed_here, run_job
from . import finetune_teacher

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "score-importance"


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Score the teacher's neurons on the training split.

    The job takes seconds, so on this machine's CPUs alone it runs in this process
    (`placed_here`). Returns `scores`: one float32 vector for each feed-forward layer, in a
    safetensors file.
    """
    teacher = inputs.result(finetune_teacher.NAME)
    address = inputs.workspace.files.address

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.jobs.importance import ImportanceJob

        job = ImportanceJob.of(
            config,
            address(stage.directory),
            model=address(teacher.outputs["model"]),
            num_samples=config.moe.importance_samples,
            precision=config.train.precision,
        )
        run_job(job, config=placed_here(config), work=stage, workspace=inputs.workspace)
        return StageOutcome(outputs={"scores": stage.directory / "scores.safetensors"})

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "max_length": config.model.max_length,
            "num_samples": config.moe.importance_samples,
            "precision": config.train.precision,
        },
        input_digests={
            "data": inputs.workspace.rows.train_digest,
            "teacher": teacher.digests["model"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )
