"""What a job would lose: every fault at once, and nothing else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster import lasting
from pipelines.cli import app

TEMPORARY = (Path("/job/copy"), Path("/tmp/ray"))


def faults(output_dir: str, uri: str | None, num_nodes: int = 1) -> list[str]:
    return lasting.lasting_faults(
        output_dir, uri, temporary=TEMPORARY, count_nodes=lambda: num_nodes
    )


@pytest.mark.parametrize(
    ("output_dir", "uri", "num_nodes"),
    [
        ("/shared/outputs", "http://10.0.0.1:5000", 3),
        ("s3://bucket/outputs", "https://tracking", 3),
        ("gs://bucket/outputs", None, 3),
        ("file:///shared/outputs", None, 3),
        ("/shared/outputs", "postgresql://db/mlflow", 3),
        ("/shared/outputs", "sqlite:////shared/mlflow.db", 1),
        ("/job/copy-of-another", None, 3),
    ],
)
def test_what_lasts_is_accepted(output_dir: str, uri: str | None, num_nodes: int) -> None:
    assert faults(output_dir, uri, num_nodes) == []


@pytest.mark.parametrize(
    ("output_dir", "words"),
    [
        ("", "not given"),
        ("outputs", "not an absolute path"),
        ("../outputs", "not an absolute path"),
        ("~/outputs", "not an absolute path"),
        ("/job/copy/outputs", "lies in /job/copy"),
        ("/job/other/../copy/outputs", "lies in /job/copy"),
        ("/tmp/ray/outputs", "lies in /tmp/ray"),
        ("file:///job/copy/outputs", "lies in /job/copy"),
        ("file://outputs", "not an absolute path"),
        ("s3:/bucket/outputs", "not an absolute path"),
    ],
)
def test_results_that_end_with_the_job_are_refused(output_dir: str, words: str) -> None:
    (fault,) = faults(output_dir, None)
    assert words in fault and "--set output_dir=/shared/outputs" in fault


@pytest.mark.parametrize(
    ("uri", "num_nodes", "words"),
    [
        ("", 1, "not given"),
        ("sqlite:///mlflow.db", 1, "not an absolute path"),
        ("sqlite:////job/copy/mlflow.db", 1, "lies in /job/copy"),
        ("sqlite:////shared/mlflow.db", 2, "the cluster has 2 nodes"),
        ("sqlite+pysqlite:///mlflow.db", 1, "not an absolute path"),
        ("sqlite+pysqlite:////shared/mlflow.db", 2, "the cluster has 2 nodes"),
        ("sqlite://", 1, "not an absolute path"),
    ],
)
def test_records_that_end_with_the_job_are_refused(uri: str, num_nodes: int, words: str) -> None:
    (fault,) = faults("/shared", uri, num_nodes)
    assert words in fault and "--set tracking.uri=http://HOST:5000" in fault


def test_a_ray_of_another_place_is_known_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert tmp_path / "session_1" in lasting.temporary_directories()
    assert copy in lasting.temporary_directories()


def test_compress_in_a_job_names_both_keys_before_it_starts(
    write_recipe: Callable[[dict[str, Any]], Path],
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del tiny_settings["output_dir"], tiny_settings["tracking"]
    recipe = write_recipe(tiny_settings)
    monkeypatch.setenv(lasting.JOB_VARIABLE, yaml.safe_dump({}))
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    result = CliRunner().invoke(app, ["compress", str(recipe)])
    assert result.exit_code == 2
    assert "2 faults" in result.output
    assert "output_dir=" in result.output and "tracking.uri=" in result.output
    assert list(copy.iterdir()) == []
