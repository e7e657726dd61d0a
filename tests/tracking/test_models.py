"""Models as MLflow loads, registers and serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.digests import PICKLES
from moe_dist.errors import DataError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.saving import load_tokenizer
from moe_dist.inference.serving import TextModel
from moe_dist.tasks import TASK_KINDS
from moe_dist.tracking import TrackedModel, build_tracker
from moe_dist.tracking.models import describe_model
from pipelines.chain.chain import run_chain
from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe  # noqa: F401
from tests.pipelines.recorder import Recorder
from tests.tracking.servers import Server, ask_served_model

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


def test_a_model_of_embeddings_answers_with_vectors(student: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=5 + len(WORDS), num_hidden_layers=1, **sizes)
    for key, value in TASK_KINDS["embedding"].model_settings(None).items():
        setattr(config, key, value)
    model = BertModel(config, add_pooling_layer=False)
    directory = save_model(model, tmp_path / "vectors", load_tokenizer(student))
    answers = dict(TASK_KINDS["embedding"].served_columns)
    entry = asdict(tracked(directory, labels=(), answers=answers))
    describe_model(directory, tmp_path / "described", entry, run_id="r", model_id="m")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "described"))
    assert str(loaded.metadata.get_output_schema()) == "['vector': Array(double) (required)]"
    found = loaded.predict(["a good film", "dull"])
    assert list(found.columns) == ["vector"]
    assert [len(vector) for vector in found["vector"]] == [16, 16]
    assert sum(value**2 for value in found["vector"][0]) == pytest.approx(1, rel=1e-5)
    served = TextModel(load_model(directory), load_tokenizer(directory), max_length=16)
    with pytest.raises(DataError, match="reads one column of texts, and there are two"):
        served.predict([["a", "film"]])
    assert list(served.predict([]).columns) == ["vector"]


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


def test_questions_and_contexts_are_known_by_their_names(tmp_path: Path) -> None:
    import pandas
    import torch
    from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    model = save_model(BertForQuestionAnswering(config), tmp_path / "model", tokenizer)
    kind = TASK_KINDS["question_answering"]
    entry = tracked(
        model,
        num_texts=2,
        labels=(),
        answers=dict(kind.served_columns),
        inputs=kind.text_columns,
        options={"stride": 2, "max_answer_length": 1},
        calibration=1e9,
    )
    described = tmp_path / "described"
    describe_model(model, described, asdict(entry), run_id="r", model_id="m")
    loaded = mlflow.pyfunc.load_model(str(described))
    assert loaded.metadata.signature.inputs.input_names() == ["question", "context"]
    assert loaded.metadata.signature.outputs.input_names() == ["answer", "score"]
    rows = pandas.DataFrame({"context": ["a good film bad"] * 2, "question": ["dull", "bad"]})
    found = loaded.predict(rows)
    assert all(answer in ("a", "good", "film", "bad") for answer in found["answer"])
    # Below every difference, so that no question is answered.
    other = asdict(entry) | {"calibration": -1e9}
    describe_model(model, tmp_path / "none", other, run_id="r", model_id="m")
    none = mlflow.pyfunc.load_model(str(tmp_path / "none")).predict(rows)
    assert none["answer"].tolist() == ["", ""]
    assert none["score"].tolist() == found["score"].tolist()


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
    question = {"inputs": ["a good film", "dull"]}
    answer = ask_served_model(store, f"runs:/{run_id}/student", question, tmp_path)
    assert len(answer["predictions"]) == 2
    assert set(answer["predictions"][0]) == {"label", "score", "scores"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_chain_registers_a_model_that_a_server_hands_out(
    write_recipe: Callable[[dict[str, Any]], Path],  # noqa: F811
    tiny_settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    server = Server(tmp_path)
    server.start()
    try:
        tiny_settings["tracking"] = {"uri": server.uri, "register_model": "tiny-sentiment"}
        run_chain(load_config(write_recipe(tiny_settings)), Recorder())
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        (version,) = client.search_model_versions("name = 'tiny-sentiment'")
        parent = client.get_run(version.run_id)
        assert "mlflow.parentRunId" not in parent.data.tags
        named = f"models:/tiny-sentiment/{version.version}"
        texts = ["the film was good", "a dull plot", "music"]

        # Loading a model asks the store of the process.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        loaded = mlflow.pyfunc.load_model(named).predict(texts)
        served = ask_served_model(server.uri, named, {"inputs": texts}, tmp_path)["predictions"]
    finally:
        server.stop()

    directory = tmp_path / "outputs/tiny/distill/model"
    model = load_model(directory)
    encoded = load_tokenizer(directory)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        chances = model(**encoded).logits.softmax(dim=-1)
    labels = [model.config.id2label[index] for index in chances.argmax(dim=-1).tolist()]
    scores = chances.max(dim=-1).values.tolist()
    assert loaded["label"].tolist() == [row["label"] for row in served] == labels
    assert loaded["score"].tolist() == pytest.approx(scores, abs=1e-5)
    assert [row["score"] for row in served] == pytest.approx(scores, abs=1e-5)
