"""How long a forward pass takes, measured."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from moe_dist.conversion.families import half_fault
from moe_dist.conversion.heads import read_heads
from moe_dist.moe.routing import use_task
from moe_dist.training.hardware import answering

AnyName = TypeVar("AnyName", bound=Hashable)
TimedPass = Callable[[nn.Module, dict[str, Tensor]], float]


@dataclass(frozen=True)
class Latency:
    """Times of a forward pass at one batch size.

    Attributes:
        times_ms: of each timed pass, in their order.
    """

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Half of the passes took no longer."""
        return statistics.median(self.times_ms)

    @property
    def low_ms(self) -> float:
        """A tenth of the passes took no longer: what the model costs where nothing disturbs it."""
        return float(np.quantile(self.times_ms, 0.1))

    @property
    def p90_ms(self) -> float:
        """Nine tenths of the passes took no longer."""
        return float(np.quantile(self.times_ms, 0.9))

    @property
    def spread(self) -> float:
        """How far the times lie apart, from the lowest to the highest tenth, over the median."""
        return (self.p90_ms - self.low_ms) / self.median_ms


@dataclass(frozen=True)
class OtherWork:
    """What other processes did on this machine meanwhile.

    Attributes:
        num_cores: of the machine.
        busy_cores: how many of them other processes (or other virtual machines) kept busy.
    """

    num_cores: int
    busy_cores: float

    def disturbs(self, num_threads: int) -> bool:
        """Tell whether both together wanted clearly more cores than there are."""
        return self.busy_cores + num_threads > self.num_cores + 0.5


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
    """Time one model by itself, by batch size; the rest is as in `measure_in_turn`."""
    rounds = Rounds(1, repeats=repeats, num_warmups=num_warmups)
    models = {"": model}
    return measure_in_turn(
        models, rounds, batch_sizes=batch_sizes, seq_len=seq_len, threads=threads, seed=seed
    )[""]


@dataclass(frozen=True)
class Rounds:
    """How often models are timed.

    Attributes:
        most: rounds; in each, every model is timed after the other.
        least: as many are made even if they take longer than `budget_s`.
        budget_s: no round begins after so many seconds.
        repeats: timed passes for each model and batch size in a round.
        num_warmups: passes before them.
    """

    most: int
    least: int = 1
    budget_s: float = math.inf
    repeats: int = 2
    num_warmups: int = 1

    def __post_init__(self) -> None:
        """Refuse what times nothing, with a ValueError."""
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}; at least one pass must be timed")


def measure_in_turn(
    models: Mapping[AnyName, nn.Module],
    rounds: Rounds,
    *,
    batch_sizes: Sequence[int],
    seq_len: int,
    threads: int | None = None,
    seed: int = 0,
    padded: bool = False,
    half_on_gpus: bool = True,
    time_pass: TimedPass | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[AnyName, dict[int, Latency]]:
    """Time forward passes on random tokens, where the models are.

    Whatever else the machine does then slows all models alike.

    Args:
        models: transformers models by name; their modes are restored.
        rounds: how often.
        batch_sizes: to measure, one after the other.
        seq_len: tokens in a sequence (for a decoder of an encoder-decoder as well).
        threads: CPU threads of torch, restored afterwards; None leaves them.
        seed: of the tokens.
        padded: whether sequences have all lengths, see `random_batch`.
        half_on_gpus: on a GPU compute as answers are given (`answering`), and not in the models'
            own precision.
        time_pass: makes a pass and says how many milliseconds it took; a forward pass if None.
        progress: called after each round with the rounds made and the most there will be.

    Returns:
        By name, batch size to latency; as many passes of each, in the same order.
    """
    found = {name: {size: list[float]() for size in batch_sizes} for name in models}
    begin = time.monotonic()
    for done in range(rounds.most):
        if done >= rounds.least and time.monotonic() - begin > rounds.budget_s:
            break
        for name, model in models.items():
            with _eval_mode(model), _num_threads(threads), torch.inference_mode(), any_task(model):
                for size in batch_sizes:
                    found[name][size] += _time_passes(
                        model,
                        random_batch(
                            model, size, seq_len, device=_device(model), seed=seed, padded=padded
                        ),
                        rounds,
                        time_pass or time_forward,
                        half_on_gpus=half_on_gpus,
                    )
        progress(done + 1, rounds.most)
    return {
        name: {size: Latency(tuple(times)) for size, times in by_size.items()}
        for name, by_size in found.items()
    }


class WorkWatch:
    """Adds up what other processes do while it looks."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._sums = np.zeros(2)
        self._begin: np.ndarray | None = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look on while the block lasts."""
        self._begin = self._now()
        try:
            yield
        finally:
            self._sums += self._now() - self._begin
            self._begin = None

    def found(self) -> OtherWork:
        """Say what was seen so far."""
        now = 0.0 if self._begin is None else self._now() - self._begin
        passed_s, theirs_s = self._sums + now
        return OtherWork(psutil.cpu_count() or 1, max(0.0, float(theirs_s / max(passed_s, 1e-9))))

    def _now(self) -> np.ndarray:
        """Seconds of the clock, and those for which others have worked."""
        return np.array([time.monotonic(), _busy_s() - sum(self._process.cpu_times()[:2])])


@contextmanager
def watch_other_work() -> Iterator[Callable[[], OtherWork]]:
    """Give a function that says what other processes have done since."""
    watch = WorkWatch()
    with watch.looking():
        yield watch.found


def _busy_s() -> float:
    """Seconds for which all cores together have worked, for this machine or for another on it."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in ("user", "system", "irq", "steal")))


def _time_passes(
    model: nn.Module,
    batch: dict[str, Tensor],
    rounds: Rounds,
    time_pass: TimedPass,
    *,
    half_on_gpus: bool,
) -> list[float]:
    with answering(_device(model), half_fault(model)) if half_on_gpus else nullcontext():
        for _ in range(rounds.num_warmups):
            time_pass(model, batch)
        return [time_pass(model, batch) for _ in range(rounds.repeats)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def any_task(model: nn.Module) -> AbstractContextManager[None]:
    """Name a task for forward calls of a model of several, which all cost alike."""
    return use_task(0 if read_heads(model) else None)


def time_forward(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> float:
    """Make a forward pass, with options of the model's own, and give milliseconds."""
    device = _device(model)
    wait_for(device)
    start_s = time.perf_counter()
    model(**batch, **options)
    wait_for(device)
    return (time.perf_counter() - start_s) * 1e3


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(
    model: nn.Module,
    batch_size: int,
    seq_len: int,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    padded: bool = False,
) -> dict[str, Tensor]:
    """What a forward of any model takes of random tokens, none of them special.

    All are `seq_len` long, or padded to it on the right: then lengths go evenly from an eighth of
    it, in the first text, to all of it in the last.
    """
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
    mask = torch.ones_like(ids)
    if padded:
        lengths = torch.linspace(seq_len, -(-seq_len // 8), batch_size).round().flip(0)
        mask = (torch.arange(seq_len) < lengths[:, None]).to(ids.dtype)
    batch = {"input_ids": ids, "attention_mask": mask}
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
