"""Batches of tokenised samples: the same global batches whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_dist.data.encoding import Encoded, encode
from moe_dist.errors import DataError
from moe_dist.tasks.kind import IGNORED

__all__ = ["Encoded", "StepBatch", "TrainBatches", "bounded_batch", "encode", "eval_batches"]

_BUCKET_BATCHES = 50
# Tensor cores want widths in multiples of 8; a CPU would only compute on more padding.
_GPU_MULTIPLE = 8


@dataclass
class StepBatch:
    """What one rank computes on in one optimizer step.

    Attributes:
        micro_batches: `accumulation` many; each has input_ids, attention_mask, labels and,
            if the tokenizer knows them, token_type_ids.
        num_samples: of the whole step, over all ranks and micro-batches.
        num_tokens: real tokens of the whole step, targets too, over all ranks and micro-batches.
        num_targets: what the task losses of the whole step are a sum over.
        sample_ids: of this rank's samples.
        task: number of the task that all samples are of; None in a run of one task.
        task_name: its name.
    """

    micro_batches: list[dict[str, Tensor]]
    num_samples: int
    num_tokens: int
    num_targets: int
    sample_ids: list[int]
    task: int | None = None
    task_name: str = ""


class TrainBatches:
    """Training batches of one rank.

    The global batches depend on data, batch size, seed and epoch only, so that training is the same
    at every world size (dropout aside, which each rank draws for itself). All samples are used in
    each epoch: those that fill no whole batch enlarge the others, most often by one sample.

    Args:
        encoded: the training samples.
        batch_size: samples of one optimizer step over all ranks.
        world_size: number of ranks.
        rank: this rank.
        accumulation: micro-batches in a step on each rank.
        seed: of the order.
        pad_token_id: fills input_ids.
        bucket: batch samples of like length.
        pin_memory: put tensors into page-locked memory, for copies that overlap; None: where
            there is a GPU.

    Raises:
        DataError: if a step has fewer samples than ranks times micro-batches.
    """

    def __init__(
        self,
        encoded: Encoded,
        *,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        pad_token_id: int = 0,
        bucket: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        assert 0 <= rank < world_size
        assert min(accumulation, batch_size) >= 1
        smallest = min(batch_size, len(encoded))
        if smallest < world_size * accumulation:
            raise DataError(
                f"a step of {smallest} samples cannot be shared by {world_size} workers with "
                f"{accumulation} micro-batches each",
                remedy="raise train.batch_size (or give more training samples), or lower "
                "train.accumulation or parallel.num_workers",
            )
        self.encoded = encoded
        self.batch_size = batch_size
        self.world_size = world_size
        self.rank = rank
        self.accumulation = accumulation
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.bucket = bucket
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return max(1, len(self.encoded) // self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """The steps left of one epoch, which has an order of its own."""
        for batch in self.global_batches(epoch)[start_step:]:
            yield self._step(batch)

    def global_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Positions of the samples of every step of an epoch, over all ranks."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.encoded))
        bounds = np.linspace(0, len(order), self.steps_per_epoch + 1).astype(np.int64)
        if not self.bucket:
            return np.split(order, bounds[1:-1])
        # Two sides are filled up each for itself: the longer one says what a sample costs most.
        widths = self.encoded.widths
        batches = []
        for first in range(0, self.steps_per_epoch, _BUCKET_BATCHES):
            cuts = bounds[first : first + _BUCKET_BATCHES + 1]
            pool = order[cuts[0] : cuts[-1]]
            pool = pool[np.argsort(widths[pool], kind="stable")]
            batches.extend(np.split(pool, cuts[1:-1] - cuts[0]))
        return [batches[i] for i in rng.permutation(len(batches))]

    def _step(self, batch: NDArray[np.int64]) -> StepBatch:
        # Neighbours in length go to the ranks in turn, so that ranks wait little on each other.
        by_length = batch[np.argsort(self.encoded.widths[batch], kind="stable")]
        mine = [
            chunk[self.rank :: self.world_size]
            for chunk in np.array_split(by_length, self.accumulation)
        ]
        return StepBatch(
            micro_batches=[
                collate(self.encoded, rows, self.pad_token_id, pin_memory=self.pin_memory)
                for rows in mine
            ],
            num_samples=len(batch),
            num_tokens=int(self.encoded.read_lengths[batch].sum()),
            num_targets=self.encoded.count_targets(batch),
            sample_ids=self.encoded.sample_ids[np.concatenate(mine)].tolist(),
        )


def eval_batches(
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Batches that cover every sample once, longest first.

    Every rank yields equally many batches of equal size, since experts on other ranks wait for
    it. Where the samples do not divide evenly, a rank repeats some, which "is_repeat" tells.

    Args:
        encoded: the samples.
        batch_size: samples in a batch, on each rank.
        pad_token_id: fills input_ids.
        rank: this rank.
        world_size: number of ranks.

    Yields:
        Batches as in StepBatch, with "index" (B,): positions in `encoded`; "sample_ids" (B,); and
        "is_repeat" (B,) bool: another batch has the sample too.
    """
    order = np.argsort(-encoded.lengths, kind="stable")
    is_repeat = np.zeros(len(order), dtype=bool)
    if len(order) % world_size:
        missing = world_size - len(order) % world_size
        order = np.resize(order, len(order) + missing)
        is_repeat = np.append(is_repeat, np.ones(missing, dtype=bool))
    mine, repeats = order[rank::world_size], is_repeat[rank::world_size]
    for start in range(0, len(mine), batch_size):
        part = slice(start, start + batch_size)
        batch = collate(encoded, mine[part], pad_token_id)
        batch["index"] = torch.from_numpy(mine[part].astype(np.int64))
        batch["sample_ids"] = torch.from_numpy(np.array(encoded.sample_ids[mine[part]]))
        batch["is_repeat"] = torch.from_numpy(repeats[part].copy())
        yield batch


