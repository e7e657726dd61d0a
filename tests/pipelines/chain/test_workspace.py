"""What the stages of a chain share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from pipelines.chain.workspace import Workspace
from pipelines.console import Console


def test_the_model_is_fetched_at_its_revision(
    write_recipe: Callable[[dict[str, Any]], Path],
    tiny_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None]] = []

    def resolve(name: str, cache_dir: Path | None = None, revision: str | None = None) -> str:
        asked.append((name, revision))
        return name

    monkeypatch.setattr("moe_dist.data.sources.resolve_model", resolve)
    tiny_settings["model"] |= {"teacher": "some/model", "revision": "v2"}
    workspace = Workspace(load_config(write_recipe(tiny_settings)), Console(quiet=True))
    assert workspace.start_model == "some/model"
    assert workspace.start_model_digest == "hub:some/model@v2"
    assert asked == [("some/model", "v2")]
