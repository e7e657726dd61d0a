"""How long a forward pass takes, measured."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Latency:
    """Times of a forward pass at one batch size.

    Attributes:
        median_ms: half of the repeats took no longer.
        p90_ms: nine tenths of the repeats took no longer.
    """

    median_ms: float
    p90_ms: float


def measure_latency(
    model: nn.Module,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    seq_len: int = 128,
    repeats: int = 10,
    num_warmups: int = 2,
    threads: int | None = None,
    seed: int = 0,
) -> dict[int, Latency]:
    """Time forward passes on random tokens without padding, where the model is.

    Args:
        model: a transformers model; its mode is restored.
        batch_sizes: to measure, one after the other.
        seq_len: tokens in a sequence (for a decoder of an encoder-decoder as well).
        repeats: timed passes for each batch size.
        num_warmups: passes before them.
        threads: CPU threads of torch, restored afterwards; None leaves them.
        seed: of the tokens.

    Returns:
        Batch size to latency.

    Raises:
        ValueError: if `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; at least one pass must be timed")
    device = next(model.parameters()).device
    latencies = {}
    with _eval_mode(model), _num_threads(threads), torch.inference_mode():
        for batch_size in batch_sizes:
            batch = _random_batch(model, batch_size, seq_len, device, seed)
            for _ in range(num_warmups):
                model(**batch)
            times_ms = [_time_ms(model, batch, device) for _ in range(repeats)]
            latencies[batch_size] = Latency(
                statistics.median(times_ms), float(np.quantile(times_ms, 0.9))
            )
    return latencies


def _time_ms(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> float:
    _wait_for(device)
    start_s = time.perf_counter()
    model(**batch)
    _wait_for(device)
    return (time.perf_counter() - start_s) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_batch(
    model: nn.Module, batch_size: int, seq_len: int, device: torch.device, seed: int
) -> dict[str, Tensor]:
    config: Any = model.config
    special = (config.pad_token_id, config.eos_token_id, getattr(config, "bos_token_id", None))
    usual = [i for i in range(int(config.vocab_size)) if i not in special]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(usual), (batch_size, seq_len), generator=generator)
    ids = torch.tensor(usual)[chosen]
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted and isinstance(config.eos_token_id, int):
        # Classifiers of this kind read the last token that ends a sentence.
        ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = ids
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _num_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
