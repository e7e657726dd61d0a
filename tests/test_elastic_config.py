"""`parallel.num_workers` as a number or a pair: what is accepted, and the faults of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError


def load(folder: Path, **parallel: Any) -> RunConfig:
    path = folder / "recipe.yaml"
    content = {
        "name": "tiny",
        "model": {"teacher": "some/encoder"},
        "data": {"source": "hub", "name": "nyu-mll/glue", "subset": "rte"},
        "train": {"batch_size": 4},
        "parallel": {"launcher": "ray", **parallel},
    }
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def fault(folder: Path, **parallel: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **parallel)
    (line,) = caught.value.faults
    return line


def bounds(config: RunConfig) -> tuple[int, int]:
    return config.parallel.min_workers, config.parallel.max_workers


def test_a_number_and_a_pair(tmp_path: Path) -> None:
    assert bounds(load(tmp_path, num_workers=3)) == (3, 3)
    assert bounds(load(tmp_path, num_workers=[2, 4])) == (2, 4)
    assert load(tmp_path, num_workers=[2, 4]).parallel.num_workers == (2, 4)
    assert load(tmp_path, num_workers=[2, 2]).parallel.num_workers == 2
    assert load(tmp_path, num_workers=[2]).parallel.num_workers == 2


def test_a_pair_survives_being_written(tmp_path: Path) -> None:
    config = load(tmp_path, num_workers=[2, 4])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert config.flatten()["parallel.num_workers"] == "[2, 4]"
    assert load_config(again, ["parallel.num_workers=[1, 2]"]).parallel.num_workers == (1, 2)


@pytest.mark.parametrize(
    ("num_workers", "words"),
    [
        (0, "asks for 0 workers; give at least 1"),
        ([0, 2], "asks for 0 workers; give at least 1"),
        ([4, 2], "has its least above its most; give [2, 4]"),
        ([1, 2, 3], "not a pair of whole numbers"),
        ([], "not a pair of whole numbers"),
        ([1, 2.5], "not a pair of whole numbers"),
        (1.5, "neither a number nor a pair"),
        (True, "neither a number nor a pair"),
        ("many", "neither a number nor a pair"),
    ],
)
def test_what_is_neither(tmp_path: Path, num_workers: Any, words: str) -> None:
    line = fault(tmp_path, num_workers=num_workers)
    assert line.startswith("parallel.num_workers") and words in line


def test_ep_size_divides_some_number_between(tmp_path: Path) -> None:
    assert load(tmp_path, num_workers=[2, 3], ep_size=2).parallel.ep_size == 2
    line = fault(tmp_path, num_workers=[2, 3], ep_size=4)
    assert line == (
        "parallel.num_workers=[2, 3] holds no number that is divisible by parallel.ep_size=4; "
        "raise its most to 4, or use ep_size 1, 2 or 3."
    )


def test_the_larger_number_gets_its_samples(tmp_path: Path) -> None:
    assert "with parallel.num_workers=8" in fault(tmp_path, num_workers=[2, 8])


def test_local_is_one_worker(tmp_path: Path) -> None:
    line = fault(tmp_path, num_workers=[1, 2], launcher="local")
    assert "not parallel.num_workers=[1, 2]; use 1 worker" in line
