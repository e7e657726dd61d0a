"""The jobs of a chain on one process: a real run from sentences to a distilled student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from moe_dist.config.moe_section import MoeConfig
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.data.metrics import LabelSpace, compute_metrics
from moe_dist.errors import CheckpointError
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs import train_job
from moe_dist.jobs.distill import DistillJob, distill_weights
from moe_dist.jobs.expert_scores import ExpertScores, ExpertScoresJob, score_experts
from moe_dist.jobs.finetune import FinetuneJob
from moe_dist.jobs.fit_outputs import FitOutputsJob, draw_tasks
from moe_dist.jobs.importance import ImportanceJob
from moe_dist.jobs.predict import PredictJob
from moe_dist.jobs.results import load_predictions, load_scores
from moe_dist.jobs.train_job import MAX_LOGGED_EXPERTS, load_metrics
from moe_dist.metric_log import MetricLog, series
from tests.training.tiny_task import adapt, job_fields, train_section

DISTILL = ObjectivesConfig(
    task_weight=1.0,
    hidden_weight=1.0,
    kl_weight=1.0,
    load_balancing_weight=0.01,
    z_loss_weight=0.001,
    entropy_weight=0.001,
    temperature=2.0,
    warmup_fraction=0.2,
)


KINDS = MoeConfig(
    num_experts=3,
    expert_size=24,
    num_shared_neurons=0,
    partition="token_clusters",
    router="token_gate",
    importance_samples=40,
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All jobs one after the other, as the stages call them."""
    root = tmp_path_factory.mktemp("chain")
    fields = job_fields(root, "finetune-teacher", model=str(root / "bert"), train=train_section())
    teacher = FinetuneJob(**fields).run()
    drawn = {"num_samples": 50, "batch_size": 16}
    fields = job_fields(root, "score-importance", model=teacher["model"], **drawn)
    scored = ImportanceJob(**fields).run()
    adapted = adapt(root, teacher["model"])
    models = {"student": adapted, "teacher": teacher["model"]}
    fitted = FitOutputsJob(**job_fields(root, "fitted", **models, **drawn)).run()
    files = {p.name: p.read_bytes() for p in Path(teacher["model"]).iterdir()}
    train = train_section(gradient_checkpointing=True, accumulation=2, num_epochs=8)
    fields = job_fields(root, "distill", **models, train=train, distill=DISTILL)
    student = DistillJob(**fields).run()
    assert files == {p.name: p.read_bytes() for p in Path(teacher["model"]).iterdir()}
    return {
        "root": root,
        "teacher": teacher,
        "scored": scored,
        "adapted": adapted,
        "fitted": fitted,
        "student": student,
    }


def test_the_teacher_learns_and_is_saved(chain: dict[str, Any]) -> None:
    teacher = chain["teacher"]
    assert teacher["metrics"]["accuracy"] > 0.9
    assert teacher["num_steps"] == 72 and teacher["resumed_from"] is None
    model = load_model(teacher["model"])
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert (Path(teacher["model"]) / "tokenizer.json").exists()


