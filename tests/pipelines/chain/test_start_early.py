"""A local Ray is started before the checks, where a stage will train on its workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from moe_dist.config import load_config
from moe_dist.workers.ray_session import RaySession
from pipelines.chain.chain import _start_early, plan_steps
from pipelines.chain.workspace import Workspace
from pipelines.console import Console
from pipelines.stages import adapt, distill

Write = Callable[[dict[str, Any]], Path]


class Connections:
    """A session that counts them."""

    count = 0

    def connect(self, **_: object) -> None:
        self.count += 1


def started(write_recipe: Write, settings: dict[str, Any], *, until: str) -> bool:
    config = load_config(write_recipe(settings))
    session = Connections()
    workspace = Workspace(config, Console(quiet=True))
    _start_early(workspace, plan_steps(config, until), cast(RaySession, session))
    return bool(session.count)


@pytest.mark.parametrize(
    ("changes", "until", "expected"),
    [
        ({}, adapt.NAME, True),
        ({"finetune": {"num_epochs": 0}}, adapt.NAME, False),
        ({"finetune": {"num_epochs": 0}}, distill.NAME, True),
        ({"finetune": {"num_epochs": 0}, "parallel": {"launcher": "ray"}}, adapt.NAME, True),
        ({"parallel": {"num_workers": 1}}, adapt.NAME, False),
        ({"parallel": {"launcher": "local"}}, distill.NAME, False),
    ],
)
def test_ray_starts_where_a_stage_trains_on_it(
    changes: dict[str, Any],
    until: str,
    expected: bool,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    tiny_settings["parallel"] = {"num_workers": 2}
    settings = tiny_settings | changes
    assert started(write_recipe, settings, until=until) is expected


def test_not_where_a_cluster_is_named(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    tiny_settings["parallel"] = {"num_workers": 2}
    assert not started(write_recipe, tiny_settings, until=distill.NAME)
