"""Trials of two workers: each starts Ray Train inside Ray Tune, and gives its worker slots back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from pipelines.search.sweep import search_recipe
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe  # noqa: F401
from tests.pipelines.recorder import Recorder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_trials_of_two_workers_follow_each_other(
    write_recipe: Callable[[dict[str, Any]], Path],  # noqa: F811
    tiny_settings: dict[str, Any],  # noqa: F811
) -> None:
    pytest.importorskip("ray")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    tiny_settings["parallel"] = {"num_workers": 2}
    tiny_settings["train"] |= {"num_epochs": 2}
    # A learning rate of nothing: the second trial cannot be better than the first at any rung.
    space = {"train.learning_rate": {"choice": [1e-2, 1e-12]}}
    tiny_settings["search"] = {
        "num_trials": 2,
        "space": space,
        "algorithm": "grid",
        "scheduler": "asha",
        "rungs": 2,
        "baseline": False,
    }
    config = load_config(write_recipe(tiny_settings))
    result = search_recipe(config, Recorder(), lambda result, run: None)
    assert result.num_concurrent == 1
    first, second = result.trials.values()
    assert first.status == "finished" and [report.rung for report in first.reports] == [1, 3]
    assert second.status in ("finished", "stopped"), second.message
    assert not list(result.directory.glob("trials/*/student"))
