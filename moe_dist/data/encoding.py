"""Tokenised rows: made once, cached, and read back through a memory map."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.data.tokens import tokenise
from moe_dist.digests import file_digest
from moe_dist.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2
_META = "encoded.json"
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Encoded:
    """Tokenised samples of unequal length, end to end in flat arrays.

    Attributes:
        input_ids: token ids of all samples (sum of lengths,), int32.
        token_type_ids: segment ids alike, int8; None if the tokenizer has none.
        offsets: sample i is [offsets[i], offsets[i+1]) (N+1,), int64.
        labels: class ids (int64) or values (float32) (N,).
        sample_ids: where the samples stood in the source (N,), int64.
        full_lengths: tokens of each sample before it was cut (N,), int64; None where not known.
    """

    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int8] | None
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64] | NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    full_lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample (N,)."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.offsets[-1])

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token id occurs, (vocab_size,)."""
        return np.bincount(self.input_ids, minlength=vocab_size).astype(np.int64)

    def draw(self, num_samples: int | None, *, seed: int) -> Encoded:
        """Some of the samples, drawn at random, in their own order; None gives all."""
        if num_samples is None or num_samples >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:num_samples].sort().values.numpy())

    def subset(self, positions: Sequence[int] | NDArray[np.int64]) -> Encoded:
        """Some of the samples, in the order given.

        Args:
            positions: of the samples.

        Returns:
            A copy with these samples.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Encoded(
            input_ids=self.input_ids[tokens],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            offsets=offsets,
            labels=self.labels[chosen],
            sample_ids=self.sample_ids[chosen],
            full_lengths=None if self.full_lengths is None else self.full_lengths[chosen],
        )


def encode(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache_dir: str | Path | None = None,
    digest: str = "",
) -> Encoded:
    """Tokenise rows once; later calls with the same rows and tokenizer read the cache.

    Args:
        dataset: columns text_a, text_b, label, sample_id, as `load_splits` gives.
        tokenizer: of the model.
        max_length: longer samples are cut (of a pair, the longer text first).
        cache_dir: the cache, or None for `default_cache_dir()`.
        digest: anything else that the cache entry shall depend on.

    Returns:
        The samples, memory-mapped read-only.

    Raises:
        DataError: if there are no rows, `max_length` leaves no room for text, a text becomes a
            special token, or the cache cannot be written.
    """
    if not len(dataset):
        raise DataError("there are no rows to tokenise", remedy="give a data set with rows")
    is_pair = dataset[0]["text_b"] is not None
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length < num_special + 1 + is_pair:
        raise DataError(
            f"model.max_length={max_length} leaves no room for text",
            remedy=f"set it to at least {num_special + 1 + is_pair}; 128 is usual",
        )
    key = hashlib.sha256()
    for part in (_FORMAT, digest, max_length, _tokenizer_state(tokenizer)):
        key.update(f"{part}\n".encode())
    for batch in dataset.iter(_CHUNK_ROWS):
        key.update(json.dumps(batch, sort_keys=True).encode())
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    final = build_once(
        root / "encoded" / key.hexdigest()[:32],
        lambda folder: _write(folder, _tokenise(dataset, tokenizer, max_length)),
        is_good=_is_whole,
    )
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in final.glob("*.npy")}
    return Encoded(token_type_ids=arrays.pop("token_type_ids", None), **arrays)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are the backend's state of the moment, not part of what it is.
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    names = (type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names)
    return json.dumps([names, tokenizer.special_tokens_map, state], sort_keys=True, default=str)


def _tokenise(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, NDArray[Any]]:
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    lengths: list[int] = []
    full_lengths: list[int] = []
    for batch in dataset.iter(_CHUNK_ROWS):
        pair = batch["text_b"] if batch["text_b"][0] is not None else None
        tokens = tokenise(tokenizer, batch["text_a"], pair, max_length=max_length)
        full_lengths.extend(
            _full_lengths(tokenizer, batch["text_a"], pair, tokens["input_ids"], max_length)
        )
        lengths.extend(map(len, tokens["input_ids"]))
        ids.append(np.concatenate([np.asarray(row, np.int32) for row in tokens["input_ids"]]))
        if "token_type_ids" in tokens:
            rows = tokens["token_type_ids"]
            types.append(np.concatenate([np.asarray(row, np.int8) for row in rows]))
    if min(lengths) == 0:
        raise DataError(
            "a text gives no tokens at all", remedy="drop empty texts; this tokenizer adds none"
        )
    label = dataset.features["label"].dtype
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": np.concatenate(ids),
        "offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        "labels": np.asarray(
            dataset["label"][:], np.float32 if label.startswith("float") else np.int64
        ),
        "sample_ids": np.asarray(dataset["sample_id"][:], np.int64),
        "full_lengths": np.asarray(full_lengths, np.int64),
    }
    if types:
        arrays["token_type_ids"] = np.concatenate(types)
    return arrays


def _full_lengths(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pair: list[str] | None,
    input_ids: list[list[int]],
    max_length: int,
) -> list[int]:
    """Count the tokens that samples had before they were cut; only whole rows can have been."""
    lengths = list(map(len, input_ids))
    full = [row for row, length in enumerate(lengths) if length >= max_length]
    if full:
        own_pair = None if pair is None else [pair[row] for row in full]
        again = tokenise(tokenizer, [texts[row] for row in full], own_pair, max_length=None)
        for row, ids in zip(full, again["input_ids"], strict=True):
            lengths[row] = len(ids)
    return lengths


def _write(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    hashes = {}
    for name, array in arrays.items():
        # Through a buffer: numpy's own writer turns a full disk into an error without a number.
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        path = folder / f"{name}.npy"
        path.write_bytes(buffer.getbuffer())
        hashes[path.name] = file_digest(path)
    (folder / _META).write_text(json.dumps({"format": _FORMAT, "files": hashes}))


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / _META).read_text())
        return meta["format"] == _FORMAT and all(
            file_digest(folder / name) == digest for name, digest in meta["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
