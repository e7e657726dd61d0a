"""Planted secrets: none is found in what a chain prints, writes, or sends to MLflow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.config import load_config
from moe_dist.redaction import hide_secrets
from tests.cluster.head import PLANTED

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[dict[str, Any]], Path]
IN_URI = "planted-uri-password"
IN_PATH = "planted-path-token"


def secrets_in(text: str) -> list[str]:
    return [secret for secret in (*PLANTED.values(), IN_URI, IN_PATH) if secret in text]


def files_below(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.timeout(600)
def test_no_planted_secret_comes_out(
    mlflow_uri: str,
    mlflow_directory: Path,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    data = tiny_settings["data"]
    with_token = tmp_path / f"train?token={IN_PATH}&x=.jsonl"
    shutil.move(data["train"], with_token)
    data["train"] = str(with_token)
    tiny_settings["tracking"] = {"uri": mlflow_uri.replace("://", f"://ann:{IN_URI}@")}
    recipe = write_recipe(tiny_settings)
    command = [sys.executable, "-m", "pipelines", "compress", str(recipe)]
    environment = os.environ | PLANTED | {"MLFLOW_TRACKING_USERNAME": "ann"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert secrets_in(done.stdout + done.stderr) == []
    assert "train?token=***&x=.jsonl" in done.stderr

    written = list(files_below(tmp_path / "outputs", mlflow_directory))
    names = {path.name for path in written}
    assert {"report.json", "stage.json", "recipe.yaml", "tracking.json", "store.db"} <= names
    assert any(mlflow_directory / "artifacts" in path.parents for path in written)
    leaks = {
        str(path): found
        for path in written
        if (found := secrets_in(path.read_bytes().decode("utf-8", "replace")))
    }
    assert leaks == {}

    # A mistake is told without them too.
    wrong = [*command, "--set", f"data.dev=/gone?secret={IN_PATH}"]
    wrong += ["--set", f"tracking.uri=ftp://ann:{IN_URI}@host"]
    failed = subprocess.run(
        wrong, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert failed.returncode == 2
    assert secrets_in(failed.stdout + failed.stderr) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:p@ss/w@host:5000/x", "http://***@host:5000/x"),
        ("see https://t0ken@host and ann@example", "see https://***@host and ann@example"),
        ("s3://b/x?X-Amz-Signature=abc&part=2", "s3://b/x?X-Amz-Signature=***&part=2"),
        ("/d/a.tsv?hub_token=abc#frag", "/d/a.tsv?hub_token=***#frag"),
        ("key hf_abcdefghijklmnopqrst.", "key ***."),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("tokens_per_s=3, moe.router: token_gate", "tokens_per_s=3, moe.router: token_gate"),
        ("http://host:5000/a?max_tokens=3", "http://host:5000/a?max_tokens=3"),
    ],
)
def test_only_credentials_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_nothing_of_ours_listens_on_every_interface() -> None:
    sources = [ROOT / "Makefile", ROOT / "ray_config.yaml", *(ROOT / "docs").glob("*.md")]
    for folder in ("moe_dist", "pipelines", "cluster"):
        sources += [path for path in files_below(ROOT / folder) if path.suffix != ".pyc"]
    wide = re.compile(r"0\.0\.0\.0|host[= ]\"?::")
    # A pod's own address, which the policy beside it shuts off.
    pod = ROOT / "cluster" / "kuberay" / "ray_service.yaml"
    assert "kind: NetworkPolicy" in pod.read_text(encoding="utf-8")
    sources.remove(pod)
    assert [str(path) for path in sources if wide.search(path.read_text(encoding="utf-8"))] == []


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel-value")
    assert hide_secrets("a correct horse, parallel-value, short") == "a ***, parallel-value, short"


def test_the_resolved_recipe_and_parameters_hide_every_section(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["data"]["train"] = f"/d/train.tsv?token={IN_PATH}"
    tiny_settings["tracking"] = {"uri": f"postgresql://ann:{IN_URI}@db/mlflow"}
    config = load_config(write_recipe(tiny_settings))
    assert secrets_in(config.to_yaml() + str(config.flatten())) == []
    assert yaml.safe_load(config.to_yaml())["data"]["train"] == "/d/train.tsv?token=***"