def bounded_batch(batch_size: int, length: int, max_tokens: int) -> int:
    """Lower a number of samples of at most so many tokens each, until a batch fits in memory."""
    return max(1, min(batch_size, max_tokens // length))


def collate(
    encoded: Encoded, rows: NDArray[np.int64], pad_token_id: int, *, pin_memory: bool = False
) -> dict[str, Tensor]:
    """Pad some samples to the longest of them.

    Args:
        encoded: the samples.
        rows: positions of those wanted.
        pad_token_id: fills input_ids.
        pin_memory: put the tensors into page-locked memory.

    Returns:
        input_ids, attention_mask, token_type_ids (if known) and the kind's own columns, all
        (B, S) int64; labels (B, ...); and where there are some, targets (B, T) int64, filled up
        with `IGNORED`, and num_targets (B,).
    """
    starts, lengths = encoded.offsets[rows], encoded.lengths[rows]
    width = int(lengths.max())
    if torch.cuda.is_available():
        width = -(-width // _GPU_MULTIPLE) * _GPU_MULTIPLE
    columns = np.arange(width)
    mask = columns < lengths[:, None]
    positions = np.where(mask, starts[:, None] + columns, 0)
    arrays = {
        "input_ids": np.where(mask, encoded.input_ids[positions], pad_token_id),
        "attention_mask": mask,
    }
    if encoded.token_type_ids is not None:
        arrays["token_type_ids"] = np.where(mask, encoded.token_type_ids[positions], 0)
    for name, column in encoded.columns.items():
        arrays[name] = np.where(mask, column[positions], 0)
    if encoded.targets is not None and encoded.target_offsets is not None:
        begins, counts = encoded.target_offsets[rows], np.diff(encoded.target_offsets)[rows]
        places = np.arange(int(counts.max()))
        is_real = places < counts[:, None]
        written = encoded.targets[np.where(is_real, begins[:, None] + places, 0)]
        arrays["targets"] = np.where(is_real, written, IGNORED)
    if encoded.num_targets is not None:
        arrays["num_targets"] = encoded.num_targets[rows]
    batch = {name: torch.from_numpy(value.astype(np.int64)) for name, value in arrays.items()}
    batch["labels"] = torch.from_numpy(np.array(encoded.labels[rows]))
    return {name: value.pin_memory() for name, value in batch.items()} if pin_memory else batch