def test_each_job_counts_its_own_memory_of_a_gpu(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may do several, one after the other."""
    begun: list[torch.device] = []
    monkeypatch.setattr(train_job, "begin_peak_device_memory", begun.append)
    for num_epochs in (0, 1):
        train = train_section(num_epochs=num_epochs)
        models = {"model": chain["teacher"]["model"], "train": train}
        FinetuneJob(**job_fields(chain["root"], f"again-{num_epochs}", **models)).run()
    assert [device.type for device in begun] == ["cpu", "cpu"]


def test_a_model_is_taken_as_it_is_without_epochs(chain: dict[str, Any]) -> None:
    trained = chain["teacher"]
    settings = train_section().model_copy(update={"num_epochs": 0})
    fields = job_fields(chain["root"], "kept", model=trained["model"], train=settings)
    kept = FinetuneJob(**fields).run()
    assert kept["num_steps"] == 0 and kept["metrics"] == trained["metrics"]
    before, after = load_model(trained["model"]), load_model(kept["model"])
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_student_is_handed_back_as_it_was_adapted_without_epochs(chain: dict[str, Any]) -> None:
    models = {"student": chain["adapted"], "teacher": chain["teacher"]["model"]}
    settings = train_section().model_copy(update={"num_epochs": 0})
    fields = job_fields(chain["root"], "kept-student", **models, train=settings, distill=DISTILL)
    kept = DistillJob(**fields).run()
    answered = PredictJob(**job_fields(chain["root"], "kept-answers", model=chain["adapted"])).run()
    assert kept["num_steps"] == 0 and kept["metrics"] == answered["metrics"]
    before, after = load_model(chain["adapted"]), load_model(kept["model"])
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_log_has_losses_speed_and_the_dev_metric(chain: dict[str, Any]) -> None:
    records = MetricLog(chain["root"] / "distill" / "metrics.jsonl").read()
    steps, losses = series(records, "train/loss/hidden_mse")
    assert steps == [10, 20, 30, 40, 48]
    assert losses[-1] < losses[0]
    names = {name for record in records for name in record.metrics}
    for name in (
        "task",
        "prediction_kl",
        "hidden_mse",
        "load_balancing",
        "z_loss",
        "router_entropy",
    ):
        assert f"train/loss/{name}" in names
    assert {"perf/tokens_per_s", "train/grad_norm", "train/learning_rate"} <= names
    for figure in ("load_imbalance", "entropy"):
        assert sum(name.startswith(f"moe/{figure}/") for name in names) == 2
    assert series(records, "dev/accuracy")[0] == [48]


def test_a_student_trained_in_bf16_is_measured_as_the_report_measures_it(
    chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = chain["root"]
    seen: set[tuple[bool, bool]] = set()
    whole = BertForSequenceClassification.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", watched)
    train = train_section(precision="bf16", max_steps=3)
    fields = job_fields(root, "bf16", model=str(root / "bert"), train=train)
    trained = FinetuneJob(**fields).run()
    assert seen == {(True, True), (False, False)}
    answered = PredictJob(**job_fields(root, "bf16-answers", model=trained["model"])).run()
    assert trained["metrics"] == answered["metrics"]


def test_many_experts_do_not_flood_the_log() -> None:
    many = [1 / (MAX_LOGGED_EXPERTS + 1)] * (MAX_LOGGED_EXPERTS + 1)
    assert load_metrics({"0": [0.25, 0.75], "1": many}) == {
        "moe/expert_load/0/0": 0.25,
        "moe/expert_load/0/1": 0.75,
    }


def test_scores_are_those_of_the_library(chain: dict[str, Any]) -> None:
    scores = load_scores(Path(chain["scored"]["scores"]))
    assert [tuple(score.shape) for score in scores] == [(32,), (32,)]
    assert all(bool((score > 0).all()) for score in scores)
    assert chain["scored"]["num_samples"] == 50


def test_a_fitted_student_is_nearer_before_it_is_trained(chain: dict[str, Any]) -> None:
    def states(model: str) -> torch.Tensor:
        with torch.no_grad():
            found = load_model(model)(input_ids=rows, output_hidden_states=True).hidden_states
        return torch.stack(found[1:])

    rows = torch.randint(5, 25, (64, 9), generator=torch.Generator().manual_seed(0))
    wanted = states(chain["teacher"]["model"])
    before, after = (
        (states(model) - wanted).square().mean()
        for model in (chain["adapted"], chain["fitted"]["model"])
    )
    assert after < 0.8 * before


def test_the_student_learns_and_predicts_alike_from_its_directory(chain: dict[str, Any]) -> None:
    root, student = chain["root"], chain["student"]
    assert student["metrics"]["accuracy"] > 0.9
    fields = job_fields(root, "evaluate", model=student["model"], batch_size=7)
    answer = PredictJob(**fields, split="dev", output_name="student").run()
    assert answer["metrics"] == student["metrics"]
    assert answer["predictions"][""].shape == (33, 2)
    for layer, shares in answer["expert_load"].items():
        assert sum(shares) == pytest.approx(1.0)
        assert shares == pytest.approx(student["expert_load"][layer])
    saved = load_predictions(root / "evaluate" / "student.npz")
    assert np.array_equal(saved.logits, answer["predictions"][""])
    assert np.array_equal(saved.sample_ids, np.arange(33))
    found = compute_metrics(["accuracy"], saved.predictions, saved.labels, LabelSpace(2))
    assert found == answer["metrics"]
    assert answer["metric_titles"] == {"accuracy": "accuracy"}


def test_results_are_plain_json(chain: dict[str, Any]) -> None:
    for stage in ("teacher", "student"):
        result = chain[stage]
        directory = Path(result["model"]).parent
        assert json.loads((directory / "result.json").read_text()) == result
        assert result["seconds"] > 0 and result["peak_memory_gib"] > 0


def test_a_finished_job_gives_the_same_again(chain: dict[str, Any]) -> None:
    root, teacher = chain["root"], chain["teacher"]
    before = (root / "finetune-teacher" / "metrics.jsonl").read_bytes()
    weights = {n: v.clone() for n, v in load_model(teacher["model"]).state_dict().items()}
    fields = job_fields(root, "finetune-teacher", model=str(root / "bert"), train=train_section())
    again = FinetuneJob(**fields).run()
    assert again["resumed_from"] == 72
    assert again["metrics"] == teacher["metrics"]
    state = load_model(again["model"]).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    records = [r.metrics for r in MetricLog(root / "finetune-teacher" / "metrics.jsonl").read()]
    assert len(records) == len(before.splitlines())


def test_regression_runs_through_all_jobs(tmp_path: Path) -> None:
    def fields(stage: str, **more: Any) -> dict[str, Any]:
        return job_fields(tmp_path, stage, regression=True, **more)

    train = train_section()
    start = fields("finetune-teacher", model=str(tmp_path / "bert"), train=train)
    teacher = FinetuneJob(**start).run()["model"]
    ImportanceJob(**fields("score-importance", model=teacher)).run()
    adapted = adapt(tmp_path, teacher, router="hash_random")
    models = {"student": adapted, "teacher": teacher}
    student = DistillJob(
        **fields("distill", **models, train=train, distill=ObjectivesConfig())
    ).run()
    assert set(student["metrics"]) == {"pearson", "spearman"}
    assert student["metrics"]["pearson"] > 0.5
    assert "train/loss/prediction_mse" in student["train"]
    answer = PredictJob(**fields("evaluate", model=student["model"])).run()
    assert answer["metrics"]["pearson"] == pytest.approx(student["metrics"]["pearson"], abs=1e-6)


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_a_copy_of_the_teacher_has_no_loss_without_dropout(
    chain: dict[str, Any], tmp_path: Path, dropout: float | None
) -> None:
    teacher = chain["teacher"]["model"]
    losses = ObjectivesConfig(task_weight=0.0, hidden_weight=1.0, kl_weight=1.0, dropout=dropout)
    models = {"student": teacher, "teacher": teacher}
    fields = job_fields(tmp_path, "distill", **models, train=train_section(max_steps=1))
    copy = DistillJob(**fields, distill=losses).run()
    missed = copy["train"]["train/loss/hidden_mse"]
    assert missed > 0.01 if dropout is None else missed < 1e-9
    config = (Path(copy["model"]) / "config.json").read_text()
    assert '"hidden_dropout_prob": 0.1' in config


def test_distill_weights_follow_the_recipe() -> None:
    weights = distill_weights(DISTILL, 100)
    assert [weights["hidden_mse"].at(step) for step in (0, 9, 19, 50)] == [0.05, 0.5, 1.0, 1.0]
    assert weights["task"].at(0) == 1.0
    assert weights["load_balancing"].at(99) == 0.01
    assert weights["prediction_mse"] == weights["prediction_kl"]


def test_experts_are_scored_as_in_this_process(chain: dict[str, Any]) -> None:
    teacher = chain["teacher"]["model"]
    job = ExpertScoresJob(**job_fields(chain["root"], "adapt-kinds", model=teacher, moe=KINDS))
    found = ExpertScores.load(Path(job.run()["expert_scores"]))
    model = load_model(teacher)
    rows = list(job.tokenised(job.rows(), load_tokenizer(teacher)).parts.values())
    drawn = draw_tasks(
        [rows[0].train], num_samples=40, seed=job.seed, pad_token_id=rows[0].pad_token_id
    )
    expected = score_experts(KINDS, model, drawn, "auto", seed=job.seed)
    assert found.gates is not None and expected.gates is not None
    assert [tuple(one.shape) for one in found.scores] == [(3, 32)] * len(found.gates)
    for own, other in zip(
        (*found.scores, *found.gates), (*expected.scores, *expected.gates), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_scores_of_experts_without_gates_and_damaged_ones(tmp_path: Path) -> None:
    path = tmp_path / "expert_scores.safetensors"
    # More layers than sort by their first digit.
    scores = tuple(torch.full((2, 3), float(index)) for index in range(11))
    ExpertScores(scores).save(path)
    found = ExpertScores.load(path)
    assert found.gates is None
    assert [float(one[0, 0]) for one in found.scores] == list(range(11))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read") as fault:
        ExpertScores.load(path)
    assert fault.value.remedy == "delete the stage's directory and run adapt again"
