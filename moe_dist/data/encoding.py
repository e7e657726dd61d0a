"""Tokenised rows: made once, cached, and read back through a memory map."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_dist.data.cache import build_once, default_cache_dir, is_whole, note_digests
from moe_dist.errors import DataError
from moe_dist.tasks import TASK_KINDS, TaskKind, TokenRows
from moe_dist.tasks.kind import Ragged

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FORMAT = 4
_META = "encoded.json"
_CHUNK_ROWS = 4096
_COLUMN = "column-"


@dataclass(frozen=True)
class Encoded:
    """Tokenised samples of unequal length, end to end in flat arrays.

    Attributes:
        input_ids: token ids of all samples (sum of lengths,), int32.
        token_type_ids: segment ids alike, int8; None if the tokenizer has none.
        offsets: sample i is [offsets[i], offsets[i+1]) (N+1,), int64.
        labels: class ids (int64) or values (float32) (N,), or several of each sample (N, ...).
        sample_ids: where the samples stood in the source (N,), int64.
        full_lengths: tokens of each sample before it was cut (N,), int64; None where not known.
        columns: what else a kind of task keeps of each token (sum of lengths,), by name.
        targets: tokens that are to be written, of all samples, int32; None where none are.
        target_offsets: those of sample i are [target_offsets[i], target_offsets[i+1]) (N+1,).
        num_targets: of each sample, what its task loss is a sum over (N,); None for 1 each.
        full_target_lengths: tokens of each sample's target before it was cut (N,).
    """

    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int8] | None
    offsets: NDArray[np.int64]
    labels: NDArray[Any]
    sample_ids: NDArray[np.int64]
    full_lengths: NDArray[np.int64] | None = None
    columns: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    targets: NDArray[np.int32] | None = None
    target_offsets: NDArray[np.int64] | None = None
    num_targets: NDArray[np.int64] | None = None
    full_target_lengths: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample (N,)."""
        return np.diff(self.offsets)

    @property
    def read_lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample that a model reads in training, those of its target too (N,)."""
        return self.lengths if self._target_lengths is None else self.lengths + self._target_lengths

    @property
    def widths(self) -> NDArray[np.int64]:
        """Tokens of the longer of each sample's two sides, where it has a target (N,)."""
        if self._target_lengths is None:
            return self.lengths
        return np.maximum(self.lengths, self._target_lengths)

    @property
    def _target_lengths(self) -> NDArray[np.int64] | None:
        return None if self.target_offsets is None else np.diff(self.target_offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.offsets[-1])

    def count_targets(self, positions: NDArray[np.int64]) -> int:
        """Say what the task losses of some samples are a sum over."""
        return (
            len(positions) if self.num_targets is None else int(self.num_targets[positions].sum())
        )

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
        """A copy with the samples at these positions, in the order given."""
        chosen = np.asarray(positions, dtype=np.int64)
        tokens, offsets = _gather(self.offsets, chosen)
        targets, target_offsets = None, None
        if self.targets is not None:
            assert self.target_offsets is not None
            written, target_offsets = _gather(self.target_offsets, chosen)
            targets = self.targets[written]
        return Encoded(
            input_ids=self.input_ids[tokens],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[tokens],
            offsets=offsets,
            labels=self.labels[chosen],
            sample_ids=self.sample_ids[chosen],
            full_lengths=None if self.full_lengths is None else self.full_lengths[chosen],
            columns={name: column[tokens] for name, column in self.columns.items()},
            targets=targets,
            target_offsets=target_offsets,
            num_targets=None if self.num_targets is None else self.num_targets[chosen],
            full_target_lengths=None
            if self.full_target_lengths is None
            else self.full_target_lengths[chosen],
        )


