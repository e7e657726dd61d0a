"""Time how models write texts in every form, in turn: reading a prompt, and each token after it.

A step is what `generate` takes for one token of each text, with its cache; the prompt is read
before and not counted. Times are those below which a tenth of the passes lies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.families import position_limit
from moe_dist.errors import ConfigError, ConversionError, MissingInputError
from moe_dist.inference.backends import ORACLE, QUICK_FORMS, Form
from moe_dist.measure.latency import (
    Rounds,
    TimedPass,
    any_task,
    measure_in_turn,
    random_batch,
    time_forward,
    watch_other_work,
)

from .forms import (
    FormsReport,
    FormTiming,
    Prepared,
    compared,
    load_models,
    prepare_forms,
    show_results,
    source_faults,
)
from .models import RandomDecoders
from .results import busy_line, check_output
from .sizes import below_one, cpu_threads

MAX_COMPARED = 16
"""Steps of a text whose answers are compared."""
OPTIONS = {
    "num_rounds": "--rounds",
    "num_threads": "--threads",
    "num_new_tokens": "--tokens",
    "prompt_len": "--prompt",
    "prefill_len": "--prefill",
}
"""What the command calls fields of `GenerationBenchmark`."""


@dataclass(frozen=True)
class GenerationBenchmark:
    """What to time.

    Args:
        directories: of models by name; ratios are to the first.
        random: models to draw in place of those.
        batch_sizes: texts that are written at once.
        prompt_len: tokens of each before the first that is written.
        num_new_tokens: tokens that are written to each.
        prefill_len: tokens of the one prompt whose reading is timed by itself.
        forms: to bring each model into; eager in float32 is always among them.
        num_rounds: in each every form of every model is timed.
        num_threads: CPU threads; torch's own choice if None.
    """

    directories: Mapping[str, Path] = field(default_factory=dict)
    random: RandomDecoders | None = None
    batch_sizes: tuple[int, ...] = (1, 8)
    prompt_len: int = 32
    num_new_tokens: int = 32
    prefill_len: int = 128
    forms: tuple[Form, ...] = QUICK_FORMS
    num_rounds: int = 5
    num_threads: int | None = None


@dataclass(frozen=True)
class GenerationTiming(FormTiming):
    """One model in one form: a step, or the reading of a prompt.

    Attributes:
        part: which of them, such as `decode 8` or `prefill 128`.
        tokens_per_s: written, or read, in the low time.
        same_words: at how many of the compared places the best word is that of eager float32.
    """

    part: str
    tokens_per_s: float
    same_words: float

    @property
    def work(self) -> str:
        """What was timed."""
        return self.part


@dataclass(frozen=True)
class GenerationReport(FormsReport):
    """What was found, of steps and prompts.

    Attributes:
        prompt_len: see `GenerationBenchmark`.
        num_new_tokens: likewise.
    """

    timings: tuple[GenerationTiming, ...]
    prompt_len: int
    num_new_tokens: int


def run(settings: GenerationBenchmark) -> GenerationReport:
    """Load, bring into forms, and time. A ConfigError if a setting does not fit."""
    counts = ("num_rounds", "prompt_len", "num_new_tokens", "prefill_len")
    faults = below_one(settings, *counts, called=OPTIONS)
    if settings.num_threads is not None:
        faults += below_one(settings, "num_threads", called=OPTIONS)
    faults += [f"--batch {size} is less than 1" for size in settings.batch_sizes if size < 1]
    if settings.num_new_tokens == 1:
        faults.append("--tokens 1 has no step after the first token; give 2 or more")
    faults += source_faults(settings.directories, settings.random)
    models = {} if faults else load_models(settings.directories, settings.random)
    longest = max(settings.prompt_len + settings.num_new_tokens, settings.prefill_len)
    for name, model in models.items():
        limit = position_limit(model)
        if not model.can_generate() or model.config.is_encoder_decoder:
            faults.append(f"{name} is no decoder that writes texts; see benchmark inference")
        elif limit is not None and longest > limit:
            faults.append(
                f"{longest} tokens are wanted, and {name} reads at most {limit}; give fewer with "
                "--prompt, --tokens or --prefill"
            )
    if faults:
        raise ConfigError(faults, source="benchmark generation")
    with cpu_threads(settings.num_threads):
        prepared, refused = prepare_forms(models, settings.forms)
        prepared, silent = _that_write(prepared, settings.prompt_len)
        refused += silent
        if not prepared:
            raise ConfigError(refused, source="benchmark generation")
        num_threads = torch.get_num_threads()
        with watch_other_work() as look:
            timings = [
                one
                for size in settings.batch_sizes
                for one in _time_steps(prepared, size, settings)
            ]
            timings += _time_prompt(prepared, settings)
            work = look()
    return GenerationReport(
        tuple(timings),
        tuple(refused),
        num_threads,
        busy_line(work, num_threads),
        settings.prompt_len,
        settings.num_new_tokens,
    )


def _that_write(prepared: Prepared, prompt_len: int) -> tuple[Prepared, list[str]]:
    """Give the forms that write with a cache, and say why the others do not."""
    writing: Prepared = {}
    refused = []
    for (name, form), model in prepared.items():
        try:
            _written(model, random_batch(model, 1, prompt_len), 2)
        except (ConversionError, MissingInputError) as error:
            reason = error.message
        else:
            reason = ""
            if form != ORACLE and (name, ORACLE) not in writing:
                reason = f"there is no {ORACLE} of it to compare with"
        if reason:
            refused.append(f"{name}, {form}: {reason}")
        else:
            writing[name, form] = model
    return writing, refused


def _time_steps(
    prepared: Prepared, batch_size: int, settings: GenerationBenchmark
) -> list[GenerationTiming]:
    length = settings.prompt_len
    num_steps = min(MAX_COMPARED, settings.num_new_tokens - 1)
    texts = {
        name: _written(model, random_batch(model, batch_size, length), num_steps + 1)
        for (name, form), model in prepared.items()
        if form == ORACLE
    }
    answers = {
        (name, form): _scores_of_steps(model, texts[name][:, :-1], length)
        for (name, form), model in prepared.items()
    }
    rounds = Rounds(settings.num_rounds, repeats=1, num_warmups=0)
    step = partial(_time_step, num_new_tokens=settings.num_new_tokens)
    part = f"decode {batch_size}"
    return _timings(prepared, rounds, (batch_size, length), step, answers, part, batch_size)


def _time_prompt(prepared: Prepared, settings: GenerationBenchmark) -> list[GenerationTiming]:
    length = settings.prefill_len
    answers = {
        key: _scores(model, random_batch(model, 1, length)) for key, model in prepared.items()
    }
    rounds = Rounds(settings.num_rounds)
    part = f"prefill {length}"
    return _timings(prepared, rounds, (1, length), _time_reading, answers, part, length)


def _timings(
    prepared: Prepared,
    rounds: Rounds,
    shape: tuple[int, int],
    time_pass: TimedPass,
    answers: Mapping[tuple[str, Form], Tensor],
    part: str,
    num_tokens: int,
) -> list[GenerationTiming]:
    batch_size, seq_len = shape
    found = measure_in_turn(
        prepared, rounds, batch_sizes=(batch_size,), seq_len=seq_len, time_pass=time_pass
    )
    times = {key: by_size[batch_size] for key, by_size in found.items()}
    best = {key: answer.argmax(dim=-1) for key, answer in answers.items()}
    return [
        GenerationTiming(
            **said,
            part=part,
            tokens_per_s=num_tokens / said["low_ms"] * 1e3,
            same_words=float((best[name, form] == best[name, ORACLE]).float().mean()),
        )
        for (name, form), said in compared(times, answers).items()
    ]


class _Clock:
    """A streamer for `generate` that notes when each token was there; the prompt comes first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows the last token."""


def _time_step(model: nn.Module, batch: Mapping[str, Tensor], *, num_new_tokens: int) -> float:
    """Write texts, and give the milliseconds of a step, from the first token to the last."""
    clock = _Clock()
    _written(model, batch, num_new_tokens, streamer=clock)
    _, first_s, *_, last_s = clock.times_s
    return (last_s - first_s) / (num_new_tokens - 1) * 1e3


def _written(
    model: Any, batch: Mapping[str, Tensor], num_new_tokens: int, **options: Any
) -> Tensor:
    """Write greedily, to all texts alike, whatever ends a text or how the model writes else."""
    with torch.inference_mode(), any_task(model):
        tokens: Tensor = model.generate(
            **batch,
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            **options,
        )
    return tokens


def _time_reading(model: Any, batch: Mapping[str, Tensor]) -> float:
    return time_forward(model, batch, use_cache=True, **_last_word_only(model))


def _last_word_only(model: Any) -> dict[str, int]:
    """What `generate` asks of a forward pass, where a model knows it."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


