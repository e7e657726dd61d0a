"""Texts become tokens, and what a text says never becomes a special token.

`</s>` in a text is four characters that somebody wrote. Tokenizers make of it the token that ends
a sequence, which models take for what it is not: BART refuses such a batch, BERT sees a pair.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_dist.errors import ConversionError, DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Tokens = dict[str, list[list[int]]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pair: Sequence[str] | None = None,
    *,
    max_length: int | None,
    is_target: bool = False,
    with_offsets: bool = False,
) -> Tokens:
    """Tokenise texts, or pairs of texts.

    Rows that hold the name of a special token are tokenised with `split_special_tokens`; where a
    tokenizer knows the name all the same, as a word of its vocabulary, with a blank inside it.

    Args:
        tokenizer: of the model.
        texts: one for each row.
        pair: second texts.
        max_length: longer rows are cut (of a pair, the longer text first); None cuts none.
        is_target: they are to be written and not read, which a few tokenizers tell apart.
        with_offsets: also say of each token where it comes from.

    Returns:
        input_ids, and token_type_ids where the tokenizer has them, unpadded. With offsets also
        `text` (0 or 1, and -1 for what the template adds), and the characters `start` and `end`
        in that text.

    Raises:
        DataError: if a text becomes a special token all the same.
        ConversionError: if offsets are asked of a tokenizer that has none.
    """
    if with_offsets and not tokenizer.is_fast:
        raise ConversionError(
            f"model.teacher: its tokenizer ({type(tokenizer).__name__}) does not say which "
            "characters a token comes from",
            remedy="give a fast tokenizer (tokenizer.json)",
        )
    columns = [list(texts), *([] if pair is None else [list(pair)])]
    tokens = _call(tokenizer, columns, max_length, is_target, with_offsets)
    names = sorted(map(str, tokenizer.all_special_tokens), key=len, reverse=True)
    if not names:
        return tokens
    written = re.compile("|".join(map(re.escape, names)))
    suspects = [
        row
        for row, parts in enumerate(zip(*columns, strict=True))
        if any(map(written.search, parts))
    ]
    if not suspects:
        return tokens
    asides = [[column[row] for row in suspects] for column in columns]
    options = (max_length, is_target, with_offsets, True)
    _replace(tokens, suspects, _call(tokenizer, asides, *options))
    limit = tokenizer.num_special_tokens_to_add(pair=pair is not None)
    special = special_ids(tokenizer)

    def still_special() -> list[int]:
        ids = tokens["input_ids"]
        return [row for row in suspects if sum(token in special for token in ids[row]) > limit]

    suspects = still_special()
    if suspects:
        asides = [[written.sub(_with_blank, column[row]) for row in suspects] for column in columns]
        found = _call(tokenizer, asides, *options)
        if with_offsets:
            blanks = [
                [[match.start() + 1 for match in written.finditer(column[row])] for row in suspects]
                for column in columns
            ]
            _without_blanks(found, blanks)
        _replace(tokens, suspects, found)
        suspects = still_special()
    if suspects:
        text = " ".join(column[suspects[0]] for column in columns)
        name = written.search(text)
        assert name is not None, "suspects hold such a name"
        raise DataError(
            f"the text {text[max(0, name.start() - 20) :][:60]!r} holds {name[0]!r}, of which "
            f"this tokenizer ({type(tokenizer).__name__}) makes a special token",
            remedy="remove it from the texts, or use a fast tokenizer (tokenizer.json)",
        )
    return tokens


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that no text becomes; an unknown one stands for something that was written."""
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def pad(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> BatchEncoding:
    """Join rows to tensors, shorter ones filled up on the right whatever the tokenizer says.

    Samples are padded so in training and measuring, and some models number positions from there.
    """
    return tokenizer.pad(tokens, padding_side="right", return_tensors="pt")


def _call(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[list[str]],
    max_length: int | None,
    is_target: bool,
    with_offsets: bool,
    splits_special: bool = False,
) -> Tokens:
    names = ("text_target", "text_pair_target") if is_target else ("text", "text_pair")
    options = {"split_special_tokens": True} if splits_special else {}
    encoded = tokenizer(
        **dict(zip(names, columns, strict=False)),
        truncation="do_not_truncate" if max_length is None else "longest_first",
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        return_offsets_mapping=with_offsets,
        verbose=False,
        **options,
    )
    tokens: Tokens = {
        key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded
    }
    if with_offsets:
        rows = encoded["offset_mapping"]
        tokens["text"] = [
            [-1 if text is None else text for text in encoded.sequence_ids(row)]
            for row in range(len(rows))
        ]
        tokens["start"] = [[start for start, _ in row] for row in rows]
        tokens["end"] = [[end for _, end in row] for row in rows]
    return tokens


def _replace(tokens: Tokens, rows: list[int], others: Tokens) -> None:
    for key, values in others.items():
        for row, value in zip(rows, values, strict=True):
            tokens[key][row] = value


def _with_blank(name: re.Match[str]) -> str:
    return f"{name[0][0]} {name[0][1:]}"


def _without_blanks(tokens: Tokens, blanks: Sequence[Sequence[Sequence[int]]]) -> None:
    """Let offsets count the characters of texts as they were before blanks were put in.

    `blanks` has for each text of a row the characters before which there is one, ascending.
    """
    for row, texts in enumerate(tokens["text"]):
        # In the text with blanks the n-th one stands n characters further to the right.
        shifted = [[at + n for n, at in enumerate(column[row])] for column in blanks]
        for key in ("start", "end"):
            tokens[key][row] = [
                at - bisect_left(shifted[text], at) if text >= 0 else at
                for text, at in zip(texts, tokens[key][row], strict=True)
            ]
