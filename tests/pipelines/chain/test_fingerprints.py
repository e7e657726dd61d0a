"""Digests follow contents and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from pipelines.chain.fingerprints import path_digest, stage_fingerprint, value_digest
from pipelines.chain.training_settings import training_settings


def test_the_order_of_keys_does_not_matter_but_every_value_does() -> None:
    assert value_digest({"a": 1, "b": 2}) == value_digest({"b": 2, "a": 1})
    base = stage_fingerprint("distill", settings={"a": 1}, inputs={"x": "1"})
    assert base != stage_fingerprint("distill", settings={"a": 2}, inputs={"x": "1"})
    assert base != stage_fingerprint("distill", settings={"a": 1}, inputs={"x": "2"})
    assert base != stage_fingerprint("adapt", settings={"a": 1}, inputs={"x": "1"})


def test_a_directory_is_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = path_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = path_digest(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({before, renamed, path_digest(tmp_path)}) == 3


def test_a_model_with_a_file_cut_short_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345678")
    files = {"weights": {"sha256": "0" * 64, "bytes": 8}}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    assert path_digest(tmp_path)
    (tmp_path / "weights").write_bytes(b"1234")
    with pytest.raises(FileNotFoundError, match="weights"):
        path_digest(tmp_path)


@pytest.mark.parametrize(
    ("override", "teacher_changes", "student_changes"),
    [
        ("train.eval_batch_size=7", False, False),
        ("train.eval_every=7", False, False),
        ("train.expert_learning_rate_scale=0.5", False, True),
        ("train.weight_decay=0.25", True, True),
    ],
)
def test_a_fingerprint_covers_what_is_learned_and_not_how_it_is_watched(
    write_recipe: Callable[[dict[str, Any]], Path],
    tiny_settings: dict[str, Any],
    override: str,
    teacher_changes: bool,
    student_changes: bool,
) -> None:
    recipe = write_recipe(tiny_settings)

    def settings(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
        config = load_config(recipe, list(overrides))
        return (
            training_settings(config, config.teacher_train, has_experts=False),
            training_settings(config, config.train),
        )

    (teacher, student), (other_teacher, other_student) = settings(), settings(override)
    assert (teacher != other_teacher) is teacher_changes
    assert (student != other_student) is student_changes
