"""The command line: quick to start, and clean about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moe_dist.errors import ConfigError
from pipelines.cli import app
from pipelines.commands.command_line import clean_errors
from pipelines.json_console import json_console

Write = Callable[[dict[str, Any]], Path]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['moe-dist', '--help']\n"
        "from pipelines.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'deepspeed', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert "compress" in done.stdout
    # The goal is 1.5 s; a shared machine gets some slack, an import of torch would still show.
    assert time.monotonic() - begin < 4.0


def test_all_faults_of_a_recipe_come_at_once_without_a_traceback(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["moe"] |= {"num_expert": 4, "top_k": 9}
    result = run("compress", write_recipe(tiny_settings))
    assert result.exit_code == 2
    assert "moe.num_expert" in result.output
    assert "moe.top_k=9" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "outputs").exists()


def test_a_missing_data_file_leaves_nothing_behind(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").unlink()
    result = run("compress", write_recipe(tiny_settings))
    assert result.exit_code == 2
    assert "train.jsonl" in result.output
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("command", ["compress", "preflight"])
@pytest.mark.parametrize("existing", ["outputs", "outputs/tiny", "above"])
def test_empty_directories_that_were_there_before_stay(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path, command: str, existing: str
) -> None:
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / existing).mkdir(parents=True)
    if existing == "above":
        tiny_settings["output_dir"] = str(tmp_path / "above/new/outputs")
    recipe = write_recipe(tiny_settings)
    before = {path for path in tmp_path.rglob("*") if path.is_dir()}
    assert run(command, recipe).exit_code != 0
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == before


def test_a_required_speedup_ends_with_an_error_after_all_is_written(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tiny_settings)
    missed = run("compress", recipe, "--require-speedup", "1000")
    assert missed.exit_code == 1
    (line,) = [line for line in missed.output.splitlines() if line.startswith("error: ")]
    assert " 1000 × as fast as its teacher" in line
    assert "Traceback" not in missed.output
    report = json.loads((tmp_path / "outputs/tiny/report.json").read_text())
    assert report["pays"]["required"] == 1000
    assert report["pays"]["line"] in missed.output
    assert (
        report["student"]["fastest"]["1"]["form"]
        in (tmp_path / "outputs/tiny/report.md").read_text()
    )
    assert report["student"]["expert_reads"]["num_experts"] == 2
    # Nothing is measured anew for another requirement, and none is an error no more.
    again = run("evaluate", recipe)
    assert again.exit_code == 0
    assert "evaluate: already finished" in again.output
    assert "meets" in json.loads((tmp_path / "outputs/tiny/report.json").read_text())["pays"]
    capfd.readouterr()
    events = run("compress", recipe, "--json", "--set", "evaluate.require_speedup=1000")
    assert events.exit_code == 1
    kinds = [json.loads(one)["event"] for one in capfd.readouterr().out.splitlines()]
    assert kinds[-2:] == ["report", "error"]


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_required_speedup_that_is_no_speed_is_refused(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path, value: str
) -> None:
    result = run("compress", write_recipe(tiny_settings), "--require-speedup", value)
    assert result.exit_code == 2
    assert "evaluate.require_speedup" in result.output
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("command", ["compress", "distill"])
def test_experts_that_do_not_fit_the_model_are_found_before_training(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path, command: str
) -> None:
    result = run(command, write_recipe(tiny_settings), "--set", "moe.expert_size=100")
    assert result.exit_code == 2
    assert "expert_size=100" in result.output
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_sentences_longer_than_the_model_reads_are_found_before_training(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    result = run("compress", write_recipe(tiny_settings), "--set", "model.max_length=33", *flags)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "model.max_length: 33 is more than the 32 positions" in said
    assert "set it to 32 or less" in said
    assert not (tmp_path / "outputs").exists()


def test_an_output_directory_that_cannot_be_written_is_named(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("compress", write_recipe(tiny_settings), "--set", f"output_dir={tmp_path}/file")
    assert result.exit_code == 2
    assert "output_dir" in result.output


def test_a_tracking_server_that_does_not_answer_is_one_clear_error(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    tiny_settings["tracking"] = {"uri": "http://127.0.0.1:9"}
    result = run("compress", write_recipe(tiny_settings))
    assert result.exit_code == 2
    assert "127.0.0.1:9" in result.output
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_prints_sizes_and_writes_nothing(
    write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(tiny_settings)
    result = run("compress", recipe, "--set", "compare=[dense]", "--dry-run")
    assert result.exit_code == 0, result.output
    for piece in ("teacher", "student", "dense", "× 0.500", "tokens per step", "48 to train"):
        assert piece in result.output
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_says_what_it_could_not_know(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_settings["model"]["teacher"] = "nobody/has-this-model"
    result = run("compress", write_recipe(tiny_settings), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "not known: parameters" in result.output
    assert "steps, student" in result.output


@pytest.mark.parametrize(
    ("error", "debug", "code"),
    [
        (ConfigError(["data.train=https://me:hunter2@host/x"]), True, 2),
        (ConfigError(["data.train=https://me:hunter2@host/x"]), False, 2),
        (RuntimeError("GET https://me:hunter2@host/x"), False, 1),
    ],
)
def test_errors_and_tracebacks_tell_no_credentials(
    error: Exception, debug: bool, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, clean_errors(debug=debug):
        raise error
    said = capsys.readouterr().err
    assert stopped.value.exit_code == code
    assert "host/x" in said and "hunter2" not in said
    assert ("Traceback" in said) == (debug or code == 1)


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (KeyboardInterrupt(), "stopped; the same command continues from here\n"),
        (KeyboardInterrupt("a population starts anew"), "stopped; a population starts anew\n"),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    stop: KeyboardInterrupt, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, clean_errors(debug=False):
        raise stop
    assert stopped.value.exit_code == 130
    assert capfd.readouterr().err == said
    with pytest.raises(KeyboardInterrupt), json_console():
        raise stop
    (event,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert event["event"] == "stopped" and f"stopped; {event['message']}\n" == said
