"""Directories of tiny classifiers, as save_pretrained writes them, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training.tiny_task import BAD, GOOD, PLAIN

WORDS = [*GOOD, *BAD, *PLAIN]
SPECIAL = {
    "bert": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    },
    "gpt2": {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bart": {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
_PATTERN = {"bert": "[CLS] $A [SEP]", "t5": "$A </s>", "bart": "<s> $A </s>"}


def write_start_model(
    directory: Path,
    family: str = "bert",
    *,
    kind: str = "ForSequenceClassification",
    **changes: Any,
) -> Path:
    """Write a random model with two layers (or one in each stack), and its tokenizer."""
    write_tokenizer(directory, family)
    torch.manual_seed(0)
    build_model(family, kind, **changes).save_pretrained(directory)
    return directory


def build_model(family: str, kind: str = "ForSequenceClassification", **changes: Any) -> Any:
    """Build a random model of a family."""
    import transformers

    special = list(SPECIAL[family].values())
    ids = {f"{name}_id": special.index(token) for name, token in SPECIAL[family].items()}
    ids = {key: value for key, value in ids.items() if key[:3] in ("pad", "eos", "bos")}
    sizes: dict[str, dict[str, Any]] = {
        "bert": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 32},
        "t5": {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": ids["pad_token_id"],
        },
        "bart": {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 32,
            "decoder_start_token_id": ids.get("eos_token_id"),
            "num_labels": 2,
        },
    }
    name = {"bert": "Bert", "gpt2": "GPT2", "t5": "T5", "bart": "Bart"}[family]
    vocab_size = len(special) + len(WORDS)
    config = getattr(transformers, f"{name}Config")(
        **({"vocab_size": vocab_size} | ids | sizes[family] | changes)
    )
    return getattr(transformers, f"{name}{kind}")(config)


def write_tokenizer(directory: Path, family: str, *, without: tuple[str, ...] = ()) -> None:
    """Write a tokenizer of whole words, with the family's special tokens but those left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    special = list(SPECIAL[family].values())
    words = [*special, *WORDS]
    unknown = SPECIAL[family]["unk_token"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if family in _PATTERN:
        pattern = _PATTERN[family]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern,
            special_tokens=[(word, words.index(word)) for word in pattern.split() if word != "$A"],
        )
    named = {name: word for name, word in SPECIAL[family].items() if name not in without}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)


def edit_weights(
    directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> None:
    """Write a model's weights anew as a function returns them."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = {name: one.contiguous() for name, one in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    """Change entries of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_tokenizer(directory: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Delete the tokenizer's files."""
    for path in directory.iterdir():
        if path.name not in (*keep, "config.json", "model.safetensors"):
            path.unlink()
