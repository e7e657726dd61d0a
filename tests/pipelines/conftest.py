"""A recipe small enough to run whole: a random two-layer BERT and a few dozen sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = tuple(
    "the film was a good bad great awful fine dull and it plot acting music scene very not "
    "quite".split()
)
POSITIVE = ("good", "great", "fine")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that `from_pretrained` reads: two layers, width 16, FFN 32."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(directory)
    BertTokenizerFast(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    return directory


def write_sentences(path: Path, *, count: int, offset: int = 0) -> None:
    """Write labelled sentences, each different from the others."""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(offset, offset + count):
            words = [WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 5, 7, 11)]
            good = number % 2 == 0
            words.append(POSITIVE[number % 3] if good else ("bad", "awful", "dull")[number % 3])
            row = {"text": " ".join(words), "label": "positive" if good else "negative"}
            stream.write(json.dumps(row) + "\n")


@pytest.fixture
def tiny_settings(tmp_path: Path, tiny_bert: Path) -> dict[str, Any]:
    """The settings of `tiny_recipe`."""
    return tiny_recipe(tmp_path, tiny_bert)


def tiny_recipe(directory: Path, teacher: Path) -> dict[str, Any]:
    """Give the settings of a recipe that runs in seconds in this process; writes its data."""
    write_sentences(directory / "train.jsonl", count=48)
    write_sentences(directory / "dev.jsonl", count=16, offset=1000)
    return {
        "name": "tiny",
        "output_dir": str(directory / "outputs"),
        "model": {"teacher": str(teacher), "max_length": 16},
        "data": {
            "source": "files",
            "train": str(directory / "train.jsonl"),
            "dev": str(directory / "dev.jsonl"),
            "text_columns": "text",
            "label_column": "label",
        },
        "moe": {"num_experts": 2, "expert_size": 16, "num_shared_neurons": 8},
        "train": {"num_epochs": 1, "batch_size": 8, "log_every": 2, "learning_rate": 1e-3},
        "parallel": {"launcher": "local"},
        "tracking": {"enabled": False},
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A function that writes settings as a recipe file."""

    def write(settings: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
