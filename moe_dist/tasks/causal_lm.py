"""A language model that predicts each token from those before it.

Trained on blocks: documents one after the other, each ended by the end token, cut every so many
tokens. No document's first token is a target; attention does see the documents that stand earlier
in a block, as is usual in pre-training. Measured document by document in windows that overlap:
each token but the document's first is predicted once, with `max_length - stride` tokens before it
or more where the document has them.

A batch's `next_ids` are one more than the token that follows each position, and 0 where none is to
be predicted there.

Shapes: B samples, S positions, T targets, D width, V vocabulary, M documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_dist.errors import ConversionError, DataError
from moe_dist.tasks.kind import Answered, Figures, LabelKind, TokenRows
from moe_dist.tasks.token_kind import TokenKind, hides_tokens, unread_settings
from moe_dist.tasks.tokens import special_ids, tokenise

NUM_SERVED_TOKENS = 64
"""Tokens that a served model writes at most."""
_NEXT = "next_ids"
_CHARACTERS = 2**20
"""Tokenised at a time, since a tokenizer's own notes on a token take hundreds of bytes."""
Ids = NDArray[np.int32]


class CausalLM(TokenKind):
    """Targets are the tokens that follow each position; see `TokenKind`."""

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    label: ClassVar[LabelKind] = "none"
    metrics = ("perplexity", "word_perplexity", "bits_per_byte")
    default_metrics = metrics
    unit = "document"
    served_columns: ClassVar[Mapping[str, str]] = MappingProxyType({"text": "text"})
    columns = ("nll", "tokens", "words", "bytes")
    text_columns = ("text",)
    option_names = ("documents", "stride")
    measuring_options = ("stride",)
    is_one_a_row = False
    # Who lets it write goes on from the end of a text.
    pads_right = False
    reads_pairs = False
    takes_encoders = False
    reads_nothing = True
    takes_encoder_decoders = False

    def owns(self, architecture: str, config: Any) -> bool:
        """A decoder with its language-model head."""
        return architecture.endswith(("LMHeadModel", "ForCausalLM"))

    def needs_all_rows(self, *, is_training: bool) -> bool:
        """Blocks go on from one document to the next."""
        return True

    def check_model(self, model: Any, tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
        """See that there is a token to end documents with, and say which."""
        _end_id(tokenizer)
        return [f"{tokenizer.eos_token!r} stands between documents"]

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Cut all documents together into blocks, or each into windows.

        Labels to measure on are the words and bytes of what is predicted of a document, in its
        first window, and 0 in the others.
        """
        documents = list(_token_ids(tokenizer, rows["text_a"]))
        if is_training:
            pieces = list(_blocks(documents, _end_id(tokenizer), max_length))
            labels: list[Any] = [0] * len(pieces)
        else:
            stride = options.get("stride") or default_stride(max_length)
            special = sorted(special_ids(tokenizer))
            pieces = list(_windows(documents, special, max_length, stride))
            if not pieces:
                raise DataError(
                    "no dev text has two tokens, so there is nothing to predict",
                    remedy="give data.dev longer texts",
                )
            labels = [(0, 0)] * len(pieces)
            own = [row for row, _, _ in pieces]
            for row, first in zip(*np.unique(own, return_index=True), strict=True):
                predicted = _predicted(tokenizer, rows["text_a"][row], documents[row])
                labels[first] = (len(predicted.split()), len(predicted.encode("utf-8")))
        return TokenRows(
            input_ids=[ids for _, ids, _ in pieces],
            rows=[row for row, _, _ in pieces],
            labels=labels,
            columns={_NEXT: [next_ids for _, _, next_ids in pieces]},
            num_targets=[int(np.count_nonzero(next_ids)) for _, _, next_ids in pieces],
        )

    def target_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Positions whose next token is to be predicted, (B, S) bool."""
        return batch[_NEXT] > 0

    def target_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The tokens that follow them, in the order of samples and positions."""
        return batch[_NEXT][self.target_mask(batch)] - 1

    def answer(
        self, model: nn.Module, batch: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> Tensor:
        """Negative log-likelihood of a sample's targets, and their number; (B, 2)."""
        predictions = self.predictions(model, self.run(model, batch), batch)
        counts_B = self.target_mask(batch).sum(dim=1)
        return torch.stack([self.losses(predictions, batch), counts_B.float()], dim=1)

    def serve(
        self,
        model: Any,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        *,
        max_length: int,
        label_names: Sequence[str] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
        calibration: float | None = None,
    ) -> list[dict[str, Any]]:
        """The likeliest continuation of each text, token by token; see `TaskKind.serve`.

        Of a long text the last tokens are read, behind its begin token where it has one, so many
        that the model has positions for all that it writes.
        """
        limit = self.served_limit(model, max_length)
        ids = tokenise(tokenizer, columns[0], max_length=None)["input_ids"]
        prompts = [_last(own, limit, tokenizer.bos_token_id) or [_end_id(tokenizer)] for own in ids]
        width = max(map(len, prompts))
        mask_BS = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts])
        ids_BS = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(own)) + own for own in prompts]
        )
        with torch.no_grad():
            written_BL = model.generate(
                input_ids=ids_BS.to(model.device),
                attention_mask=mask_BS.to(model.device),
                **dict.fromkeys(unread_settings(model))
                | {
                    "max_new_tokens": NUM_SERVED_TOKENS,
                    "do_sample": False,
                    "num_beams": 1,
                    "pad_token_id": tokenizer.pad_token_id,
                    "eos_token_id": _end_id(tokenizer),
                    "use_cache": not hides_tokens(model.config),
                },
            )
        texts = tokenizer.batch_decode(written_BL[:, width:], skip_special_tokens=True)
        return [{"text": text} for text in texts]

    def served_limit(self, model: Any, max_length: int) -> int:
        """Leave room for what is written behind the text."""
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        return max(1, min(max_length, positions - NUM_SERVED_TOKENS))

    def figures(self, answered: Answered) -> Figures:
        """Add the windows of each document up; see `tokens` for words and bytes."""
        numbers = np.asarray(answered.rows["sample_id"], np.int64)
        places = {number: row for row, number in enumerate(numbers.tolist())}
        rows = [places[number] for number in answered.sample_ids.tolist()]
        values = np.zeros((len(numbers), len(self.columns)))
        own = np.concatenate([answered.raw, answered.labels], axis=1, dtype=np.float64)
        np.add.at(values, rows, own)
        return Figures(values.astype(np.float32), np.zeros(len(numbers), np.int64), numbers)


