"""A start model's tokenizer: read, and made to fit the model, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_dist.errors import ConversionError
from moe_dist.inference.silence import quiet_transformers
from moe_dist.inference.skeleton import UNTRUSTED

TOKENIZER = "tokenizer.json"
_ENDS_TEXTS = ("bart", "t5")
"""Families whose texts end with the end-of-sequence token."""
_CLASSIFIER = "ForSequenceClassification"
_END_USES = {
    _CLASSIFIER: "the model reads its answer there",
    "ForConditionalGeneration": "it ends the texts that the model writes",
}
"""What such a family needs that token for, by the end of its model's class."""
_SAVE_BOTH = "tokenizer.save_pretrained(DIRECTORY)"
MAX_UNKNOWN = 0.3


def read_tokenizer(source: str, revision: str | None = None) -> Any:
    """Read a start model's tokenizer, and none that transformers makes up.

    `source` is a directory or a name on the hub. One without a vocabulary is a ConversionError.
    """
    from transformers import AutoTokenizer

    remedy = (
        f"save it there, {_SAVE_BOTH}, or copy the files that came with the model, such as "
        f"{TOKENIZER}"
    )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **UNTRUSTED)
            tokenizer("a")
    # The tokenizers library raises plain Exception for damaged files.
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"model.teacher: the tokenizer of {source!r} cannot be read: {first_line}",
            remedy=remedy,
        ) from error
    # Without its files transformers makes a tokenizer of special tokens: every word is unknown.
    names = {TOKENIZER, *type(tokenizer).vocab_files_names.values()}
    directory = Path(source)
    has_files = (
        not type(tokenizer).vocab_files_names
        or not directory.is_dir()
        or any((directory / name).is_file() for name in names)
    )
    has_words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not has_files or not has_words:
        raise ConversionError(
            f"model.teacher: no tokenizer in {source!r}: "
            + (
                "its vocabulary holds no words"
                if has_files
                else f"none of the files {', '.join(sorted(names))} is there"
            ),
            remedy=remedy,
        )
    return tokenizer


def fit_tokenizer(tokenizer: Any, model: Any) -> list[str]:
    """See that a model can read what its tokenizer gives, and let both pad with one token.

    Args:
        tokenizer: gets a pad token where it has none; changed in place.
        model: its configuration gets the tokenizer's pad token; weights are not read.

    Returns:
        What was changed and is worth saying, a line each.

    Raises:
        ConversionError: if the tokenizer has tokens that the model has no embedding for, nothing
            to pad with, or does not end texts as the model needs it.
    """
    _check_size(tokenizer, model)
    check_end(tokenizer, model, "a")
    config = model.config
    lines = []
    if tokenizer.pad_token_id is None:
        use = _end_use(model)
        if tokenizer.eos_token_id is None or use:
            why = (
                "and no end-of-sequence token that could stand in"
                if tokenizer.eos_token_id is None
                else f"and {tokenizer.eos_token!r} cannot stand in, since {use}"
            )
            raise ConversionError(
                f"model.teacher: the tokenizer has no pad token, {why}",
                remedy=f"name a token of its vocabulary: tokenizer.pad_token = TOKEN; {_SAVE_BOTH}",
            )
        tokenizer.pad_token = tokenizer.eos_token
        lines.append(f"the tokenizer has no pad token: {tokenizer.eos_token!r} stands in")
    elif config.pad_token_id not in (None, tokenizer.pad_token_id):
        lines.append(
            f"config.json pads with token {config.pad_token_id} and the tokenizer with "
            f"{tokenizer.pad_token_id} ({tokenizer.pad_token!r}), which is taken"
        )
    config.pad_token_id = tokenizer.pad_token_id
    return lines


def check_end(tokenizer: Any, model: Any, *texts: str) -> None:
    """See that a text, or pair, ends with the token at which a classifier reads its answer.

    A tokenizer that puts no end token there is a ConversionError. No weights are read.
    """
    if _end_use(model) != _END_USES[_CLASSIFIER]:
        return
    end = model.config.eos_token_id
    ids = tokenizer(*texts)["input_ids"]
    if not ids or ids[-1] != end:
        sample = "pair of texts" if len(texts) > 1 else "text"
        raise ConversionError(
            f"model.teacher: the model reads its answer at the end-of-sequence token {end}, and "
            f"its tokenizer does not put that at the end of a {sample}",
            remedy="set eos_token_id in config.json to the tokenizer's, and let the tokenizer add "
            "it: tokenizers call that its post-processor",
        )


def unknown_share(tokenizer: Any, texts: Iterable[str]) -> float:
    """Give unknown tokens divided by all tokens of some texts (at least one; a few are enough)."""
    unknown = tokenizer.unk_token_id
    lists: Sequence[Sequence[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [one for row in lists for one in row]
    return sum(one == unknown for one in ids) / max(1, len(ids)) if unknown is not None else 0.0


def _end_use(model: Any) -> str:
    """Say what a model's end-of-sequence token is for beside ending texts; "" for nothing."""
    if model.config.model_type not in _ENDS_TEXTS:
        return ""
    name = type(model).__name__
    return next((use for end, use in _END_USES.items() if name.endswith(end)), "")


def _check_size(tokenizer: Any, model: Any) -> None:
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    beyond = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= num_embeddings
    )
    if beyond:
        names = ", ".join(repr(token) for _, token in beyond[:3])
        raise ConversionError(
            f"model.teacher: the tokenizer has {len(beyond)} tokens more ({names}) than the model "
            f"has embeddings ({num_embeddings})",
            remedy="give the model an embedding for each: "
            "model.resize_token_embeddings(len(tokenizer)); model.save_pretrained(DIRECTORY)",
        )
