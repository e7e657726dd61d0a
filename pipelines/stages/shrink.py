"""shrink: start a shallower or narrower student from chosen parts of the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_dist.config.setting_kinds import settings_of_kind

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from . import finetune_teacher, score_importance

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.tracking import TrackedRun

NAME = "shrink"


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Cut the teacher, by its scores, to the recipe's `student` sizes.

    Returns `model` (a plain dense model) and `scores` (those of the neurons it kept), with the
    teacher's `layers` and `hidden_ids` that it started from in `details`.
    """
    teacher = inputs.result(finetune_teacher.NAME)
    scores = inputs.result(score_importance.NAME)

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.conversion.shrink import plan_shrink, shrink_model, shrink_scores
        from moe_dist.inference import load_model, save_model
        from moe_dist.inference.saving import load_tokenizer
        from moe_dist.jobs.results import SCORES, load_scores, save_scores

        fetch = inputs.workspace.files.fetch
        importance = load_scores(fetch(scores.outputs["scores"]))
        model = load_model(fetch(teacher.outputs["model"]))
        plan = plan_shrink(model, **config.student.model_dump(), scores=importance)
        save_model(
            shrink_model(model, plan, seed=config.seed),
            stage.directory / "model",
            tokenizer=load_tokenizer(teacher.outputs["model"]),
        )
        save_scores(shrink_scores(importance, plan), stage.directory / SCORES)
        return StageOutcome(
            outputs={"model": stage.directory / "model", "scores": stage.directory / SCORES},
            details={"layers": list(plan.layers), "hidden_ids": list(plan.hidden_ids)},
        )

    return execute(
        NAME,
        settings={
            "seed": config.seed,
            "student": settings_of_kind(config.student),
        },
        input_digests={
            "teacher": teacher.digests["model"],
            "scores": scores.digests["scores"],
        },
        inputs=inputs,
        tracker=tracker,
        work=work,
    )
