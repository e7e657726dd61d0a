"""A small recipe, and what loading it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConfigError

RECIPE = """\
name: tiny
model:
  teacher: some/encoder
data:
  source: hub
  name: nyu-mll/glue
  subset: rte
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write(folder), overrides)


def faults(folder: Path, *overrides: str, text: str = RECIPE) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return caught.value.faults


def only_fault(folder: Path, *overrides: str, text: str = RECIPE) -> str:
    found = faults(folder, *overrides, text=text)
    assert len(found) == 1, found
    return found[0]
