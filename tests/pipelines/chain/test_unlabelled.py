"""A classifier that is distilled on rows without labels beside its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from pipelines.chain.chain import run_chain
from tests.pipelines.conftest import WORDS
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


def write_texts(path: Path, count: int, offset: int) -> str:
    with path.open("w", encoding="utf-8") as stream:
        for number in range(offset, offset + count):
            words = [WORDS[(number * step + 2) % len(WORDS)] for step in (2, 9, 4, 13, 6, 17, 3)]
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    return str(path)


def test_they_join_the_distillation_alone(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    data = tiny_settings["data"] | {"unlabelled": write_texts(tmp_path / "more.jsonl", 18, 0)}
    settings = tiny_settings | {"data": data, "distill": {"task_weight": 0}}
    first = Recorder()
    run_chain(load_config(write_recipe(settings)), first)
    root = tmp_path / "outputs/tiny"
    report = json.loads((root / "report.json").read_text())
    summary = report["data"]["summaries"][""]
    number = summary["unlabelled"]["num_samples"]
    assert 8 <= number <= 18
    steps = {name: one["num_steps"] for name, one in report["training"].items()}
    assert steps == {"finetune-teacher": 6, "distill": (48 + number) // 8}

    write_texts(tmp_path / "more.jsonl", 18, 1000)
    again = Recorder()
    run_chain(load_config(write_recipe(settings)), again)
    assert "distill" in again.ran and "evaluate" in again.ran
    assert not {"finetune-teacher", "score-importance", "adapt"} & set(again.ran)


def test_losses_that_read_labels_are_refused(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    data = tiny_settings["data"] | {"unlabelled": "more.jsonl"}
    with pytest.raises(ConfigError, match=r"data\.unlabelled adds rows without labels .*set it to"):
        load_config(write_recipe(tiny_settings | {"data": data}))
