"""A text for each sample: summaries, answers in words, translations.

Shapes: B samples, S source tokens, T target tokens, V vocabulary, L tokens written, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.errors import ConversionError
from moe_dist.tasks.kind import (
    IGNORED,
    Answered,
    Figures,
    LabelKind,
    TokenRows,
    full_lengths,
)
from moe_dist.tasks.text_scores import (
    ANSWER_COLUMNS,
    CHRF_COLUMNS,
    ROUGE_COLUMNS,
    answer_figures,
    chrf_figures,
    rouge_figures,
)
from moe_dist.tasks.token_kind import TokenKind, hides_tokens, unread_settings
from moe_dist.tasks.tokens import pad, tokenise

UNFINISHED = "unfinished"
"""Column: 1 where an output was cut at `max_target_length`, since it had no end."""


@dataclass(frozen=True)
class Seq2SeqOptions:
    """What a recipe's data section says of targets and of how they are written.

    Args:
        source_prefix: put before the text, or before each of two.
        max_target_length: tokens after which a target is cut, and writing ends.
        num_beams: of the search.
        length_penalty: exponent of the length that a beam's score is divided by.
        no_repeat_ngram_size: no sequence of so many tokens is written twice; 0 allows it.
        early_stopping: end as soon as there are as many whole outputs as beams.
    """

    source_prefix: tuple[str, ...] = ()
    max_target_length: int = 64
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    early_stopping: bool = True


OPTION_NAMES = tuple(Seq2SeqOptions.__dataclass_fields__)


class Seq2Seq(TokenKind):
    """Labels are texts that an encoder-decoder is to write."""

    name = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"
    label: ClassVar[LabelKind] = "text"
    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "answer_f1", "chrf")
    default_metrics = ("rougeL", "rouge1", "rouge2")
    columns = (*ROUGE_COLUMNS, *ANSWER_COLUMNS, *CHRF_COLUMNS, UNFINISHED)
    option_names = OPTION_NAMES
    measuring_options = OPTION_NAMES[2:]
    writes = True
    served_columns: ClassVar[Mapping[str, str]] = MappingProxyType({"text": "text"})

    def owns(self, architecture: str, config: Any) -> bool:
        """Every encoder-decoder with a head over its vocabulary."""
        return architecture.endswith("ForConditionalGeneration")

    def check_model(self, model: Any, tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
        """Refuse what could not begin or end a text, or has no place for one."""
        config, limit = model.config, _options(options).max_target_length
        if config.decoder_start_token_id is None:
            raise ConversionError(
                "model.teacher: its config.json names no decoder_start_token_id, with which every "
                "text that it writes begins",
                remedy="set it, for T5 to pad_token_id and for BART to eos_token_id",
            )
        ids = tokenise(tokenizer, ["a"], max_length=None, is_target=True)["input_ids"][0]
        if config.eos_token_id is None or not ids or ids[-1] != config.eos_token_id:
            raise ConversionError(
                f"model.teacher: its texts end with token {config.eos_token_id}, and its tokenizer "
                "does not put that at the end of a target, so that nothing it learns to write "
                "would end",
                remedy="set eos_token_id in config.json to the tokenizer's, and let the tokenizer "
                "add it: tokenizers call that its post-processor",
            )
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and limit > positions:
            raise ConversionError(
                f"data.max_target_length: {limit} is more than the {positions} positions that the "
                "model has",
                remedy=f"set it to {positions} or less",
            )
        unread = unread_settings(model)
        shown = ", ".join(f"{name}={value}" for name, value in sorted(unread.items()))
        return (
            [f"not used of its generation_config.json: {shown}; the recipe's data section says it"]
            if unread
            else []
        )

    def target_limit(self, options: Mapping[str, Any]) -> int:
        """Tokens after which targets are cut, and writing ends."""
        return _options(options).max_target_length

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Make a sample of each row: its texts as one source, its label as target."""
        own = _options(options)
        pair = rows["text_b"] if rows["text_b"][0] is not None else None
        sources = join_sources(rows["text_a"], pair, own.source_prefix)
        targets = list(rows["label"])
        limit = own.max_target_length
        read = tokenise(tokenizer, sources, max_length=max_length)["input_ids"]
        written = tokenise(tokenizer, targets, max_length=limit, is_target=True)["input_ids"]
        return TokenRows(
            input_ids=read,
            rows=range(len(sources)),
            labels=[0] * len(sources),
            targets=written,
            num_targets=list(map(len, written)),
            full_lengths=full_lengths(tokenizer, sources, None, read, max_length),
            full_target_lengths=full_lengths(
                tokenizer, targets, None, written, limit, is_target=True
            ),
        )

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sources, and targets as the decoder reads them: each token one place later."""
        shift: Any = model.prepare_decoder_input_ids_from_labels
        targets_BT = batch["targets"]
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": shift(labels=targets_BT),
            "decoder_attention_mask": self.target_mask(batch).to(targets_BT.dtype),
        }

    def target_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which places of the targets are no padding, (B, T) bool."""
        return batch["targets"] != IGNORED

    def target_ids(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The target tokens, in the order of samples."""
        return batch["targets"][self.target_mask(batch)]

    def answer(
        self, model: nn.Module, batch: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> Tensor:
        """Write a text for each source: (B, L) token ids, `IGNORED` after the end.

        Ids are whole numbers below 2**24, which float32 holds exactly.
        """
        return write(model, batch, options).float()

    def generation(self, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the recipe's search, or of the likeliest token each time."""
        return generation_settings(model, options)

    def figures(self, answered: Answered) -> Figures:
        """Compare each text with its reference; the columns are `columns`."""
        ids_NL = answered.raw.astype(np.int64)
        texts = read_texts(answered.tokenizer, ids_NL)
        references = [[reference] for reference in answered.rows["label"]]
        is_whole_N = (ids_NL == answered.tokenizer.eos_token_id).any(axis=1)
        parts = (
            rouge_figures(texts, references),
            answer_figures(texts, references),
            chrf_figures(texts, references),
            ~is_whole_N[:, None],
        )
        values = np.concatenate(parts, axis=1).astype(np.float32)
        return Figures(values, answered.labels, answered.sample_ids, texts=texts)

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
        """The text that a search writes for each source; see `TaskKind.serve`."""
        tokens = tokenise(tokenizer, _sources(columns, options), max_length=max_length)
        encoded = pad(tokenizer, tokens).to(model.device)
        with torch.no_grad():
            ids_NL = self.answer(model, encoded, options).long().cpu().numpy()
        return [{"text": text} for text in read_texts(tokenizer, ids_NL)]

    def served_lengths(
        self,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Count the tokens of each source, its prefix among them."""
        return super().served_lengths(tokenizer, [_sources(columns, options)])

    def remarks(self, values: NDArray[np.float32], options: Mapping[str, Any]) -> list[str]:
        """Say how many outputs were cut."""
        num_cut = int(values[:, self.columns.index(UNFINISHED)].sum())
        limit = _options(options).max_target_length
        return (
            [
                f"{num_cut} of {len(values)} outputs had no end after "
                f"data.max_target_length={limit} tokens and were cut there"
            ]
            if num_cut
            else []
        )


def write(model: Any, batch: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Let a model write a text for each source, by beam search: (B, L) ids.

    `IGNORED` follows the end-of-sequence token. On several ranks all of them make equally many
    forward calls, since those that hold experts for others must answer until the last is done.
    """
    limit = _options(options).max_target_length
    written = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        synced_gpus=_num_ranks() > 1,
        **dict.fromkeys(unread_settings(model)) | generation_settings(model, options),
    )
    # The first token is the decoder's start, which some models end with too.
    ids_BT = written[:, 1:]
    ids_BL = functional.pad(ids_BT, (0, limit - ids_BT.shape[1]), value=IGNORED)
    is_end = (ids_BL == model.config.eos_token_id).long()
    return ids_BL.masked_fill(is_end.cumsum(dim=1) - is_end > 0, IGNORED)


def generation_settings(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's `generate()` is told, so that it writes as a recipe says."""
    own = _options(options)
    settings = {
        "num_beams": own.num_beams,
        "max_new_tokens": own.max_target_length,
        "no_repeat_ngram_size": own.no_repeat_ngram_size,
        "do_sample": False,
        "eos_token_id": model.config.eos_token_id,
        "use_cache": not hides_tokens(model.config),
        # An end that is forced could not be told from one that the model wrote.
        "forced_eos_token_id": None,
    }
    # transformers warns of what a search without beams does not read.
    if own.num_beams == 1:
        return settings
    return settings | {
        "length_penalty": own.length_penalty,
        "early_stopping": own.early_stopping,
    }


def read_texts(tokenizer: Any, ids_NL: NDArray[np.int64]) -> list[str]:
    """Turn what `write` gives into texts, without special tokens and blanks around them."""
    rows = [ids_L[ids_L != IGNORED].tolist() for ids_L in ids_NL]
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _num_ranks() -> int:
    is_one = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return 1 if is_one else torch.distributed.get_world_size()


def _options(options: Mapping[str, Any]) -> Seq2SeqOptions:
    return Seq2SeqOptions(**{name: options[name] for name in OPTION_NAMES if name in options})


def _sources(columns: Sequence[Sequence[str]], options: Mapping[str, Any]) -> list[str]:
    pair = columns[1] if len(columns) > 1 else None
    return join_sources(columns[0], pair, _options(options).source_prefix)


def join_sources(
    texts: Sequence[str], pair: Sequence[str | None] | None, prefix: Sequence[str]
) -> list[str]:
    """Make one source of the one or two texts of each row, each behind its prefix."""
    first, second = (*prefix, "", "")[:2]
    if pair is None:
        return [f"{first}{text}" for text in texts]
    return [f"{first}{text} {second}{other}" for text, other in zip(texts, pair, strict=True)]
