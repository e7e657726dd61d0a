"""The whole chain without labels, on a tiny model: from texts to sentence vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import ConversionError, DataError
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.inference.serving import TextModel
from moe_dist.jobs.predict import PredictJob
from moe_dist.jobs.results import SCORES, load_scores
from moe_dist.tasks import model_kind
from pipelines.chain.chain import run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.preflight import check_before_start
from pipelines.report.nearness import load_imitation
from pipelines.stages.export import export_task
from tests.pipelines.conftest import WORDS, tiny_recipe
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture
def settings(tmp_path: Path, tiny_bert: Path) -> dict[str, Any]:
    return embedding_recipe(tmp_path, tiny_bert)


def embedding_recipe(directory: Path, teacher: Path) -> dict[str, Any]:
    """Give settings on 32 texts and 8 pairs; experts for kinds of tokens, fitted."""
    tiny = tiny_recipe(directory, teacher)
    texts = [" ".join(WORDS[(row * step) % 18] for step in (1, 3, 5, 7)) for row in range(40)]
    train, dev = directory / "texts.jsonl", directory / "pairs.jsonl"
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:32]))
    pairs = [{"question": text.split()[0], "passage": text} for text in texts[32:]]
    dev.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tiny | {
        "data": {
            "source": "files",
            "kind": "embedding",
            "train": str(train),
            "dev": str(dev),
            "text_columns": ["text"],
            "pair_columns": ["question", "passage"],
        },
        "finetune": {"num_epochs": 0},
        "compare": {"dense": {"moe.num_experts": 1, "moe.partition": "importance"}},
        "moe": {
            "num_experts": 2,
            "expert_size": 16,
            "num_shared_neurons": 0,
            "router": "token_gate",
            "partition": "token_clusters",
        },
        "distill": {"task_weight": 0, "dropout": 0},
        "train": tiny["train"] | {"max_steps": 3},
    }


def test_texts_alone_make_a_student_of_sentence_vectors(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    recorder, config = Recorder(), load_config(write_recipe(settings))
    run_chain(config, recorder)
    assert any(
        "vectors are the mean of a text's last hidden states" in line for line in recorder.noted
    )
    root = tmp_path / "outputs/tiny"
    report = json.loads((root / "report.json").read_text())
    for name in ("teacher", "student", "dense"):
        metrics = report[name]["metrics"]
        assert list(metrics) == ["recall_at_1", "recall_at_10", "mrr"]
        assert 0 < metrics["mrr"] <= 1 and metrics["recall_at_10"] == 1
    assert report["data"]["num_dev_samples"] == 8

    # Training rows have no pairs, and show all the same what experts are used for.
    student = root / "distill/model"
    job = PredictJob.of(config, str(root), model=str(student), split="train", measures=False)
    load = job.run()["expert_load"]
    assert [sum(shares) for shares in load.values()] == pytest.approx([1, 1])

    texts = ["the film was good", "a", "it was a very dull plot"]
    vectors = {}
    for name, place in (("teacher", "finetune-teacher"), ("student", "distill")):
        directory = root / place / "model"
        model, tokenizer = load_model(directory), load_tokenizer(directory)
        assert model_kind(model).name == "embedding"
        assert not any("pooler" in key for key in model.state_dict())
        served = TextModel(model, tokenizer, max_length=16).predict(texts)
        vectors[name] = torch.tensor(np.array(served["vector"].tolist()))
        for text, vector in zip(texts, vectors[name], strict=True):
            with torch.no_grad():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = states.mean(0) / states.mean(0).norm()
            torch.testing.assert_close(vector.float(), expected, atol=1e-5, rtol=1e-4)
    # What is measured of students is how far their vectors are from the teacher's.
    errors = load_imitation(root / "evaluate/predictions/imitation.npz")["prediction_error"]
    assert 0 < errors["student"].mean() < 1
    assert report["student"]["imitation"]["prediction_error"] == pytest.approx(
        float(errors["student"].mean()), rel=1e-5
    )


def test_without_epochs_students_are_compared_as_they_were_adapted(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["train"] |= {"num_epochs": 0}
    run_chain(load_config(write_recipe(settings)), Recorder())
    root = tmp_path / "outputs/tiny"
    report = json.loads((root / "report.json").read_text())
    for name, place in (("student", root), ("dense", root / "compare/dense")):
        adapted, kept = (
            place / stage / "model/model.safetensors" for stage in ("adapt", "distill")
        )
        assert adapted.read_bytes() == kept.read_bytes()
        assert report[name]["metrics"] == report[name]["metrics_before_distillation"]


def test_sentence_transformers_gives_the_same_vectors(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    settings["data"] |= {"pooling": "max", "normalise": False}
    run_chain(load_config(write_recipe(settings)), Recorder(), until="distill")
    directory = tmp_path / "outputs/tiny/distill/model"
    texts = ["the film was good", "dull"]
    served = TextModel(load_model(directory), load_tokenizer(directory), max_length=16)
    own = np.array(served.predict(texts)["vector"].tolist(), np.float32)
    found = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(texts)
    np.testing.assert_allclose(found, own, atol=1e-5)
    assert abs(np.linalg.norm(own, axis=1) - 1).min() > 0.1


def test_a_recipe_may_not_contradict_what_comes_with_the_model(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    run_chain(load_config(write_recipe(settings)), Recorder(), until="finetune-teacher")
    settings["model"]["teacher"] = str(tmp_path / "outputs/tiny/finetune-teacher/model")
    settings |= {"name": "again", "data": settings["data"] | {"pooling": "cls"}}
    with pytest.raises(ConversionError, match=r"data.pooling=cls contradicts .* which say mean"):
        run_chain(load_config(write_recipe(settings)), Recorder(), until="finetune-teacher")
    settings["data"]["pooling"] = "mean"
    recorder = Recorder()
    run_chain(load_config(write_recipe(settings)), recorder, until="finetune-teacher")
    assert any("as its sentence-transformers files say" in note for note in recorder.noted)


def test_a_shorter_student_of_vectors_is_trained_and_exported(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"student": {"num_layers": 1}, "compare": {}, "moe": {"num_experts": 1}}
    settings["moe"] |= {"expert_size": 16, "num_shared_neurons": 0}
    run_chain(load_config(write_recipe(settings)), Recorder(), until="distill")
    directory = tmp_path / "outputs/tiny/distill/model"
    exported = export_task(directory, None, tmp_path / "dense")
    assert (exported.kind, exported.ffn.split()[0]) == ("BertModel", "16")
    texts = ["the film was good", "dull"]
    vectors = [
        TextModel(load_model(place), load_tokenizer(place), max_length=16).predict(texts)["vector"]
        for place in (directory, exported.directory)
    ]
    own, dense = (np.array(found.tolist()) for found in vectors)
    np.testing.assert_allclose(own, dense, atol=1e-6)
    assert (exported.directory / "modules.json").is_file()


def test_encoder_decoders_have_no_one_vector(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import T5Config

    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    settings["model"]["teacher"] = str(tmp_path / "t5")
    with pytest.raises(ConversionError, match=r"is an encoder-decoder, and data.kind=embedding"):
        check_before_start(*_checked(load_config(write_recipe(settings))))


def test_a_decoder_without_padding_pads_with_its_end(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    directory = tmp_path / "gpt2"
    tokenizer = Tokenizer(
        WordLevel({word: row for row, word in enumerate(WORDS)} | {"<end>": len(WORDS)})
    )
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        directory
    )
    sizes = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 1,
        "vocab_size": len(WORDS) + 1,
        "n_positions": 16,
    }
    config = GPT2Config(bos_token_id=len(WORDS), eos_token_id=len(WORDS), **sizes)
    GPT2Model(config).save_pretrained(directory)
    settings["model"]["teacher"] = str(directory)
    settings["moe"] |= {"expert_size": 8}
    recorder = Recorder()
    run_chain(load_config(write_recipe(settings)), recorder, until="evaluate")
    assert any("pad" in line for line in recorder.warned)
    settings["data"]["pooling"] = "cls"
    with pytest.raises(ConversionError, match="first token for a text's vector, and in the deco"):
        check_before_start(*_checked(load_config(write_recipe(settings))))


def _checked(config: RunConfig) -> tuple[RunConfig, Workspace]:
    return config, Workspace(config, Recorder())


def test_fine_tuning_on_pairs_finds_more_passages(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    # A passage says in other words what its question asks: nothing that a random model knows.
    pairs = [
        {
            "question": f"{WORDS[one]} {WORDS[two]}",
            "passage": f"{WORDS[9 + two]} {WORDS[9 + one]} the",
        }
        for one in range(9)
        for two in range(one + 1, 9)
    ]
    for name, part in (("train", pairs[1::3] + pairs[2::3]), ("dev", pairs[::3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    (tmp_path / "more.jsonl").write_text(json.dumps({"passage": "a dull film"}) + "\n")
    settings["data"] |= {
        "train": str(tmp_path / "train.jsonl"),
        "dev": str(tmp_path / "dev.jsonl"),
        "unlabelled": str(tmp_path / "more.jsonl"),
        "text_columns": ["question", "passage"],
    }
    settings["compare"] = {}
    run_chain(load_config(write_recipe(settings)), Recorder(), until="finetune-teacher")
    root = tmp_path / "outputs/tiny"
    before = json.loads((root / "finetune-teacher/stage.json").read_text())["metrics"]
    settings["finetune"] = {"num_epochs": 1, "batch_size": 64, "accumulation": 20}
    with pytest.raises(DataError, match=r"24 training pairs in steps of 24 .* a pair alone"):
        run_chain(load_config(write_recipe(settings)), Recorder(), until="finetune-teacher")
    settings["finetune"] = {"num_epochs": 40, "max_steps": 999, "learning_rate": 1e-2}
    config = load_config(write_recipe(settings))
    # 24 pairs, and for the student 49 texts.
    workspace = Workspace(config, Recorder())
    assert workspace.num_steps(config.teacher_train, "finetuned") == 40 * 3
    train = config.train.model_copy(update={"max_steps": None})
    assert workspace.num_steps(train, "distilled") == 49 // 8
    run_chain(config, Recorder())
    report = json.loads((root / "report.json").read_text())
    assert report["training"]["finetune-teacher"]["num_steps"] == 40 * 3
    assert before["recall_at_1"] < 0.4 < 0.6 < report["teacher"]["metrics"]["recall_at_1"]
    assert min(score_F.min() for score_F in load_scores(root / "score-importance" / SCORES)) > 0
