"""adapt: split the teacher's feed-forward layers into experts, guided by the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import finetune_teacher, score_importance

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "adapt"
NEEDS = (finetune_teacher.NAME, score_importance.NAME)


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Convert the teacher into a student that has not been trained yet.

    Args:
        config: the run's configuration, or a comparison's.
        inputs: must hold the teacher and the scores.
        tracker: the chain's run.

    Returns:
        `model` (the student's directory) and `plan` (which neurons went where).
    """
    teacher = inputs.result(finetune_teacher.NAME)
    scores = inputs.result(score_importance.NAME)

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.inference import load_model, save_model
        from moe_dist.inference.saving import load_tokenizer
        from moe_dist.training.results import load_scores

        from ..plots import plot_importance

        fetch = inputs.workspace.files.fetch
        importance = load_scores(fetch(scores.outputs["scores"]))
        model = load_model(fetch(teacher.outputs["model"]))
        plan, student = convert(config, model, importance)
        plan.save(stage.directory / "plan.json")
        save_model(
            student,
            stage.directory / "model",
            tokenizer=load_tokenizer(teacher.outputs["model"]),
        )
        picture = plot_importance(
            [importance[part.layer] for part in plan.partitions],
            stage.directory / "importance.png",
            num_kept=len(plan.partitions[0].kept_ids),
            num_shared=plan.num_shared_neurons,
            layer_names=[str(layer) for layer in plan.layers],
        )
        return StageOutcome(
            outputs={
                "model": stage.directory / "model",
                "plan": stage.directory / "plan.json",
            },
            plots=(picture,),
        )

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "moe": config.moe.model_dump(mode="json", exclude=_unread_keys(config)),
        },
        input_digests={
            "teacher": teacher.digests["model"],
            "scores": scores.digests["scores"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )


def convert(config: RunConfig, teacher: Any, importance: Sequence[Any]) -> tuple[Any, Any]:
    """Split a teacher into experts.

    Args:
        config: the configuration of one student.
        teacher: the dense model; it is left as it was.
        importance: (F,) scores for each feed-forward layer.

    Returns:
        The plan, and the student.
    """
    from moe_dist.conversion import dense_to_moe, plan_partition

    moe = config.moe
    plan = plan_partition(
        importance,
        num_experts=moe.num_experts,
        expert_size=moe.expert_size,
        num_shared_neurons=moe.num_shared_neurons,
        method=moe.partition,
        tie_shared=moe.tie_shared,
        layers=moe.layers,
        seed=config.seed,
    )
    student = dense_to_moe(
        teacher,
        plan,
        router=moe.router,
        top_k=moe.top_k,
        seed=config.seed,
        gate_scale=moe.gate_scale,
    )
    return plan, student


def _unread_keys(config: RunConfig) -> set[str]:
    """Name the settings that do not touch the student, so that changing them re-runs nothing."""
    unread = {"importance_samples"}
    if config.moe.num_experts == 1:
        # Nobody routes or shares in the pruned dense student.
        unread |= {"router", "combine", "gate_scale", "top_k", "num_shared_neurons", "tie_shared"}
    return unread
