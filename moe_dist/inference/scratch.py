"""Small models with random weights, for training from nothing: `model.teacher: scratch:NAME`.

The tokenizer is a byte-level BPE that is learned on the training texts, so it has no unknown words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_dist.data.cache import build_once, default_cache_dir, is_whole, note_digests
from moe_dist.errors import ConversionError
from moe_dist.inference.silence import quiet_transformers

if TYPE_CHECKING:
    from moe_dist.data.mixture import Rows

SCRATCH_PREFIX = "scratch:"
_FORMAT = 1
_META = "scratch.json"
_VOCAB_SIZE = 4096
_BATCH_ROWS = 1024
_POSITIONS = 1024


@dataclass(frozen=True)
class ScratchModel:
    """One small architecture.

    Attributes:
        config_class: of transformers.
        model_class: the class that is saved; a task's own loads its body.
        sizes: of the configuration.
        special: the tokenizer's special tokens by their role; the first ids.
        single: what surrounds a text `$A`; empty for nothing.
        pair: what surrounds a pair of texts.
        starts_with: role of the token that a decoder is started with; empty without one.
    """

    config_class: str
    model_class: str
    sizes: dict[str, Any]
    special: dict[str, str]
    single: str = ""
    pair: str = ""
    starts_with: str = ""


SCRATCH_MODELS: dict[str, ScratchModel] = {
    "tiny-gpt2": ScratchModel(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_inner": 768, "n_positions": _POSITIONS},
        {"pad_token": "<pad>", "eos_token": "<|endoftext|>"},
    ),
    "tiny-t5": ScratchModel(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 192,
            "d_kv": 32,
            "d_ff": 768,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 6,
        },
        {"pad_token": "<pad>", "eos_token": "</s>"},
        single="$A </s>",
        pair="$A </s> $B </s>",
        starts_with="pad_token",
    ),
    "tiny-bart": ScratchModel(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 192,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_ffn_dim": 768,
            "decoder_ffn_dim": 768,
            "encoder_attention_heads": 6,
            "decoder_attention_heads": 6,
            "max_position_embeddings": _POSITIONS,
            "forced_eos_token_id": None,
        },
        {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        starts_with="eos_token",
    ),
}


def scratch_model(name: str, rows: Rows, *, seed: int, cache_dir: Path | None = None) -> Path:
    """Make a small model with random weights, and a tokenizer learned on the training texts.

    Args:
        name: a key of `SCRATCH_MODELS`.
        rows: whose training texts (and labels, where they are texts) the tokenizer learns.
        seed: of the weights.
        cache_dir: the cache, or None for `default_cache_dir()`.

    Returns:
        A directory as `save_pretrained` writes it, made once.

    Raises:
        ConversionError: if there is no such model.
    """
    if name not in SCRATCH_MODELS:
        raise ConversionError(
            f"model.teacher: {SCRATCH_PREFIX}{name} is no model that is made from nothing",
            remedy=f"choose from {', '.join(map(_with_prefix, SCRATCH_MODELS))}",
        )
    key = hashlib.sha256(f"{_FORMAT} {name} {SCRATCH_MODELS[name]} {seed}\n".encode())
    for texts in _texts(rows):
        key.update(json.dumps(texts).encode())
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    return build_once(
        root / "scratch" / f"{name}-{key.hexdigest()[:32]}",
        lambda folder: _build(folder, SCRATCH_MODELS[name], _texts(rows), seed),
        is_good=lambda folder: is_whole(folder, _META, _FORMAT),
    )


def scratch_line(teacher: str) -> str | None:
    """Say in a line what a start model is that is made from nothing; None for any other."""
    if not teacher.startswith(SCRATCH_PREFIX):
        return None
    return (
        f"{teacher} has random weights by the seed, and a byte-level tokenizer of at most "
        f"{_VOCAB_SIZE} tokens that is learned on the training texts; it has learned nothing yet"
    )


def _with_prefix(name: str) -> str:
    return SCRATCH_PREFIX + name


def _texts(rows: Rows) -> Iterator[Sequence[str]]:
    """All training texts, in batches: first and second ones, and labels that are texts."""
    for splits in rows.parts.values():
        written = ("label",) if splits.task.task_kind.label == "text" else ()
        for batch in splits.train.iter(_BATCH_ROWS):
            for column in ("text_a", "text_b", *written):
                if batch[column][0] is not None:
                    yield batch[column]


def _build(folder: Path, spec: ScratchModel, texts: Iterable[Sequence[str]], seed: int) -> None:
    import transformers

    tokenizer = _learn_tokenizer(spec, texts)
    ids = {f"{role}_id": tokenizer.convert_tokens_to_ids(one) for role, one in spec.special.items()}
    start = {"decoder_start_token_id": ids[f"{spec.starts_with}_id"]} if spec.starts_with else {}
    # GPT-2's configuration has ids of its own for what the tokenizer lacks.
    missing = {"bos_token_id": None} if "bos_token" not in spec.special else {}
    config = getattr(transformers, spec.config_class)(
        vocab_size=len(tokenizer), **(missing | ids | start | spec.sizes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, spec.model_class)(config)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note_digests(folder, _META, _FORMAT)


def _learn_tokenizer(spec: ScratchModel, texts: Iterable[Sequence[str]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(spec.special.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text for batch in texts for text in batch),
        trainers.BpeTrainer(
            vocab_size=_VOCAB_SIZE,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if spec.single:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=spec.single,
            pair=spec.pair,
            special_tokens=[(token, special.index(token)) for token in special],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **spec.special)
