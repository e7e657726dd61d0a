"""Questions and contexts through the whole chain, and what is served of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from typer.testing import CliRunner

from moe_dist.config import load_config
from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.serving import TextModel, _load_pyfunc
from moe_dist.jobs.results import load_predictions
from moe_dist.tasks.text_scores import answer_figures
from pipelines.chain.chain import run_chain
from pipelines.cli import app
from tests.pipelines.conftest import WORDS, tiny_recipe
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]
# Longer than what is left of 24 tokens, so that some are cut into windows.
LENGTHS = (6, 30)


def write_squad(path: Path, num_contexts: int, seed: int) -> list[dict[str, Any]]:
    """Contexts with two questions each, one of which has an answer; gives all questions."""
    draw = random.Random(seed)
    paragraphs, questions = [], []
    for number in range(num_contexts):
        words = draw.choices(WORDS, k=draw.randint(*LENGTHS))
        first = draw.randrange(len(words) - 1)
        start = len(" ".join(words[:first])) + (first > 0)
        text = " ".join(words[first : first + 2])
        qas = [
            {
                "id": f"{seed}-{number}-{answer}",
                "question": "was it good" if answer else "and the plot",
                "answers": [{"text": text, "answer_start": start}] if answer else [],
            }
            for answer in (True, False)
        ]
        paragraphs.append({"context": " ".join(words), "qas": qas})
        questions += qas
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    return questions


@pytest.fixture
def settings(tmp_path: Path, tiny_bert: Path) -> dict[str, Any]:
    return question_recipe(tmp_path, tiny_bert)


def question_recipe(directory: Path, teacher: Path) -> dict[str, Any]:
    """Give the settings of a small recipe, whose contexts it writes."""
    tiny = tiny_recipe(directory, teacher)
    write_squad(directory / "train.json", 16, seed=1)
    write_squad(directory / "dev.json", 6, seed=2)
    data = {
        "source": "files",
        "kind": "question_answering",
        "train": str(directory / "train.json"),
        "dev": str(directory / "dev.json"),
        "stride": 6,
        "max_answer_length": 5,
    }
    moe = {
        "num_experts": 2,
        "expert_size": 12,
        "num_shared_neurons": 0,
        "router": "token_gate",
        "partition": "token_clusters",
        "importance_samples": 32,
    }
    return tiny | {
        "model": tiny["model"] | {"max_length": 24},
        "data": data,
        "moe": moe,
        "compare": ["dense"],
    }


def test_the_chain_trains_measures_and_serves_answers(
    write_recipe: Write, settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = write_recipe(settings)
    console = Recorder()
    run_chain(load_config(recipe), console)
    assert len(console.ran) == 7
    root = tmp_path / "outputs/tiny"
    report = json.loads((root / "report.json").read_text())
    assert report["main_metric"] == "answer_f1"

    data = json.loads((tmp_path / "dev.json").read_text())["data"][0]["paragraphs"]
    gold = [[a["text"] for a in qa["answers"]] for p in data for qa in p["qas"]]
    for name in ("teacher", "student", "dense"):
        kept = load_predictions(root / f"evaluate/predictions/{name}.npz")
        assert kept.texts is not None and kept.sample_ids.tolist() == list(range(12))
        # Each answer is a part of its context, of five tokens at most.
        contexts = [p["context"] for p in data for _ in p["qas"]]
        for text, context in zip(kept.texts.tolist(), contexts, strict=True):
            assert text in context and len(text.split()) <= 5
        expected = answer_figures(kept.texts.tolist(), gold)
        np.testing.assert_allclose(kept.logits, expected, rtol=1e-6)
        metrics = report[name]["metrics"]
        assert metrics["answer_f1"] == pytest.approx(expected[:, 1].mean())
        assert metrics["exact_match"] == pytest.approx(expected[:, 0].mean())

        # What is served gives the same answers, with the threshold that measuring found.
        threshold = report[name]["calibrations"][""]
        stage = "finetune-teacher" if name == "teacher" else "distill"
        directory = root / ("compare/dense/distill" if name == "dense" else stage) / "model"
        model = _load_pyfunc(
            str(directory),
            {
                "max_length": 24,
                "options": {"stride": 6, "max_answer_length": 5},
                "calibration": threshold,
            },
        )
        questions = [qa["question"] for p in data for qa in p["qas"]]
        # Columns are known by their names.
        frame = pandas.DataFrame({"context": contexts, "question": questions})
        answers = model.predict(frame)
        assert answers["answer"].tolist() == kept.texts.tolist()
        assert ((answers["answer"] == "") == (-answers["score"] > threshold)).all()
        pairs = list(zip(questions, contexts, strict=True))
        assert model.predict(pairs)["answer"].tolist() == kept.texts.tolist()

    again = Recorder()
    run_chain(load_config(recipe), again)
    assert not again.ran
    measured_otherwise = settings | {"data": settings["data"] | {"max_answer_length": 2}}
    run_chain(load_config(write_recipe(measured_otherwise)), again)
    assert "distill" not in again.ran and "evaluate" in again.ran


def test_a_served_model_needs_both_texts(settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=24,
        )
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["teacher"])
    served = TextModel(model, tokenizer, max_length=24, options={"stride": 4})
    with pytest.raises(DataError, match="reads a question and a context"):
        served.predict(["was it good"])
    found = served.predict(pandas.DataFrame({"question": ["was it"], "context": ["a film"]}))
    assert list(found.columns) == ["answer", "score"] and found["answer"][0] in "a film"
    assert served.predict(pandas.DataFrame({"question": [], "context": []})).empty


def test_a_dry_run_says_what_the_data_hold(write_recipe: Write, settings: dict[str, Any]) -> None:
    found = CliRunner().invoke(app, ["compress", str(write_recipe(settings)), "--dry-run"])
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    assert "measured by answer F1, exact match" in words
    assert "50.0% of questions have an answer (50.0% of dev)" in words
    assert "training rows cut into several windows" in words


@pytest.mark.parametrize(
    ("section", "changes", "fault"),
    [
        ("data", {"stride": 24}, r"data.stride=24 is not below model.max_length=24"),
        ("data", {"stride": None}, r"data.stride=128, as when it is not given, is not below"),
        ("data", {"text_columns": "context"}, r"data.kind=question_answering reads two: the"),
        ("data", {"label_names": ["a", "b"]}, r"data.label_names names classes"),
        ("data", {"metrics": "accuracy"}, r"cannot measure data.kind=question_answering"),
        ("data", {"kind": "regression"}, r"data.stride belongs to data.kind=question_answering"),
        ("distill", {"adversarial_weight": 1}, r"distill.adversarial_weight=1 shows a"),
    ],
)
def test_what_questions_cannot_have_is_refused_with_the_recipe(
    write_recipe: Write,
    settings: dict[str, Any],
    section: str,
    changes: dict[str, Any],
    fault: str,
) -> None:
    recipe = settings | {section: settings.get(section, {}) | changes}
    with pytest.raises(ConfigError) as caught:
        load_config(write_recipe(recipe))
    assert any(re.search(fault, line) for line in caught.value.faults)


def test_questions_share_no_model_with_other_tasks(
    write_recipe: Write, settings: dict[str, Any]
) -> None:
    tasks = {"source": "tasks", "tasks": {"one": settings["data"], "two": settings["data"]}}
    with pytest.raises(ConfigError, match=r"data.tasks.one.kind=question_answering scores every"):
        load_config(write_recipe(settings | {"data": tasks}))
