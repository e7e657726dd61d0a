"""Tiny encoder-decoders with tokenizers of words, and rows of texts with titles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = tuple(
    "the film was a good bad great awful fine dull and it plot acting music scene very not "
    "quite summarize question context :".split()
)
FAMILIES = ("t5", "bart")


def tiny_tokenizer(family: str) -> Any:
    """Words as tokens; BART's texts begin with <s>, and both families' end with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    is_bart = family == "bart"
    special = ["<s>", "<pad>", "</s>", "<unk>"] if is_bart else ["<pad>", "</s>", "<unk>"]
    ids = {token: index for index, token in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if is_bart else "$A </s>",
        special_tokens=[(token, ids[token]) for token in special if token in ("<s>", "</s>")],
    )
    begin = {"bos_token": "<s>"} if is_bart else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **begin,
    )


def tiny_writer(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random encoder-decoder without dropout, two layers of width 16 on each side."""
    import transformers as hf

    torch.manual_seed(seed)
    if family == "t5":
        sizes: dict[str, Any] = {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }
        model: Any = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=28, **sizes | changes))
    else:
        sizes = {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        }
        model = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=28, **sizes | changes))
    # Large enough for differences to show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def write_writer(directory: Path, family: str, **changes: Any) -> Path:
    """Save model and tokenizer."""
    tiny_writer(family, **changes).save_pretrained(directory)
    tiny_tokenizer(family).save_pretrained(directory)
    return directory


def titled_rows(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Texts of 3 to 6 words, whose titles are their first words."""
    rows = []
    for number in range(offset, offset + count):
        steps = (1, 3, 5, 7, 11, 2)[: 3 + number % 4]
        words = [WORDS[(number * step + step) % 19] for step in steps]
        words[0] = WORDS[number % 19]
        rows.append({"text": " ".join(words), "title": " ".join(words[: 1 + number % 3])})
    return rows


def write_titles(path: Path, count: int, offset: int = 0) -> str:
    """Write rows as JSON lines, and give the path."""
    lines = map(json.dumps, titled_rows(count, offset))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def columns(rows: list[dict[str, str]], **more: list[Any]) -> dict[str, list[Any]]:
    """Rows as a kind of task takes them."""
    found: dict[str, list[Any]] = {
        "text_a": [row["text"] for row in rows],
        "text_b": [None] * len(rows),
        "label": [row["title"] for row in rows],
        "sample_id": list(range(len(rows))),
    }
    return found | more
