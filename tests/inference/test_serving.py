from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

from moe_dist.errors import ConversionError, DataError
from moe_dist.inference import load_tokenizer
from moe_dist.inference.serving import TextModel, _load_pyfunc, text_columns
from moe_dist.tasks import TASK_KINDS
from tests.inference.start_models import build_model, write_tokenizer
from tests.serving.tiny_service import save_tiny

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film was good [ ] sep mask".split()


def tokenizer_and_config(tmp_path: Path) -> tuple[Any, Any]:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt")), config


def test_special_tokens_in_a_text_are_text_as_in_training(tmp_path: Path) -> None:
    tokenizer, config = tokenizer_and_config(tmp_path)
    model = TextModel(BertForSequenceClassification(config).eval(), tokenizer, max_length=16)
    texts = ["the film [SEP] was good", "the film [ sep ] was good", "the"]
    scores = model.predict(texts)["score"].tolist()
    assert scores[0] == scores[1]
    # Padding beside a longer text changes nothing but rounding.
    assert abs(model.predict(texts[2:])["score"][0] - scores[2]) < 1e-6


def test_a_text_without_tokens_has_no_answer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "gpt2")
    model = TextModel(build_model("gpt2").eval(), load_tokenizer(tmp_path), max_length=16)
    for texts in ([""], ["good", ""]):
        with pytest.raises(DataError, match="a text has no tokens"):
            model.predict(texts)
    assert len(model.predict(["good"])) == 1


@pytest.mark.parametrize("form", ["lean-fp32", "lean-bf16", "eager-bf16"])
@pytest.mark.parametrize(
    ("head", "column"),
    [
        (BertForSequenceClassification, "score"),
        (BertForQuestionAnswering, "score"),
        (BertModel, "vector"),
    ],
)
def test_another_form_answers_alike(tmp_path: Path, form: str, head: Any, column: str) -> None:
    settings = {}
    if head is BertModel:
        options = {"pooling": "mean", "normalise": True}
        settings = TASK_KINDS["embedding"].model_settings(None, options)
    directory = save_tiny(tmp_path / "model", head, **settings)
    texts: list[Any] = ["the film was good", "was the good film", "the"]
    if head is BertForQuestionAnswering:
        texts = [[text, "the film was good"] for text in texts]
    expected = _load_pyfunc(str(directory), {"max_length": 16}).predict(texts)[column].tolist()
    found = _load_pyfunc(str(directory), {"max_length": 16, "form": form}).predict(texts)
    limit = 1e-5 if form == "lean-fp32" else 0.05
    assert np.allclose(np.array(found[column].tolist()), np.array(expected), atol=limit, rtol=limit)
    assert np.abs(np.array(expected)).max() > 5 * limit


def test_a_form_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'fast' is not one of"):
        _load_pyfunc(str(tmp_path), {"form": "fast-fp32"})


def test_columns_that_are_not_read_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, config = tokenizer_and_config(tmp_path)
    model = TextModel(BertForQuestionAnswering(config).eval(), tokenizer, max_length=16)
    first, second = TASK_KINDS["question_answering"].text_columns
    rows = {second: ["the film was good"], "id": [7], first: ["was"], "source": ["web"]}
    assert model.columns(pandas.DataFrame(rows)) == [["was"], ["the film was good"]]
    assert [one.getMessage() for one in caplog.records] == [
        f"the model reads {first} and {second}; not read: id, source"
    ]
    caplog.clear()
    model.columns(pandas.DataFrame(rows)[[second, first]])
    assert not caplog.records


def test_rows_of_thousands_are_refused_before_columns_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*rows: Any) -> Any:
        raise AssertionError(f"{len(rows)} rows are turned into columns")

    monkeypatch.setattr("moe_dist.inference.serving.zip_longest", never)
    with pytest.raises(DataError, match="one or two columns of texts"):
        text_columns([[""] * 9_000, "a"])
