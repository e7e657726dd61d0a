"""Commands that do not look at a required speed-up say so before they start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pipelines.cli import app

Write = Callable[[dict[str, Any]], Path]


def test_search_and_compact_say_that_they_do_not_look_at_it(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tiny_settings | {"evaluate": {"require_speedup": 1.5}})
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("search", (str(recipe), "--dry-run")),
        ("compact", (str(tmp_path / "empty"), "--num-experts", "2", "--recipe", str(recipe))),
    ):
        for asked in (True, False):
            more = [] if asked else ["--set", "evaluate.require_speedup=null"]
            output = CliRunner().invoke(app, [name, *words, *more], env={"COLUMNS": "200"}).output
            said = f"{name} does not look at evaluate.require_speedup; compress and evaluate do"
            assert (said in output) == asked, output