def default_stride(max_length: int) -> int:
    """Half a window: each token has half a window before it, and is computed twice."""
    return max(1, max_length // 2)


def _end_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConversionError(
            "model.teacher: the tokenizer has no end token, which is to stand between documents",
            remedy="name one of its vocabulary: tokenizer.eos_token = TOKEN; "
            "tokenizer.save_pretrained(DIRECTORY)",
        )
    return int(tokenizer.eos_token_id)


def _last(ids: list[int], limit: int, begin_id: int | None) -> list[int]:
    """The end of a text, behind its begin token."""
    if len(ids) <= limit:
        return ids
    begin = ids[:1] if limit > 1 and ids[0] == begin_id else []
    return begin + ids[len(begin) - limit :]


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> Iterator[Ids]:
    """Tokenise documents whole, some at a time."""
    ends = np.cumsum([len(text) for text in texts]) // _CHARACTERS
    for _, rows in groupby(range(len(texts)), key=lambda row: int(ends[row])):
        part = [texts[row] for row in rows]
        for ids in tokenise(tokenizer, part, max_length=None)["input_ids"]:
            yield np.asarray(ids, np.int32)


def _predicted(tokenizer: Any, text: str, ids: Ids) -> str:
    """A document without its first token, which has none before it to be predicted from."""
    if ids[0] in special_ids(tokenizer):
        return text
    first = tokenizer.decode(ids[:1])
    # Some tokenizers drop a blank in front, and a token may be a part of a character.
    start = text.find(first, 0, len(first) + 1)
    return text[start + len(first) if start >= 0 else 1 :]


def _blocks(
    documents: Sequence[Ids], end_id: int, max_length: int
) -> Iterator[tuple[int, Ids, Ids]]:
    """Give each block's first document, its tokens and its `next_ids`.

    The last block may be shorter; all together less than one block is a DataError.
    """
    ended = [ids if ids[-1] == end_id else np.append(ids, end_id) for ids in documents if len(ids)]
    numbers = [row for row, ids in enumerate(documents) if len(ids)]
    lengths = np.array([len(ids) for ids in ended], np.int64)
    if lengths.sum() < max_length:
        raise DataError(
            f"all training texts together have {lengths.sum()} tokens, fewer than one block of "
            f"model.max_length={max_length}",
            remedy="give more text, or lower model.max_length",
        )
    stream = np.concatenate(ended)
    starts = np.cumsum(lengths) - lengths
    next_ids = np.append(stream[1:] + 1, 0)
    next_ids[starts[1:] - 1] = 0
    for begin in range(0, len(stream), max_length):
        part = slice(begin, begin + max_length)
        if next_ids[part].any():
            row = int(np.searchsorted(starts, begin, side="right")) - 1
            yield numbers[row], stream[part], next_ids[part]


def _windows(
    documents: Sequence[Ids], special: Sequence[int], max_length: int, stride: int
) -> Iterator[tuple[int, Ids, Ids]]:
    """Give each window's document, its tokens and its `next_ids`.

    Tokens that a tokenizer puts around a text are read and not predicted.
    """
    for row, ids in enumerate(documents):
        next_ids = np.where(np.isin(ids[1:], special), 0, ids[1:] + 1)
        end = 0
        for begin in range(0, len(next_ids), stride):
            own = next_ids[begin : begin + max_length].copy()
            own[: end - begin] = 0
            end = begin + len(own)
            if own.any():
                yield row, ids[begin:end], own
            if end == len(next_ids):
                break
