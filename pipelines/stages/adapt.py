"""adapt: split feed-forward layers into experts, guided by the scores.

They are the teacher's, or those of the smaller student that the stage shrink made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moe_dist.config.setting_kinds import settings_of_kind
from moe_dist.router_spec import RouterSpec

from ..chain.stage import StageInputs, StageOutcome, StageResult, StageWork, execute
from ..chain.stage_job import placed_here, run_job
from . import finetune_teacher, score_importance, shrink

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.conversion import PartitionPlan
    from moe_dist.data.loaders import Encoded
    from moe_dist.jobs.expert_scores import ExpertScores
    from moe_dist.tracking import TrackedRun

NAME = "adapt"
UNFITTED = "unfitted"
"""Where the student waits for its outputs to be fitted, inside the stage's directory."""


def run(config: RunConfig, inputs: StageInputs, tracker: TrackedRun) -> StageResult:
    """Convert the teacher, or what was cut from it, into a student that has not been trained yet.

    A smaller student that is to stay dense with all its neurons stays a plain model of its
    architecture, which needs nothing of this project. Inputs must hold the teacher and the
    scores, and the smaller student where there is one. Returns `model` (the student's
    directory) and `plan` (which neurons went where).
    """
    is_smaller = config.student.is_smaller
    source = inputs.result(shrink.NAME if is_smaller else finetune_teacher.NAME)
    address = inputs.workspace.files.address
    scores = inputs.result(shrink.NAME if is_smaller else score_importance.NAME)

    def work(stage: StageWork) -> StageOutcome:
        from moe_dist.inference import load_model, save_model
        from moe_dist.inference.saving import load_tokenizer
        from moe_dist.jobs.expert_scores import EXPERT_SCORES, ExpertScores, ExpertScoresJob
        from moe_dist.jobs.fit_outputs import FitOutputsJob
        from moe_dist.jobs.results import load_scores

        from ..report.plots import plot_importance

        fetch = inputs.workspace.files.fetch
        importance = load_scores(fetch(scores.outputs["scores"]))
        expert_scores = None
        if _scores_experts(config):
            job = ExpertScoresJob.of(
                config,
                address(stage.directory),
                model=address(source.outputs["model"]),
                moe=config.moe,
                precision=config.train.precision,
            )
            on = placed_here(config)
            run_job(job, config=on, work=stage, workspace=inputs.workspace, alone=True)
            expert_scores = ExpertScores.load(fetch(stage.directory / EXPERT_SCORES))
        model = load_model(fetch(source.outputs["model"]))
        tokenizer = load_tokenizer(source.outputs["model"])
        plan, student = convert(
            config,
            model,
            importance,
            lambda: inputs.workspace.encoded_tasks("train", tokenizer),
            expert_scores,
        )
        plan.save(stage.directory / "plan.json")
        is_fitted = fits_output(config) and student is not model
        made = stage.directory / (UNFITTED if is_fitted else "model")
        save_model(student, made, tokenizer=tokenizer)
        if is_fitted:
            inputs.workspace.files.publish(made)
            run_job(
                FitOutputsJob.of(
                    config,
                    address(stage.directory),
                    student=address(made),
                    teacher=address(source.outputs["model"]),
                    num_samples=config.moe.importance_samples,
                    precision=config.train.precision,
                ),
                config=placed_here(config),
                work=stage,
                workspace=inputs.workspace,
                alone=True,
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

    input_digests = {"teacher": source.digests["model"], "scores": scores.digests["scores"]}
    if reads_rows(config):
        input_digests["data"] = inputs.workspace.rows.train_digest
    return execute(
        NAME,
        settings=adapt_settings(config),
        input_digests=input_digests,
        inputs=inputs,
        tracker=tracker,
        work=work,
        scratch=(UNFITTED,),
    )


def convert(
    config: RunConfig,
    dense: Any,
    importance: Sequence[Any],
    rows: Callable[[], Mapping[str, Encoded]] | None = None,
    expert_scores: ExpertScores | None = None,
) -> tuple[Any, Any]:
    """Split a dense model into experts, whose outputs are not fitted yet.

    Args:
        config: the configuration of one student.
        dense: the model; it is left as it was.
        importance: (F,) scores for each feed-forward layer.
        rows: gives the tokenised training rows of each task by its name; asked only where
            partition or router look at them.
        expert_scores: where the partition needs some and they are there; else they are found here.

    Returns:
        The plan, and the student; the model itself where a small student keeps all its neurons.

    Raises:
        MissingInputError: if the training rows are needed, and there are none.
    """
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.jobs.expert_scores import score_experts
    from moe_dist.jobs.fit_outputs import draw_tasks

    moe = config.moe
    splits_by_data = _splits_by_data(config) and expert_scores is None
    looks = splits_by_data or _counts_tokens(config)
    parts = list(rows().values()) if rows is not None and looks else None
    batches, token_counts = None, None
    if parts is not None and splits_by_data:
        scored = draw_tasks(
            parts,
            num_samples=moe.importance_samples,
            seed=config.seed,
            pad_token_id=int(dense.config.pad_token_id or 0),
        )
        if _scores_experts(config):
            precision = config.train.precision
            expert_scores = score_experts(moe, dense, scored, precision, seed=config.seed)
        else:
            assert len(scored) == 1, "such partitions are refused for several tasks"
            (batches,) = scored
    if parts is not None and _counts_tokens(config):
        token_counts = sum(_token_counts(encoded, dense) for encoded in parts)
    plan = plan_partition(
        importance,
        num_experts=moe.num_experts,
        expert_size=moe.expert_size,
        num_shared_neurons=moe.num_shared_neurons,
        method=moe.partition,
        tie_shared=moe.tie_shared,
        layers=moe.layers,
        seed=config.seed,
        model=dense,
        batches=batches,
        expert_scores=None if expert_scores is None else expert_scores.scores,
    )
    if config.student.is_smaller and keeps_all_neurons(plan):
        return plan, dense
    student = dense_to_moe(
        dense,
        plan,
        seed=config.seed,
        token_counts=token_counts,
        # What tells kinds of tokens apart says nothing to a gate that reads a task or a sequence.
        gates=None if moe.merges or expert_scores is None else expert_scores.gates,
        **router_options(config),
    )
    return plan, student


def fits_output(config: RunConfig) -> bool:
    """Tell whether output weights are fitted; a dense student with all neurons has none to fit."""
    moe, student = config.moe, config.student
    keeps_all = moe.num_experts == 1 and moe.expert_size == student.intermediate_size
    return moe.fits_output and not (student.is_smaller and keeps_all)


def reads_rows(config: RunConfig) -> bool:
    """Tell whether partition, router or the fit of output weights look at training rows."""
    return _splits_by_data(config) or _counts_tokens(config) or fits_output(config)


def router_options(config: RunConfig) -> dict[str, Any]:
    """Return what `dense_to_moe` takes from the recipe beside the plan."""
    spec = config.moe.router_spec
    num_tasks = len(config.data.tasks) if config.data.tasks else 1
    return {
        "router": spec,
        "num_tasks": num_tasks if spec.facts.chooses_by == "task" else None,
    }


def adapt_settings(config: RunConfig) -> dict[str, Any]:
    """Return the part of a recipe that the untrained student depends on."""
    unread = _unread_keys(config)
    moe = {key: value for key, value in settings_of_kind(config.moe).items() if key not in unread}
    # What "auto" comes to, so that saying it changes nothing.
    moe["fit_output"] = fits_output(config)
    if "combine" in moe:
        moe["combine"] = "merge" if config.moe.merges else "dispatch"
    settings: dict[str, Any] = {"seed": config.seed, "moe": moe}
    if reads_rows(config):
        settings["max_length"] = config.model.max_length
    if fits_output(config) or _scores_experts(config):
        settings["precision"] = config.train.precision
    return settings


def keeps_all_neurons(plan: PartitionPlan) -> bool:
    """Tell whether a plan leaves a dense model as it is: one expert, with every neuron."""
    return plan.num_experts == 1 and all(
        part.num_neurons == plan.expert_size for part in plan.partitions
    )


def _unread_keys(config: RunConfig) -> set[str]:
    """Name the settings that do not touch the student, so that changing them re-runs nothing."""
    looks_at_rows = _splits_by_data(config) or fits_output(config)
    unread = set() if looks_at_rows else {"importance_samples"}
    if config.moe.num_experts == 1:
        # Nobody routes or shares in the pruned dense student.
        unread |= {"combine", "num_shared_neurons", "tie_shared"}
        unread |= {one.name for one in fields(RouterSpec)}
    elif not config.moe.merges:
        unread |= {"merge_gates", "segment_length"}
    return unread


def _splits_by_data(config: RunConfig) -> bool:
    from moe_dist.conversion import PARTITIONS

    return config.moe.num_experts > 1 and PARTITIONS[config.moe.partition].reads_rows


def _scores_experts(config: RunConfig) -> bool:
    from moe_dist.conversion import PARTITIONS

    return config.moe.num_experts > 1 and PARTITIONS[config.moe.partition].needs_expert_scores


def _counts_tokens(config: RunConfig) -> bool:
    return config.moe.num_experts > 1 and config.moe.router_spec.facts.reads_token_counts


def _token_counts(encoded: Encoded, dense: Any) -> Any:
    """How often each token id occurs in the training rows."""
    import torch

    return torch.from_numpy(encoded.token_counts(dense.config.get_text_config().vocab_size))
