"""adapt: split feed-forward layers into experts, guided by the scores.

They are the teacher's, or those of the smaller student that the stage shrink made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import finetune_teacher, score_importance, shrink

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.conversion import PartitionPlan
    from moe_dist.tracking import TrackedRun

NAME = "adapt"
NEEDS = (finetune_teacher.NAME, score_importance.NAME)


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Convert the teacher, or what was cut from it, into a student that has not been trained yet.

    A smaller student that is to stay dense with all its neurons stays a plain model of its
    architecture, which needs nothing of this project.

    Args:
        config: the run's configuration, or a comparison's.
        inputs: must hold the teacher and the scores, and the smaller student where there is one.
        tracker: the chain's run.

    Returns:
        `model` (the student's directory) and `plan` (which neurons went where).
    """
    is_smaller = config.student.is_smaller
    source = inputs.result(shrink.NAME if is_smaller else finetune_teacher.NAME)
    scores = inputs.result(shrink.NAME if is_smaller else score_importance.NAME)

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.conversion import dense_to_moe, plan_partition
        from moe_dist.inference import load_model, save_model
        from moe_dist.inference.saving import load_tokenizer
        from moe_dist.training.results import load_scores

        from ..plots import plot_importance

        moe = config.moe
        fetch = inputs.workspace.files.fetch
        importance = load_scores(fetch(scores.outputs["scores"]))
        model = load_model(fetch(source.outputs["model"]))
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
        if is_smaller and keeps_all_neurons(plan):
            student = model
        else:
            student = dense_to_moe(
                model,
                plan,
                router=moe.router,
                top_k=moe.top_k,
                seed=config.seed,
                gate_scale=moe.gate_scale,
            )
        plan.save(stage.directory / "plan.json")
        save_model(
            student,
            stage.directory / "model",
            tokenizer=load_tokenizer(source.outputs["model"]),
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
            "teacher": source.digests["model"],
            "scores": scores.digests["scores"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )


def keeps_all_neurons(plan: PartitionPlan) -> bool:
    """Tell whether a plan leaves a dense model as it is.

    Args:
        plan: of the split.

    Returns:
        Whether there is one expert, with every neuron.
    """
    return plan.num_experts == 1 and all(
        part.num_neurons == plan.expert_size for part in plan.partitions
    )


def _unread_keys(config: RunConfig) -> set[str]:
    """Name the settings that do not touch the student, so that changing them re-runs nothing."""
    unread = {"importance_samples"}
    if config.moe.num_experts == 1:
        # Nobody routes or shares in the pruned dense student.
        unread |= {"router", "combine", "gate_scale", "top_k", "num_shared_neurons", "tie_shared"}
    return unread
