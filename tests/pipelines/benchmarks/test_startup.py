"""The startup benchmark starts the real command and says where the time goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.errors import MoeDistError
from pipelines.benchmarks.startup import LAST_EVENT, Startup, StartupBenchmark, run, to_table


def test_the_table_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    parts = (("Ray", 3.0), (LAST_EVENT, 1.5))
    Console(width=100).print(to_table([Startup(parts, 4.5), Startup(parts, 4.5)]))
    printed = capsys.readouterr().out
    for word in ("Ray", "3.0", LAST_EVENT, "4.5", "start 2"):
        assert word in printed


def test_a_command_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("name: broken\nmodle: {}\n")
    with pytest.raises(MoeDistError, match="modle"):
        run(StartupBenchmark(recipe=recipe, num_repeats=1))
