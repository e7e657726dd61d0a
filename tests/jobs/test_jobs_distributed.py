"""The jobs on two gloo processes with experts spread over them equal the jobs on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.errors import NonFiniteLossError
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs import distill
from moe_dist.jobs.distill import DistillJob
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.jobs.predict import PredictJob
from moe_dist.jobs.results import load_scores
from moe_dist.losses.total import LossTerm
from moe_dist.metric_log import MetricLog
from moe_dist.training.step import StepTerms
from tests.training.tiny_task import adapt, job_fields, on_cpu, train_section, write_teacher

pytestmark = pytest.mark.distributed
EP2 = on_cpu(ep_size=2, zero_stage=1)


def score_distil_resume_predict(
    rank: int,
    world_size: int,
    scoring: ImportanceJob,
    job: DistillJob,
    predict: PredictJob,
    spoilt: DistillJob,
) -> None:
    """Score; stop the distillation after half of its steps and go on; predict; go wrong."""
    scoring.run()
    first, second = half_of(job).run(), job.run()
    assert first["num_steps"] == second["resumed_from"] == 3
    answer = replace(predict, model=second["model"]).run()
    assert answer["metrics"] == second["metrics"]
    if rank == 1:
        distill.distill_terms = _with_nan(distill.distill_terms)  # type: ignore[assignment]
    with pytest.raises(NonFiniteLossError) as caught:
        spoilt.run()
    told = {
        "metrics": second["metrics"],
        "logits": answer["predictions"][""].tolist(),
        "error": str(caught.value),
    }
    Path(job.stage_dir, f"rank{rank}.json").write_text(json.dumps(told))


def half_of(job: DistillJob) -> DistillJob:
    """The same distillation, stopped after half of its steps."""
    return replace(job, train=job.train.model_copy(update={"max_steps": 3}))


def _with_nan(compute: Any) -> Any:
    def computed(*args: Any, **options: Any) -> Any:
        terms = compute(*args, **options)
        broken = LossTerm(terms.terms["hidden_mse"].sum * float("nan"), "tokens")
        return StepTerms(terms.terms | {"hidden_mse": broken})

    return computed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same jobs on one process and on two; one start of two processes serves all tests."""
    root = tmp_path_factory.mktemp("two")
    teacher = write_teacher(root)
    scoring = {"model": teacher, "num_samples": 37, "batch_size": 8}
    ImportanceJob(**job_fields(root, "score-importance", **scoring)).run()
    student = adapt(root, teacher)
    distilling = {
        "train": train_section(
            num_epochs=1, accumulation=2, log_every=2, checkpoint_every=2, lr_schedule="constant"
        ),
        "distill": ObjectivesConfig(temperature=2.0),
        "teacher": teacher,
        "student": student,
    }
    alone = DistillJob(**job_fields(root, "alone", **distilling)).run()
    spawn_gloo(
        score_distil_resume_predict,
        2,
        ImportanceJob(**job_fields(root, "score-two", **scoring)),
        DistillJob(**job_fields(root, "together", **distilling, parallel=EP2)),
        PredictJob(**job_fields(root, "together", model="")),
        DistillJob(**job_fields(root, "spoilt", **distilling, parallel=EP2)),
    )
    return {"root": root, "student": student, "alone": alone}


def test_scores_are_summed_over_ranks(runs: dict[str, Any]) -> None:
    one = load_scores(runs["root"] / "score-importance" / "scores.safetensors")
    two = load_scores(runs["root"] / "score-two" / "scores.safetensors")
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_two_ranks_with_spread_experts_train_as_one_does(runs: dict[str, Any]) -> None:
    reference = load_model(runs["alone"]["model"]).state_dict()
    trained = load_model(runs["root"] / "together" / "model").state_dict()
    start = load_model(runs["student"]).state_dict()
    assert set(trained) == set(reference)
    moved = 0.0
    for name, value in reference.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)
        moved = max(moved, float((value - start[name]).abs().max()))
    assert moved > 1e-2, "training changed nothing"


def test_ranks_agree_and_log_once(runs: dict[str, Any]) -> None:
    root = runs["root"]
    told = [json.loads((root / "together" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    alone, together = (
        {
            record.step: record.metrics["train/loss/total"]
            for record in MetricLog(root / stage / "metrics.jsonl").read()
            if "train/loss/total" in record.metrics
        }
        for stage in ("alone", "together")
    )
    # The half run ended at 3 and logged there; the whole one went on from its checkpoint.
    assert list(alone) == [2, 4, 6] and list(together) == [2, 3, 4, 6]
    assert together[6] == pytest.approx(alone[6], rel=1e-3)


def test_a_spoilt_loss_on_one_rank_stops_all_and_is_located(runs: dict[str, Any]) -> None:
    together = runs["root"] / "together"
    for rank in (0, 1):
        error = json.loads((together / f"rank{rank}.json").read_text())["error"]
        assert "step 1: a loss is not finite; rank 1, samples [" in error
        assert "hidden_mse=nan" in error and "rank 0" not in error


EVERY_LOSS = ObjectivesConfig(
    soft_weight=1.0,
    attention_weight=0.1,
    alignment_weight=1.0,
    alignment_pooling="mean",
    mapping_weight=1.0,
    adversarial_weight=0.1,
    adversarial_warmup_fraction=0.0,
    temperature=2.0,
)


def distil_half_then_all(rank: int, world_size: int, job: DistillJob) -> None:
    """Stop after half of the steps, and go on from the checkpoint."""
    half_of(job).run()
    result = job.run()
    assert result["resumed_from"] == 3
    assert result["train"]["train/adversarial/active"] == 1.0


@pytest.mark.slow
def test_every_loss_resumes_at_another_size_with_its_discriminator(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    """A small student of experts: one process, two with spread experts, and from two to one."""
    from moe_dist.conversion import dense_to_moe, plan_partition
    from moe_dist.conversion.shrink import plan_shrink, shrink_model
    from moe_dist.inference.saving import load_tokenizer

    root = runs["root"]
    teacher = load_model(root / "teacher")
    shrunk = plan_shrink(
        teacher, num_layers=1, hidden_size=12, intermediate_size=20, init="truncate"
    )
    small = shrink_model(teacher, shrunk)
    split = plan_partition(
        [torch.arange(20.0)], num_experts=2, expert_size=12, num_shared_neurons=4
    )
    student = save_model(
        dense_to_moe(small, split, router="token_gate"),
        tmp_path / "student",
        tokenizer=load_tokenizer(root / "teacher"),
    )
    distilling = {
        "train": train_section(
            num_epochs=1,
            accumulation=2,
            log_every=2,
            checkpoint_every=3,
            lr_schedule="constant",
            learning_rate=1e-3,
        ),
        "distill": EVERY_LOSS,
        "teacher": str(root / "teacher"),
        "student": str(student),
        "layers": tuple(shrunk.layers),
        "hidden_ids": tuple(shrunk.hidden_ids),
    }
    alone = DistillJob(**job_fields(root, "losses-alone", **distilling)).run()
    together = DistillJob(**job_fields(root, "losses-together", **distilling, parallel=EP2))
    spawn_gloo(distil_half_then_all, 2, together)
    reference = load_model(alone["model"]).state_dict()
    trained = load_model(root / "losses-together" / "model").state_dict()
    assert set(trained) == set(reference)
    for name, value in reference.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)

    from safetensors.torch import load_file

    states = [
        load_file(root / stage / "checkpoints" / "step-00000006" / "model.safetensors")
        for stage in ("losses-alone", "losses-together")
    ]
    own = [name for name in states[0] if name.startswith("distillation_companion.")]
    assert any("adversary.exp_avg_w_in" in name for name in own)
    assert any("maps.projections" in name for name in own)
    for name in own:
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-3, atol=2e-4, msg=name)
    # Its last three steps once more, on one process, from what two had written.
    for later in (root / "losses-together" / "checkpoints").glob("step-00000006"):
        later.rename(tmp_path / "later")
    one = replace(together, parallel=on_cpu()).run()
    assert one["resumed_from"] == 3
    for name, value in load_model(one["model"]).state_dict().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-3, atol=2e-4, msg=name)
