"""Texts become tokens, and what a text says never becomes a special token.

`</s>` in a text is four characters that somebody wrote. Tokenizers make of it the token that ends
a sequence, which models take for what it is not: BART refuses such a batch, BERT sees a pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = dict[str, list[list[int]]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pair: Sequence[str] | None = None,
    *,
    max_length: int | None,
    is_target: bool = False,
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

    Returns:
        input_ids, and token_type_ids where the tokenizer has them, unpadded.

    Raises:
        DataError: if a text becomes a special token all the same.
    """
    columns = [list(texts), *([] if pair is None else [list(pair)])]
    tokens = _call(tokenizer, columns, max_length, is_target)
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
    _replace(
        tokens, suspects, _call(tokenizer, asides, max_length, is_target, split_special_tokens=True)
    )
    limit = tokenizer.num_special_tokens_to_add(pair=pair is not None)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def still_special() -> list[int]:
        ids = tokens["input_ids"]
        return [row for row in suspects if sum(token in special for token in ids[row]) > limit]

    suspects = still_special()
    if suspects:
        asides = [[written.sub(_with_blank, column[row]) for row in suspects] for column in columns]
        _replace(
            tokens,
            suspects,
            _call(tokenizer, asides, max_length, is_target, split_special_tokens=True),
        )
        suspects = still_special()
    if suspects:
        text = " ".join(column[suspects[0]] for column in columns)
        found = written.search(text)
        assert found is not None, "suspects hold such a name"
        raise DataError(
            f"the text {text[max(0, found.start() - 20) :][:60]!r} holds {found[0]!r}, of which "
            f"this tokenizer ({type(tokenizer).__name__}) makes a special token",
            remedy="remove it from the texts, or use a fast tokenizer (tokenizer.json)",
        )
    return tokens


def _call(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[list[str]],
    max_length: int | None,
    is_target: bool,
    **options: Any,
) -> Tokens:
    names = ("text_target", "text_pair_target") if is_target else ("text", "text_pair")
    encoded = tokenizer(
        **dict(zip(names, columns, strict=False)),
        truncation="do_not_truncate" if max_length is None else "longest_first",
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        verbose=False,
        **options,
    )
    return {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}


def _replace(tokens: Tokens, rows: list[int], others: Tokens) -> None:
    for key, values in others.items():
        for row, value in zip(rows, values, strict=True):
            tokens[key][row] = value


def _with_blank(name: re.Match[str]) -> str:
    return f"{name[0][0]} {name[0][1:]}"
