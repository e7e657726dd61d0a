"""Jobs on a real head node with tokens: run to their end, found in MLflow, exit codes come back."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.head import BIN, PLANTED, Head

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
Write = Callable[[dict[str, Any]], Path]


def submit(head: Head, recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "submit", str(recipe), "--address", head.address]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def ray_job(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", arguments[0], "--address", head.address, *arguments[1:]],
        cwd=ROOT,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def job_statuses(head: Head, name: str) -> dict[str, str]:
    """The status of each job of a recipe, by submission id."""
    headers = {"Authorization": f"Bearer {head.token}"}
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    ids = {job["submission_id"]: str(job["status"]) for job in found if job["submission_id"]}
    return {key: status for key, status in ids.items() if key.startswith(name)}


def finished_runs(mlflow_uri: str, name: str) -> set[str]:
    """The stages of a chain that a tracking server knows as finished."""

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{mlflow_uri}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    found = post("experiments/search", {"max_results": 10})["experiments"]
    runs = post("runs/search", {"experiment_ids": [one["experiment_id"] for one in found]})["runs"]
    (parent,) = [run for run in runs if run["info"]["run_name"] == name]
    parent_id = parent["info"]["run_id"]
    children = [
        run
        for run in runs
        if {"key": "mlflow.parentRunId", "value": parent_id} in run["data"]["tags"]
    ]
    whole = [run for run in (parent, *children) if run["info"]["status"] == "FINISHED"]
    return {run["info"]["run_name"] for run in whole}


STAGES = {"finetune-teacher", "score-importance", "adapt", "distill", "evaluate"}


def test_a_submitted_chain_runs_to_its_end(
    head: Head,
    mlflow_uri: str,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    from moe_dist.inference import load_model

    tiny_settings["tracking"] = {"uri": mlflow_uri}
    before = sorted(path.name for path in ROOT.iterdir())
    done = submit(head, write_recipe(tiny_settings), "--set", "name=sent")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sending" in done.stderr and "SUCCEEDED" in done.stderr
    assert "distill: done" in done.stdout  # the job's own lines
    assert finished_runs(mlflow_uri, "sent") == {"sent", *STAGES}
    load_model(tmp_path / "outputs/sent/distill/model")
    assert sorted(path.name for path in ROOT.iterdir()) == before
    # Neither this command's output nor a log of Ray's holds a secret of the node.
    logs = (head.temp_dir / "ray").glob("session_2*/logs")
    kept = [path for folder in logs for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-sent-") for path in kept)
    texts = [
        done.stdout,
        done.stderr,
        *(path.read_bytes().decode("utf-8", "replace") for path in kept),
    ]
    secrets = (head.token, *PLANTED.values())
    assert [text[:80] for text in texts if any(secret in text for secret in secrets)] == []


def test_a_failing_job_s_exit_code_comes_back(
    head: Head, write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    """The files are said to be on the cluster, and are not: an error of the user's, code 2."""
    tiny_settings["data"]["train"] = "/nowhere/train.jsonl"
    done = submit(head, write_recipe(tiny_settings))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "checked by the job: data.train" in done.stderr
    assert "no such data file" in done.stdout and "/nowhere/train.jsonl" in done.stdout
    assert "FAILED" in done.stderr


def test_a_wrong_token_is_said_and_not_shown(
    head: Head, write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    wrong = "0123456789abcdef0123456789abcdef"
    (tmp_path / "token").write_text(wrong)
    other = Head(
        head.address,
        wrong,
        head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        head.temp_dir,
        head.process,
    )
    done = submit(other, write_recipe(tiny_settings))
    assert done.returncode == 1
    assert "does not accept this token" in done.stderr and "get-auth-token" in done.stderr
    assert wrong not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_everything_listens_on_loopback(head: Head, mlflow_uri: str) -> None:
    """Dashboard and tracking server; Ray's own ports follow the node's address."""
    wanted = {int(address.rpartition(":")[2]) for address in (head.address, mlflow_uri)}
    seen = {
        (one.laddr.ip, one.laddr.port)
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port in wanted
    }
    assert seen == {("127.0.0.1", port) for port in wanted}


@pytest.mark.slow
def test_a_plain_job_submission_runs_on_two_workers(
    head: Head,
    mlflow_uri: str,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """The command of the README."""
    tiny_settings["tracking"] = {"uri": mlflow_uri}
    tiny_settings["parallel"] = {"num_workers": 2, "ep_size": 2, "zero_stage": 1}
    recipe = write_recipe(tiny_settings)
    command = ("submit", "--working-dir", ".", "--", "python", "-m", "pipelines", "compress")
    done = ray_job(head, *command, str(recipe), "--set", "name=plain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished_runs(mlflow_uri, "plain") == {"plain", *STAGES}
    assert (tmp_path / "outputs/plain/distill/model/model.safetensors").is_file()

    lost = ray_job(head, *command, str(recipe), "--set", "output_dir=outputs")
    assert lost.returncode != 0
    assert "output_dir=" in lost.stdout and "does not outlive the job" in lost.stdout


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_or_stops_it_as_asked(
    head: Head, mlflow_uri: str, write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["tracking"] = {"uri": mlflow_uri}
    tiny_settings["train"] |= {"num_epochs": 100_000, "log_every": 1}
    recipe = write_recipe(tiny_settings)
    for name, flags, words in (
        ("left", [], "goes on"),
        ("ended", ["--stop-on-interrupt"], "has ended: STOPPED"),
    ):
        command = [sys.executable, "-m", "pipelines", "submit", str(recipe)]
        command += ["--address", head.address, "--set", f"name={name}", *flags]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=head.environment,
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.PIPE,
            # A shell's background jobs, of which this test may be one, ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        begun = any(re.search("finetune-teacher.*: started", line) for line in process.stdout)
        watchdog.cancel()
        assert begun, f"the job {name} did not begin"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=180)
        assert process.returncode == 130
        assert words in said
        (status,) = job_statuses(head, name).values()
        assert status == ("RUNNING" if name == "left" else "STOPPED")
    (left,) = job_statuses(head, "left")
    assert ray_job(head, "stop", left).returncode == 0


@pytest.mark.slow
def test_without_waiting_the_job_is_named(
    head: Head, write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    done = submit(head, write_recipe(tiny_settings), "--no-wait")
    assert done.returncode == 0
    name = done.stdout.strip()
    assert (
        name.startswith("tiny-")
        and f"ray job logs --follow --address {head.address}" in done.stderr
    )
    deadline_s = time.monotonic() + 300
    while (status := job_statuses(head, name)[name]) != "SUCCEEDED":
        assert status in ("PENDING", "RUNNING") and time.monotonic() < deadline_s
        time.sleep(2)