def _gather(
    offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the tokens of some samples lie, and where these samples then begin."""
    lengths = np.diff(offsets)[chosen]
    own = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return np.repeat(offsets[chosen] - own[:-1], lengths) + np.arange(own[-1]), own


def encode(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    kind: TaskKind | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    is_training: bool = True,
    cache_dir: str | Path | None = None,
    digest: str = "",
) -> Encoded:
    """Tokenise rows once; later calls with the same rows and tokenizer read the cache.

    Args:
        dataset: columns text_a, text_b, label, sample_id, as `load_splits` gives.
        tokenizer: of the model.
        max_length: longer samples are cut (of a pair, the longer text first).
        kind: of the task, which makes samples of rows; classification if None.
        options: of the task.
        is_training: whether the samples are to train on, and not to measure on.
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
    kind = kind or TASK_KINDS["classification"]
    is_pair = dataset[0]["text_b"] is not None
    num_special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length < num_special + 1 + is_pair:
        raise DataError(
            f"model.max_length={max_length} leaves no room for text",
            remedy=f"set it to at least {num_special + 1 + is_pair}; 128 is usual",
        )
    key = hashlib.sha256()
    own = (kind.name, sorted(options.items()), is_training)
    for part in (_FORMAT, digest, max_length, own, _tokenizer_state(tokenizer)):
        key.update(f"{part}\n".encode())
    for batch in dataset.iter(_CHUNK_ROWS):
        key.update(json.dumps(batch, sort_keys=True).encode())
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)

    def make(rows: Mapping[str, Sequence[Any]]) -> TokenRows:
        return kind.tokens(
            rows, tokenizer, max_length=max_length, is_training=is_training, options=options
        )

    num_rows = len(dataset) if kind.needs_all_rows(is_training=is_training) else _CHUNK_ROWS
    final = build_once(
        root / "encoded" / key.hexdigest()[:32],
        lambda folder: _write(folder, _tokenise(dataset, make, num_rows)),
        is_good=lambda folder: is_whole(folder, _META, _FORMAT),
    )
    arrays: dict[str, Any] = {
        path.stem: np.load(path, mmap_mode="r") for path in final.glob("*.npy")
    }
    columns = {
        name.removeprefix(_COLUMN): arrays.pop(name)
        for name in sorted(arrays)
        if name.startswith(_COLUMN)
    }
    return Encoded(token_type_ids=arrays.pop("token_type_ids", None), columns=columns, **arrays)


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
    dataset: Dataset, make: Callable[[Mapping[str, Sequence[Any]]], TokenRows], num_rows: int
) -> dict[str, NDArray[Any]]:
    parts: dict[str, list[NDArray[Any]]] = {}
    label_type = dataset.features["label"].dtype

    def add(name: str, values: Any, dtype: Any) -> None:
        if values is not None:
            parts.setdefault(name, []).append(np.asarray(values, dtype))

    def add_ragged(name: str, values: Ragged | None, dtype: Any) -> None:
        if values is not None:
            flat = [np.asarray(value, dtype) for value in values]
            add(name, np.concatenate(flat) if flat else (), dtype)

    for rows in dataset.iter(num_rows):
        made = make(rows)
        is_float = label_type.startswith("float")
        add("lengths", list(map(len, made.input_ids)), np.int64)
        add_ragged("input_ids", made.input_ids, np.int32)
        add_ragged("token_type_ids", made.token_type_ids, np.int8)
        for name, column in made.columns.items():
            add_ragged(f"{_COLUMN}{name}", column, np.int32)
        add_ragged("targets", made.targets, np.int32)
        if made.targets is not None:
            add("target_lengths", list(map(len, made.targets)), np.int64)
        add("num_targets", made.num_targets, np.int64)
        add("full_lengths", made.full_lengths, np.int64)
        add("full_target_lengths", made.full_target_lengths, np.int64)
        add("labels", made.labels, np.float32 if is_float else np.int64)
        add("sample_ids", np.asarray(rows["sample_id"], np.int64)[list(made.rows)], np.int64)
    arrays = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    lengths = arrays.pop("lengths")
    if not len(lengths):
        raise DataError("the rows give no sample", remedy="give rows with more text")
    if lengths.min() == 0:
        raise DataError(
            "a text gives no tokens at all", remedy="drop empty texts; this tokenizer adds none"
        )
    arrays["offsets"] = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    if "targets" in arrays:
        ends = np.cumsum(arrays.pop("target_lengths"))
        arrays["target_offsets"] = np.concatenate(([0], ends)).astype(np.int64)
    return arrays


def _write(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        # Through a buffer: numpy's own writer turns a full disk into an error without a number.
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        (folder / f"{name}.npy").write_bytes(buffer.getbuffer())
    note_digests(folder, _META, _FORMAT)
