"""Models as MLflow loads, registers and serves them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.digests import PICKLES
from moe_dist.inference import save_model
from moe_dist.tracking import TrackedModel, build_tracker

mlflow = pytest.importorskip("mlflow")

WORDS = "a film good bad dull".split()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted BERT of two layers that sorts pairs of texts into two classes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    directory = tmp_path_factory.mktemp("student")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            id2label={0: "negative", 1: "positive"},
            problem_type="single_label_classification",
        )
    )
    scores = [torch.rand(32) for _ in range(2)]
    plan = plan_partition(scores, num_experts=2, expert_size=16, num_shared_neurons=8)
    tokenizer = BertTokenizerFast(vocab=str(directory / "vocab.txt"))
    return save_model(dense_to_moe(teacher, plan), directory / "model", tokenizer)


def tracked(directory: Path, **changes: Any) -> TrackedModel:
    fields: dict[str, Any] = {
        "name": "student",
        "directory": directory,
        "digest": "d1",
        "num_texts": 1,
        "labels": ("negative", "positive"),
        "max_length": 16,
    }
    return TrackedModel(**fields | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Loading a model asks the store of the process.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return mlflow.MlflowClient(tracking_uri=store)


def log(store: str, directory: Path, *models: TrackedModel) -> str:
    with build_tracker(store).chain("demo", directory, params={"a": 1}) as chain:
        for model in models:
            chain.log_model(model)
    assert chain.run_id is not None
    return chain.run_id


def test_a_logged_model_answers_texts_in_every_form(
    store: str, client: Any, student: Path, tmp_path: Path
) -> None:
    import pandas

    run_id = log(store, tmp_path, tracked(student, params={"router": "hash_random"}))
    (model,) = client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")
    assert model.name == "student" and model.status == "READY"
    assert model.params == {"router": "hash_random"}
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    texts = ["a good film", "dull"]
    answers = loaded.predict(pandas.DataFrame({"sentence": texts}))
    assert list(answers.columns) == ["label", "score", "scores"]
    assert set(answers["label"]) <= {"negative", "positive"}
    assert sum(answers["scores"][0].values()) == pytest.approx(1.0)
    assert loaded.predict(texts)["score"].tolist() == answers["score"].tolist()
    files = [path for path in artifact_directory(model).rglob("*") if path.is_file()]
    assert files and not [path for path in files if path.suffix in PICKLES]


def artifact_directory(model: Any) -> Path:
    return Path(str(model.artifact_location).removeprefix("file://"))


def test_pairs_of_texts_are_two_columns(
    store: str, client: Any, student: Path, tmp_path: Path
) -> None:
    import pandas

    run_id = log(store, tmp_path, tracked(student, num_texts=2))
    (model,) = client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")
    loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
    pairs = pandas.DataFrame({"premise": ["a good film"], "hypothesis": ["bad"]})
    alone = loaded.predict(pairs)
    other = loaded.predict(pairs.assign(hypothesis=["good good good"]))
    assert alone["score"][0] != other["score"][0]


def test_a_model_is_sent_once_and_registered_also_later(
    store: str, client: Any, student: Path, tmp_path: Path
) -> None:
    run_id = log(store, tmp_path, tracked(student))
    assert log(store, tmp_path, tracked(student, register_as="sentiment")) == run_id
    log(store, tmp_path, tracked(student, register_as="sentiment"))
    (model,) = client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")
    (version,) = client.search_model_versions("name = 'sentiment'")
    assert version.run_id == run_id and model.model_id in version.source
    assert mlflow.pyfunc.load_model("models:/sentiment/1").predict(["dull"])["label"][0]
    # Distilled anew, it is another model and the next version.
    log(store, tmp_path, tracked(student, digest="d2", register_as="sentiment"))
    assert len(client.search_model_versions("name = 'sentiment'")) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_logged_model_can_be_served(store: str, student: Path, tmp_path: Path) -> None:
    run_id = log(store, tmp_path, tracked(student))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", f"runs:/{run_id}/student", "--port", str(port), "--workers", "1"]
    # MLflow starts uvicorn by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (tmp_path / "serve.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": store,
                "PYTHONPATH": os.getcwd(),
                "PATH": path,
            },
            start_new_session=True,
        )
    try:
        answer = _ask(f"http://127.0.0.1:{port}", {"inputs": ["a good film", "dull"]}, process)
    except OSError:
        pytest.fail((tmp_path / "serve.log").read_text()[-3000:])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(answer["predictions"]) == 2
    assert set(answer["predictions"][0]) == {"label", "score", "scores"}


def _ask(url: str, question: Any, process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + 400
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5):
                break
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.5)
    request = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())
