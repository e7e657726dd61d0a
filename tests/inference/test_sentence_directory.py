"""Directories of sentence-transformers are read as it reads them, and written so that it can."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.errors import CheckpointError, ConversionError
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.inference.sentence_directory import (
    MAX_LENGTH,
    NORMALISED,
    POOLING,
    SentencePooling,
    read_sentence_pooling,
    write_sentence_files,
)
from moe_dist.losses.alignment import POOLINGS
from tests.conversion.dense_models import random_scores
from tests.inference.start_models import WORDS, write_start_model
from tests.inference.test_saving import run_python

TEXTS = [WORDS[0], " ".join(WORDS[:5]), " ".join(WORDS * 3)]
LENGTH = 12


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_start_model(tmp_path / "base", kind="Model")


def save_sentence_model(base: Path, target: Path, pooling: SentencePooling, mixture: bool) -> Path:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(base).eval()
    if mixture:
        plan = plan_partition(
            random_scores(model), num_experts=4, expert_size=8, num_shared_neurons=4
        )
        model = dense_to_moe(model, plan, router="token_gate", top_k=2)
    setattr(model.config, POOLING, pooling.pooling)
    setattr(model.config, NORMALISED, pooling.normalise)
    setattr(model.config, MAX_LENGTH, pooling.max_seq_length)
    return save_model(model, target, AutoTokenizer.from_pretrained(base))


def own_vectors(directory: Path) -> Tensor:
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    pooling = SentencePooling.of(model.config)
    assert pooling is not None
    batch = tokenizer(
        TEXTS,
        padding=True,
        truncation=True,
        max_length=pooling.max_seq_length,
        return_tensors="pt",
    )
    with torch.inference_mode():
        return pooling.vectors(model(**batch).last_hidden_state, batch["attention_mask"])


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_the_library_makes_the_same_vectors(
    base: Path, tmp_path: Path, name: str, normalise: bool, mixture: bool
) -> None:
    library = pytest.importorskip("sentence_transformers")
    pooling = SentencePooling(name, normalise, LENGTH)
    directory = save_sentence_model(base, tmp_path / "model", pooling, mixture)
    assert read_sentence_pooling(directory) == (pooling, ())
    loaded = library.SentenceTransformer(str(directory), device="cpu")
    assert loaded.max_seq_length == LENGTH
    vectors = loaded.encode(TEXTS, convert_to_tensor=True)
    own = own_vectors(directory)
    torch.testing.assert_close(vectors, own, rtol=0, atol=1e-6)
    lengths = own.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(len(TEXTS)), atol=1e-6) == normalise


def test_a_new_process_needs_one_import(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pooling = SentencePooling(max_seq_length=LENGTH)
    directory = save_sentence_model(base, tmp_path / "model", pooling, mixture=True)
    code = (
        "import json, sys, moe_dist\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))"
    )
    done = run_python(code, directory, json.dumps(TEXTS))
    assert done.returncode == 0, done.stderr
    vectors = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(vectors, own_vectors(directory), rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_what_the_library_saves_is_read(
    base: Path, tmp_path: Path, name: str, normalise: bool
) -> None:
    library = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    parts = [models.Transformer(str(base)), models.Pooling(16, pooling_mode=name)]
    model = library.SentenceTransformer(
        modules=[*parts, *([models.Normalize()] if normalise else [])], device="cpu"
    )
    model.save(str(tmp_path / "saved"))
    assert read_sentence_pooling(tmp_path / "saved") == (SentencePooling(name, normalise), ())


def test_without_the_files_the_mean_is_assumed_and_said(base: Path) -> None:
    pooling, lines = read_sentence_pooling(base)
    assert pooling == SentencePooling("mean", True, None)
    assert len(lines) == 1
    assert "no modules.json" in lines[0] and "assumed" in lines[0]


@pytest.fixture
def sentence_files(tmp_path: Path) -> Path:
    """A directory with the files alone, which is all that is read."""
    write_sentence_files(SentencePooling("mean", True, 256), tmp_path, 16)
    return tmp_path


def change(path: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        file = directory / path
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | changes))

    return apply


def modules(*entries: tuple[str, str]) -> Callable[[Path], None]:
    rows = [
        {"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in entries
    ]

    def apply(directory: Path) -> None:
        (directory / "modules.json").write_text(json.dumps(rows))

    return apply


TRANSFORMER, POOLER = ("Transformer", ""), ("Pooling", "1_Pooling")
MEAN = "pooling_mode_mean_tokens"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (modules(TRANSFORMER, POOLER, ("Dense", "2_Dense")), "has a module Dense"),
        (modules(TRANSFORMER), "joins its modules as Transformer"),
        (modules(("Transformer", "0_Transformer"), POOLER), "keeps its transformer in '0_Trans"),
        (modules(TRANSFORMER, ("Pooling", "../1_Pooling")), "leads out of the directory"),
        (lambda d: (d / "modules.json").write_text("{"), r"modules\.json cannot be read"),
        (lambda d: (d / "modules.json").write_text("{}"), "it holds no list"),
        (lambda d: (d / "modules.json").write_text("[1]"), r"modules\.json cannot be read"),
        (lambda d: (d / "1_Pooling/config.json").unlink(), "config.json cannot be read"),
        (change("1_Pooling/config.json", pooling_mode="lasttoken"), "pools by lasttoken"),
        (
            change(
                "1_Pooling/config.json", **{MEAN: False, "pooling_mode_weightedmean_tokens": True}
            ),
            "pools by weightedmean",
        ),
        (change("1_Pooling/config.json", pooling_mode_cls_token=True), r"several .*cls, mean"),
        (change("1_Pooling/config.json", pooling_mode=["mean", "max"]), r"several .*mean, max"),
        (change("sentence_bert_config.json", max_seq_length="long"), "max_seq_length is 'long'"),
        (change("sentence_bert_config.json", do_lower_case=True), "to lower case"),
        (
            change("sentence_bert_config.json", transformer_task="fill-mask"),
            "sets transformer_task to 'fill-mask'",
        ),
        (
            change(
                "sentence_bert_config.json",
                modality_config={"text": {"method_output_name": "pooler_output"}},
            ),
            "pools 'pooler_output'",
        ),
        (
            change(
                "config_sentence_transformers.json",
                prompts={"query": "query: "},
                default_prompt_name="query",
            ),
            "puts the prompt 'query: ' before",
        ),
    ],
)
def test_what_we_do_not_have_is_refused(
    sentence_files: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    assert read_sentence_pooling(sentence_files)[0] == SentencePooling("mean", True, 256)
    spoil(sentence_files)
    with pytest.raises(ConversionError, match=message) as caught:
        read_sentence_pooling(sentence_files)
    assert caught.value.remedy
    assert "\n" not in caught.value.message


def test_lower_case_is_no_matter_where_the_tokenizer_does_it(sentence_files: Path) -> None:
    change("sentence_bert_config.json", do_lower_case=True)(sentence_files)
    change("tokenizer_config.json", do_lower_case=True)(sentence_files)
    assert read_sentence_pooling(sentence_files)[0].max_seq_length == 256


def test_the_manifest_covers_the_files(base: Path, tmp_path: Path) -> None:
    directory = save_sentence_model(base, tmp_path / "model", SentencePooling(), mixture=True)
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= listed.keys()
    assert stat.S_IMODE((directory / "1_Pooling").stat().st_mode) & 0o500 == 0o500
    change("1_Pooling/config.json", pooling_mode="max")(directory)
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json is damaged"):
        load_model(directory)


def test_a_classifier_that_was_a_sentence_model_is_none(base: Path, tmp_path: Path) -> None:
    model = load_model(save_sentence_model(base, tmp_path / "base", SentencePooling(), False))
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_config(model.config)
    assert not (save_model(classifier, tmp_path / "classifier") / "modules.json").exists()
