"""Texts on two gloo processes with experts spread over them equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.config.data_section import DataConfig
from moe_dist.config.objectives import ObjectivesConfig
from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.saving import load_model, save_model
from moe_dist.jobs.distill import DistillJob
from moe_dist.jobs.results import PREDICTIONS, load_predictions
from tests.conversion.dense_models import random_scores
from tests.tasks.tiny_seq2seq import tiny_tokenizer, tiny_writer, write_titles
from tests.training.tiny_task import on_cpu, train_section

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def write_models(root: Path) -> tuple[str, str]:
    """A teacher whose texts are of many lengths, and a student of four experts."""
    teacher, tokenizer = tiny_writer("bart"), tiny_tokenizer("bart")
    with torch.no_grad():
        teacher.final_logits_bias[0, teacher.config.eos_token_id] = 2.0
    plan = plan_partition(
        random_scores(teacher), num_experts=4, expert_size=10, num_shared_neurons=4
    )
    student = dense_to_moe(teacher, plan, router="token_gate")
    places = (root / name for name in ("teacher", "student"))
    saved = [
        save_model(model, place, tokenizer=tokenizer)
        for model, place in zip((teacher, student), places, strict=True)
    ]
    return str(saved[0]), str(saved[1])


def distil(root: Path, stage: str, models: tuple[str, str], **more: Any) -> DistillJob:
    """Two steps, with the dev rows measured after each."""
    data = DataConfig(
        source="files",
        kind="seq2seq",
        train=str(root / "train.jsonl"),
        dev=str(root / "dev.jsonl"),
        text_columns=("text",),
        label_column="title",
        max_target_length=12,
        num_beams=3,
    )
    return DistillJob(
        data=data,
        max_length=12,
        cache_dir=str(root / "cache"),
        stage_dir=str(root / stage),
        seed=5,
        teacher=models[0],
        student=models[1],
        train=train_section(
            num_epochs=1,
            max_steps=2,
            batch_size=8,
            learning_rate=1e-3,
            accumulation=2,
            eval_every=1,
            eval_batch_size=2,
            lr_schedule="constant",
        ),
        distill=ObjectivesConfig(load_balancing_weight=0.1, z_loss_weight=0.1),
        keep_predictions=True,
        **({"parallel": on_cpu()} | more),
    )


def run_on_rank(rank: int, world_size: int, job: DistillJob) -> None:
    job.run()


def test_spread_experts_write_what_one_process_writes(tmp_path: Path) -> None:
    write_titles(tmp_path / "train.jsonl", 24)
    # An odd number: the last batch of one rank repeats a row.
    write_titles(tmp_path / "dev.jsonl", 9, offset=1000)
    models = write_models(tmp_path)
    alone = distil(tmp_path, "alone", models).run()
    spread = on_cpu(ep_size=2, zero_stage=1)
    spawn_gloo(run_on_rank, 2, distil(tmp_path, "together", models, parallel=spread))
    one, two = (load_predictions(tmp_path / stage / PREDICTIONS) for stage in ("alone", "together"))
    assert one.texts is not None and two.texts is not None
    lengths = {len(text.split()) for text in one.texts}
    assert len(lengths) > 2, "otherwise no rank would wait for another"
    assert one.texts.tolist() == two.texts.tolist()
    np.testing.assert_allclose(one.logits, two.logits)
    reference = load_model(alone["model"]).state_dict()
    trained = load_model(tmp_path / "together" / "model").state_dict()
    for name, value in reference.items():
        if name.endswith("k_proj.bias"):
            # No output depends on it: its gradient is rounding, which Adam scales up.
            continue
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)
