"""The command from its options to its end, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_dist.serving.settings import ServingSettings
from pipelines.cli import app
from pipelines.console import Console
from pipelines.serving import run as run_module
from pipelines.serving.run import Serving, run


def test_sighup_reads_the_settings_of_the_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deployed: list[ServingSettings | None] = []
    lengths = iter([7, 9, 0])

    class Session:
        variables = ending = ""

        def __init__(self, settings: ServingSettings, *_: Any) -> None:
            self._settings = settings

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def deploy(self, settings: ServingSettings | None = None) -> dict[str, Any]:
            deployed.append(settings or self._settings)
            return {"reason": "served; it did not say more", "version": "abc"}

    @contextmanager
    def stopped() -> Iterator[Callable[[], bool]]:
        signals = iter([True, True, False])
        yield lambda: next(signals)

    monkeypatch.setattr(run_module, "ServingSession", Session)
    monkeypatch.setattr(run_module, "until_stopped", stopped)
    monkeypatch.setattr(
        run_module, "recipe_settings", lambda *_: ({"max_length": next(lengths)}, "the recipe")
    )
    run(Serving(str(tmp_path), {}), Console())
    # The third cannot be: it is said, and the second is served on.
    assert [own.max_length for own in deployed if own is not None] == [7, 9]
    said = capsys.readouterr().err
    assert "max_length" in said and "served; it did not say more" in said and "version abc" in said


@pytest.mark.parametrize("answers", [True, False])
def test_a_signal_stops_in_order_once_requests_are_answered(
    answers: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Session:
        ending = "stopping, once what came in is answered"

        def __init__(self, *_: Any) -> None:
            self.answers = answers

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def deploy(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "ServingSession", Session)
    monkeypatch.setattr(run_module, "recipe_settings", lambda *_: ({}, "the recipe"))
    with nullcontext() if answers else pytest.raises(KeyboardInterrupt):
        run(Serving(str(tmp_path), {}), Console())
    assert ("stopping, once" in capsys.readouterr().err) is answers


@pytest.mark.parametrize(
    "options",
    [
        ["--replicas", "0"],
        ["--threads", "0"],
        ["--max-batch-size", "0"],
        ["--max-batch-size", "257"],
        ["--max-length", "0"],
        ["--max-characters", "0"],
        ["--max-wait-ms", "-1"],
    ],
)
def test_an_option_out_of_its_range_is_named(options: list[str]) -> None:
    found = CliRunner().invoke(app, ["serve", "nowhere", *options], env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert f"Invalid value for '{options[0]}'" in found.output
