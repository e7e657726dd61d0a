"""What a load found, as a value that is shown before anything starts and kept in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_dist.data.labels import class_warnings
from moe_dist.data.splits import normalise
from moe_dist.tasks.question_answering import NO_ANSWER

if TYPE_CHECKING:
    from moe_dist.data.encoding import Encoded
    from moe_dist.data.samples import Sample
    from moe_dist.data.tasks import TaskSpec

_SHOWN_CLASSES = 8
# Tokens of a target that are not worth a warning, and how often the longest may be in more.
_LONG_TARGET = 512
_MANY_TIMES = 10


@dataclass(frozen=True)
class Cut:
    """How many samples of a split are longer than what the model is given.

    Attributes:
        num_cut: samples that lose tokens.
        max_length: tokens that are kept.
        mean_lost: tokens that a cut sample loses, on average.
        longest: tokens of the longest sample.
    """

    num_cut: int
    max_length: int
    mean_lost: float
    longest: int


@dataclass(frozen=True)
class Pieces:
    """What running text was cut into.

    Attributes:
        num_pieces: blocks, or windows.
        max_length: tokens of the longest that there may be.
        num_tokens: of all of them.
        num_targets: tokens that are to be predicted.
    """

    num_pieces: int
    max_length: int
    num_tokens: int
    num_targets: int


@dataclass(frozen=True)
class Windows:
    """What rows become that are longer than the model reads and are cut into several samples.

    Attributes:
        num_samples: of all rows.
        num_divided: rows that make several.
    """

    num_samples: int
    num_divided: int


@dataclass(frozen=True)
class SplitSummary:
    """What there is of one split.

    Attributes:
        num_samples: rows that are used.
        class_counts: rows of each class by its name, in the order of ids; empty for regression.
        value_range: smallest, mean and largest label of a regression.
        left_out: rows that were read and are not used, by the reason.
        num_empty: rows without any text.
        cut: None where nothing was tokenised yet, or nothing is cut.
        num_answerable: questions that have an answer; None where rows are no questions.
        windows: None where nothing was tokenised yet, or no row makes several samples.
        target_cut: the same of what is to be written; None too where nothing is.
        pieces: what running text was cut into; None of other texts, and where cut is None.
    """

    num_samples: int
    class_counts: Mapping[str, int] = field(default_factory=dict)
    value_range: tuple[float, float, float] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    num_empty: int = 0
    cut: Cut | None = None
    num_answerable: int | None = None
    windows: Windows | None = None
    target_cut: Cut | None = None
    pieces: Pieces | None = None

    @classmethod
    def of(
        cls, samples: Sequence[Sample], task: TaskSpec, left_out: Mapping[str, int]
    ) -> SplitSummary:
        """Summarise the samples of a split; `left_out` counts the other rows by reason."""
        labels = np.array([sample.label for sample in samples])
        counts: dict[str, int] = {}
        values = num_answerable = None
        if task.label == "number":
            values = (float(labels.min()), float(labels.mean()), float(labels.max()))
        elif task.label == "answers":
            num_answerable = int((labels != NO_ANSWER).sum())
        elif task.label_names is not None:
            by_id = np.bincount(labels, minlength=len(task.label_names)).tolist()
            counts = dict(zip(task.label_names, by_id, strict=True))
        return cls(
            num_samples=len(samples),
            class_counts=counts,
            value_range=values,
            left_out={reason: number for reason, number in left_out.items() if number},
            num_empty=sum(not sample.text.strip() for sample in samples),
            num_answerable=num_answerable,
        )


@dataclass(frozen=True)
class DataSummary:
    """What a load found.

    Attributes:
        source: where the rows came from, in words.
        train: the training rows.
        dev: the dev rows.
        num_copies: dev rows whose texts are those of a training row, but for case and punctuation.
        holdout: the rows that are withheld to choose recipes on.
        unlabelled: the rows without labels, to distil on.
        notes: what was guessed.
        warnings: what may be wrong.
    """

    source: str
    train: SplitSummary
    dev: SplitSummary
    num_copies: int | None = None
    holdout: SplitSummary | None = None
    unlabelled: SplitSummary | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def with_windows(self, train: Windows | None, dev: Windows | None) -> DataSummary:
        """Add what rows were cut into several samples."""
        return replace(
            self,
            train=replace(self.train, windows=train),
            dev=replace(self.dev, windows=dev),
        )

    def with_cuts(self, train: Cut | None, dev: Cut | None) -> DataSummary:
        """Add what tokenising cut, to be said and warned of."""
        if train is None or dev is None:
            return self
        found = replace(self, train=replace(self.train, cut=train), dev=replace(self.dev, cut=dev))
        num_cut = train.num_cut + dev.num_cut
        if not num_cut:
            return found
        lost = (train.mean_lost * train.num_cut + dev.mean_lost * dev.num_cut) / num_cut
        warning = (
            f"model.max_length={train.max_length} cuts {train.num_cut} of "
            f"{self.train.num_samples} training rows and {dev.num_cut} of "
            f"{self.dev.num_samples} dev rows, by {lost:.0f} tokens on average; the longest row "
            f"has {max(train.longest, dev.longest)} tokens"
        )
        return replace(found, warnings=(*self.warnings, warning))

    def with_target_cuts(self, train: Cut, dev: Cut) -> DataSummary:
        """Add what cutting took from targets, to be said and warned of."""
        found = replace(
            self,
            train=replace(self.train, target_cut=train),
            dev=replace(self.dev, target_cut=dev),
        )
        limit, longest = train.max_length, max(train.longest, dev.longest)
        if limit > max(_LONG_TARGET, _MANY_TIMES * longest):
            warning = (
                f"data.max_target_length={limit} is far more than the {longest} tokens of the "
                "longest target: what a model does not end is written so long, by each beam; "
                f"about {2 * longest} are enough"
            )
            return replace(found, warnings=(*self.warnings, warning))
        if not train.num_cut + dev.num_cut:
            return found
        warning = (
            f"data.max_target_length={limit} cuts {train.num_cut} of "
            f"{self.train.num_samples} training targets and {dev.num_cut} of "
            f"{self.dev.num_samples} dev targets, the longest of which has "
            f"{longest} tokens: the model learns not to end those"
        )
        return replace(found, warnings=(*self.warnings, warning))

    def with_pieces(self, train: Pieces, dev: Pieces) -> DataSummary:
        """Add what running text was cut into."""
        return replace(
            self, train=replace(self.train, pieces=train), dev=replace(self.dev, pieces=dev)
        )

    def with_unlabelled_cut(self, num_cut: int) -> DataSummary:
        """Warn of rows without labels that are cut."""
        if not num_cut or self.unlabelled is None:
            return self
        warning = (
            f"model.max_length cuts {num_cut} of {self.unlabelled.num_samples} rows without labels"
        )
        return replace(self, warnings=(*self.warnings, warning))

    def with_near_copies(self, number: int) -> DataSummary:
        """Warn of dev rows that nearly repeat a training row, beside the exact copies."""
        if not number:
            return self
        warning = (
            f"{number} more of {self.dev.num_samples} dev rows are near copies of training rows: "
            "dev metrics may count what was learned by heart; look at them, or give data.dev_size"
        )
        return replace(self, warnings=(*self.warnings, warning))

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.source}; {self.figures}"

    @property
    def figures(self) -> str:
        """All but the source in one line."""
        parts = [f"{_size(self.train, 'to train')}, {_size(self.dev, 'for dev')}"]
        if self.unlabelled is not None:
            parts.append(_size(self.unlabelled, "without labels to distil on"))
        if self.holdout is not None:
            parts.append(f"{self.holdout.num_samples} withheld to choose on")
        labels = _labels(self.train) or _labels(self.dev)
        if self.train.target_cut is None:
            parts.append(labels or "no labels")
        if self.dev.num_answerable is not None:
            parts[-1] += f" ({self.dev.num_answerable / self.dev.num_samples:.1%} of dev)"
        if self.num_copies is not None:
            parts.append(f"{self.num_copies or 'no'} dev rows are training rows too")
        cuts = [split.cut for split in (self.train, self.dev) if split.cut is not None]
        if cuts:
            num_cut = sum(cut.num_cut for cut in cuts)
            parts.append(f"{num_cut or 'no'} rows cut at {cuts[0].max_length} tokens")
        for split, purpose in ((self.train, "blocks to train on"), (self.dev, "windows for dev")):
            if split.pieces is not None:
                own = split.pieces
                parts.append(
                    f"{own.num_pieces:,} {purpose} of at most {own.max_length} tokens, with "
                    f"{own.num_targets:,} to predict"
                )
        parts += [
            f"{split.windows.num_divided} {name} rows cut into several windows, "
            f"{split.windows.num_samples} in all"
            for name, split in (("training", self.train), ("dev", self.dev))
            if split.windows is not None
        ]
        written = [split.target_cut for split in (self.train, self.dev) if split.target_cut]
        if written:
            num_cut = sum(cut.num_cut for cut in written)
            parts.append(f"{num_cut or 'no'} targets cut at {written[0].max_length}")
        return "; ".join(parts)

    def as_record(self) -> dict[str, Any]:
        """Plain values for the report, without texts of rows and places of this machine."""
        splits = {
            "train": self.train,
            "dev": self.dev,
            "holdout": self.holdout,
            "unlabelled": self.unlabelled,
        }
        record = {name: asdict(split) for name, split in splits.items() if split is not None}
        return {"figures": self.figures, **record, "num_copies": self.num_copies}


def summarise(
    source: str,
    task: TaskSpec,
    train: Sequence[Sample],
    dev: Sequence[Sample],
    holdout: Sequence[Sample],
    *,
    unlabelled: Sequence[Sample] = (),
    left_out: Mapping[str, Mapping[str, int]],
    notes: Sequence[str],
) -> DataSummary:
    """Summarise a load.

    Args:
        source: where the rows came from, in words.
        task: with its label names resolved.
        train: training samples.
        dev: dev samples.
        holdout: samples to choose on; empty without them.
        unlabelled: samples without labels; empty without them.
        left_out: of `train`, `dev` and `unlabelled`, rows that are not used, by the reason.
        notes: what reading them said.

    Returns:
        The summary, with its warnings.
    """
    of_train = SplitSummary.of(train, task, left_out["train"])
    of_dev = SplitSummary.of(dev, task.on_dev, left_out["dev"])
    seen = set(map(_normalised, train))
    # Where texts are read one by one, either of a dev row's may have been trained on.
    single = {text for texts in seen for text in texts} if task.dev_rows is not None else set()
    copies = [
        sample
        for sample in dev
        if _normalised(sample) in seen or not single.isdisjoint(_normalised(sample))
    ]
    warnings = class_warnings(of_train.class_counts, of_dev.class_counts)
    if of_train.value_range is not None:
        low, _, high = of_train.value_range
        if np.float32(low) == np.float32(high):
            warnings.append(f"all training labels are {low:g}: there is nothing to learn")
    further = _texts_alone(unlabelled, left_out.get("unlabelled", {}))
    for words, split in (("training", of_train), ("dev", of_dev), ("unlabelled", further)):
        if split.num_empty:
            warnings.append(f"{split.num_empty} {words} rows have no text")
    if of_train.num_answerable == len(train) and of_dev.num_answerable != len(dev):
        warnings.append(
            f"{len(dev) - (of_dev.num_answerable or 0)} of {len(dev)} dev questions have no answer "
            "and all training questions have one: the model will answer every question"
        )
    if copies:
        shown = ", ".join(repr(sample.text[:40]) for sample in copies[:2])
        warnings.append(
            f"{len(copies)} of {len(dev)} dev rows are training rows too, such as {shown}: dev "
            "metrics count what was seen in training; give other dev rows, or data.dev_size"
        )
    return DataSummary(
        source=source,
        train=of_train,
        dev=of_dev,
        num_copies=len(copies),
        holdout=SplitSummary.of(holdout, task, {}) if holdout else None,
        unlabelled=further if unlabelled else None,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _texts_alone(samples: Sequence[Sample], left_out: Mapping[str, int]) -> SplitSummary:
    return SplitSummary(
        num_samples=len(samples),
        left_out={reason: number for reason, number in left_out.items() if number},
        num_empty=sum(not sample.text.strip() for sample in samples),
    )


def measure_windows(encoded: Encoded) -> Windows | None:
    """Count the samples of rows that are cut into several; None where none is."""
    if encoded.full_lengths is not None:
        # Such samples are whole texts, of which a row may hold two.
        return None
    counts = np.unique(encoded.sample_ids, return_counts=True)[1]
    num_divided = int((counts > 1).sum())
    return Windows(len(encoded), num_divided) if num_divided else None


def measure_cut(encoded: Encoded, max_length: int) -> Cut | None:
    """Say how many samples were shortened, and by how much; None where the kind cuts none."""
    full_lengths = encoded.full_lengths
    if full_lengths is None:
        return None
    return _cut(full_lengths, encoded.lengths, encoded.sample_ids, max_length)


def measure_pieces(encoded: Encoded, max_length: int) -> Pieces:
    """Say what running text was cut into."""
    num_targets = encoded.count_targets(np.arange(len(encoded)))
    return Pieces(len(encoded), max_length, encoded.num_tokens, num_targets)


def measure_target_cut(encoded: Encoded, max_length: int) -> Cut:
    """Say how many targets cutting at a length shortened, and by how much."""
    full_lengths, offsets = encoded.full_target_lengths, encoded.target_offsets
    assert full_lengths is not None and offsets is not None, "kinds that cut targets count them"
    return _cut(full_lengths, np.diff(offsets), encoded.sample_ids, max_length)


def _cut(
    full_lengths: NDArray[np.int64],
    lengths: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    max_length: int,
) -> Cut:
    lost = full_lengths - lengths
    # Of rows: several samples may be made of one.
    num_cut = len(np.unique(sample_ids[lost > 0]))
    return Cut(
        num_cut=num_cut,
        max_length=max_length,
        mean_lost=float(lost.sum()) / num_cut if num_cut else 0.0,
        longest=int(full_lengths.max()),
    )


def _normalised(sample: Sample) -> tuple[str, ...]:
    texts = (sample.text_a, sample.text_b)
    return tuple(normalise(text) for text in texts if text is not None)


def _size(split: SplitSummary, purpose: str) -> str:
    reasons = ", ".join(f"{number} {reason}" for reason, number in split.left_out.items())
    return f"{split.num_samples} {purpose}" + (f" (left out: {reasons})" if reasons else "")


def _labels(split: SplitSummary) -> str:
    if split.value_range is not None:
        low, mean, high = split.value_range
        return f"labels from {low:g} to {high:g}, mean {mean:.4g}"
    if split.num_answerable is not None:
        return f"{split.num_answerable / split.num_samples:.1%} of questions have an answer"
    counts = split.class_counts
    if not counts:
        return ""
    order = list(counts)
    if len(order) > _SHOWN_CLASSES:
        order = sorted(order, key=lambda name: -counts[name])[: _SHOWN_CLASSES - 1]
    words = [f"{_short(name)} {counts[name] / split.num_samples:.1%}" for name in order]
    if len(order) < len(counts):
        fewest = min(counts.values())
        words.append(f"{len(counts) - len(order)} more, the rarest with {fewest} rows")
    return f"{len(counts)} classes: {', '.join(words)}"


def _short(name: str) -> str:
    plain = " ".join(name.split())
    return plain if len(plain) <= 40 else f"{plain[:39]}…"