@torch.inference_mode()
def _scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each word of a text, and what follows."""
    with any_task(model):
        scores: Tensor = model(**batch).logits
    return scores.float()


@torch.inference_mode()
def _scores_of_steps(model: Any, text_BL: Tensor, prompt_len: int) -> Tensor:
    """Of what follows a prompt, and each word after it, by steps with a cache."""
    mask_BL, cache, found = torch.ones_like(text_BL), None, []
    bounds = [0, *range(prompt_len, text_BL.shape[1] + 1)]
    with any_task(model):
        for begin, end in pairwise(bounds):
            out = model(
                input_ids=text_BL[:, begin:end],
                attention_mask=mask_BL[:, :end],
                past_key_values=cache,
                use_cache=True,
                **_last_word_only(model),
            )
            cache = out.past_key_values
            found.append(out.logits[:, -1].float())
    return torch.stack(found, dim=1)


COLUMNS = (
    "work", "model", "form", "tokens/s", "ms", "median ms", "spread",
    "× same form", "× eager-fp32", "differs", "same words",
)  # fmt: skip


def to_rows(report: GenerationReport) -> list[list[str]]:
    """Lay the timings out, a row each, in the order of `COLUMNS`."""
    return [
        [
            one.part,
            one.model,
            one.form,
            f"{one.tokens_per_s:.0f}",
            one.time,
            f"{one.median_ms:.2f}",
            f"{one.spread:.2f}",
            one.same_form,
            f"{one.speed_over_oracle:.2f}",
            f"{one.error:.0e}",
            f"{one.same_words:.0%}",
        ]
        for one in report.timings
    ]


def main(settings: GenerationBenchmark, output: Path | None = None) -> None:
    """Run the benchmark and print it; what `moe-dist benchmark generation` calls.

    Args:
        settings: what to measure.
        output: a directory for the same as JSON and Markdown.
    """
    check_output(output)
    report = run(settings)
    remark = (
        f"decode: a step of generate() for a token of each text, after {report.prompt_len} tokens, "
        f"mean of {report.num_new_tokens - 1}; prefill: reading a prompt of one text"
    )
    show_results("generation", report, COLUMNS, to_rows(report), remarks=(remark,), output=output)
