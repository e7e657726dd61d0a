"""score-importance: how much each feed-forward neuron of the teacher matters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..jobs import placed_here, run_job
from ..payloads import data_job
from ..stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import finetune_teacher

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "score-importance"
BATCH_SIZE = 32


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Score the teacher's neurons on the training split.

    The job takes seconds, so on this machine's CPUs alone it runs in this process (`placed_here`).

    Args:
        config: the run's configuration.
        inputs: must hold the teacher.
        tracker: the chain's run.

    Returns:
        `scores`: one float32 vector for each feed-forward layer, in a safetensors file.
    """
    teacher = inputs.result(finetune_teacher.NAME)
    address = inputs.workspace.files.address

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.training.jobs import importance_job

        payload = {
            **data_job(config, address(stage.directory)),
            "model": address(teacher.outputs["model"]),
            "num_samples": config.moe.importance_samples,
            "batch_size": BATCH_SIZE,
        }
        run_job(
            importance_job,
            payload,
            config=placed_here(config),
            work=stage,
            workspace=inputs.workspace,
        )
        return StageOutcome(outputs={"scores": stage.directory / "scores.safetensors"})

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "max_length": config.model.max_length,
            "num_samples": config.moe.importance_samples,
        },
        input_digests={
            "data": inputs.workspace.rows.train_digest,
            "teacher": teacher.digests["model"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )
