"""Scores, kinds of tokens and fitted outputs in bfloat16 are those of float32 but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, fit_outputs, plan_partition, score_importance
from moe_dist.conversion.token_clusters import token_clusters
from moe_dist.distributed.update import Precision
from moe_dist.jobs.finetune import FinetuneJob
from moe_dist.jobs.fit_outputs import FitOutputsJob
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.jobs.precision import computing_in, own_precision
from moe_dist.training import hardware
from tests.conversion.dense_models import NUM_NEURONS, random_scores, tiny_model, token_batch
from tests.training.tiny_task import adapt, job_fields, train_section

CPU = torch.device("cpu")
FAMILIES = ("bert", "llama", "t5")


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """The share of the better half of neurons that both have."""
    half = NUM_NEURONS // 2
    best = [set(scores.topk(half).indices.tolist()) for scores in (first, second)]
    return len(best[0] & best[1]) / half


def batches_of(model: Any) -> list[dict[str, torch.Tensor]]:
    batches = [token_batch(seed=seed) for seed in range(4)]
    for batch in batches:
        batch["labels"] = (
            batch["input_ids"] if model.config.model_type != "bert" else torch.tensor([0, 1, 0, 1])
        )
    return batches


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_keep_their_order(family: str) -> None:
    model = tiny_model(family)
    batches = batches_of(model)
    exact = score_importance(model, batches)
    with computing_in("bf16", CPU, model):
        found = score_importance(model, batches)
    for expected_F, found_F in zip(exact, found, strict=True):
        assert found_F.dtype == torch.float32
        assert overlap(expected_F, found_F) >= 0.85
        assert not torch.equal(expected_F, found_F)
        assert float(torch.corrcoef(torch.stack([expected_F, found_F]))[0, 1]) > 0.98


def test_kinds_of_tokens_need_the_same_neurons() -> None:
    model = tiny_model("llama")
    batches = [batches_of(model)]
    exact = token_clusters(model, batches, 2, seed=0)
    with computing_in("bf16", CPU, model):
        found = token_clusters(model, batches, 2, seed=0)
    for expected_EF, found_EF in zip(exact.scores, found.scores, strict=True):
        for expected_F, found_F in zip(expected_EF, found_EF, strict=True):
            assert overlap(expected_F, found_F) >= 0.75
            # Only what the model computes is rounded, and no sum.
            assert not torch.equal(found_F, found_F.bfloat16().float())


@pytest.mark.parametrize(("asked", "is_half"), [("fp32", False), ("auto", True), ("bf16", True)])
def test_jobs_and_the_start_of_a_student_take_what_the_recipe_says(
    asked: str, is_half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_is_fast_at_bf16", lambda device: True)
    seen: list[torch.dtype] = []
    fields = job_fields(tmp_path, "teacher", model=str(tmp_path / "bert"))
    teacher = FinetuneJob(**fields, train=train_section(max_steps=1)).run()["model"]

    def look(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.append(output.dtype)

    drawn = {"num_samples": 16, "precision": asked}
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        ImportanceJob(**job_fields(tmp_path, "score-importance", model=teacher, **drawn)).run()
        scored = set(seen)
        models = {"student": adapt(tmp_path, teacher), "teacher": teacher}
        seen.clear()
        FitOutputsJob(**job_fields(tmp_path, "fit", **models, **drawn)).run()
    finally:
        handle.remove()
    for found in (scored, set(seen)):
        assert (torch.bfloat16 in found) == is_half


def test_half_precision_for_gpus_is_not_emulated_by_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("bert")
    for is_fast, expected in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(hardware, "_is_fast_at_bf16", lambda device, fast=is_fast: fast)
        assert own_precision("bf16", CPU, model) == own_precision("auto", CPU, model) == expected
        assert own_precision("fp32", CPU, model) == "fp32"
        assert own_precision("bf16", CPU, tiny_model("deberta")) == "fp32"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_outputs_are_fitted_as_well(family: str) -> None:
    """The same error is left, as near as the answers' own rounding."""
    model = tiny_model(family).eval()
    batches = [token_batch(seed=seed) for seed in range(6)]
    plan = plan_partition(
        random_scores(model),
        num_experts=2,
        expert_size=NUM_NEURONS // 2,
        num_shared_neurons=0,
        method="importance",
    )

    def error(precision: Precision | None) -> float:
        student = dense_to_moe(model, plan, router="hash_random").eval()
        if precision is not None:
            with computing_in(precision, CPU, student):
                fit_outputs(student, model, [batches])
        with torch.no_grad():
            return sum(
                float((student(**one).logits - model(**one).logits).square().mean())
                for one in batches
            )

    unfitted, exact, half = error(None), error("fp32"), error("bf16")
    assert exact < 0.9 * unfitted
    assert abs(half - exact) < 0.05 * (unfitted - exact)
