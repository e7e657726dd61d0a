"""A teacher fine-tuned on pairs by two gloo processes equals that of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_dist.config.data_section import DataConfig
from moe_dist.distributed.launch import spawn_gloo
from moe_dist.inference.saving import load_model
from moe_dist.jobs.finetune import FinetuneJob
from moe_dist.metric_log import METRIC_LOG, MetricLog, series
from tests.training.tiny_task import GOOD, PLAIN, job_fields, on_cpu, train_section, write_bert

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def job(root: Path, stage: str) -> FinetuneJob:
    """Four steps of two micro-batches, whose pairs the workers share unevenly."""
    data = DataConfig(
        source="files",
        kind="embedding",
        train=str(root / "train.jsonl"),
        dev=str(root / "dev.jsonl"),
        text_columns=("question", "passage"),
        pair_columns=("question", "passage"),
    )
    train = train_section(
        num_epochs=2, batch_size=10, accumulation=2, lr_schedule="constant", log_every=1
    )
    fields = job_fields(root, stage, parallel=on_cpu()) | {"data": data}
    return FinetuneJob(model=str(root / "plain"), train=train, **fields)


def run_on_rank(rank: int, world_size: int, own: FinetuneJob) -> None:
    own.run()


def test_two_workers_learn_what_one_learns(tmp_path: Path) -> None:
    write_bert(tmp_path / "plain", dropout=0.0)
    for name, count in (("train", 20), ("dev", 5)):
        rows = [
            {
                "question": f"{PLAIN[row % 12]} {PLAIN[(5 * row + 1) % 12]}",
                "passage": f"{GOOD[row % 4]} {PLAIN[row % 12]} {PLAIN[(7 * row) % 12]}",
            }
            for row in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = job(tmp_path, "alone").run()
    spawn_gloo(run_on_rank, 2, job(tmp_path, "together"))
    (steps, losses), together = (
        series(MetricLog(tmp_path / stage / METRIC_LOG).read(), "train/loss/task")
        for stage in ("alone", "together")
    )
    assert steps == [1, 2, 3, 4] and losses[-1] < losses[0]
    assert together[1] == pytest.approx(losses, rel=1e-3)
    trained = load_model(tmp_path / "together/model").state_dict()
    start = load_model(alone["model"]).state_dict()
    for name, value in start.items():
        if not name.endswith("key.bias"):  # No output depends on it.
            torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=2e-4, msg=name)
