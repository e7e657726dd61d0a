"""What a metric makes of the figures of each document, question or pair.

Shapes: N units, K figures of each, in the order that the metric's row of METRICS names them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moe_dist.tasks.text_scores import CHRF_COLUMNS, CHRF_ORDER

__all__ = [
    "CHRF_COLUMNS",
    "bits_for_each",
    "chrf",
    "mean",
    "mean_exponential",
    "mean_reciprocal_rank",
    "recall_at_1",
    "recall_at_10",
    "why_no_rate",
]

Figures = NDArray[np.float64]

_CHRF_BETA = 2
_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


def mean(figures_N: Figures) -> float:
    """Mean over units."""
    return float(figures_N.mean())


def mean_exponential(figures_N2: Figures) -> float:
    """Perplexity of summed negative log-likelihoods (nats) and counts; NaN where it is infinite."""
    total, count = figures_N2.sum(0)
    if count <= 0 or total / count > _LARGEST_EXPONENT:
        return math.nan
    return math.exp(total / count)


def bits_for_each(figures_N2: Figures) -> float:
    """Bits for each byte, of summed negative log-likelihoods (nats) and bytes."""
    total, count = figures_N2.sum(0)
    return float(total / count / math.log(2)) if count > 0 else math.nan


def why_no_rate(figures_N2: Figures, counted: str) -> str:
    """Say why there is no value for each of what is counted."""
    total, count = figures_N2.sum(0)
    if count <= 0:
        return f"there are no {counted}"
    return f"{total / count:.4g} nats for each of the {counted} are too many for a finite value"


def recall_at_1(rank_N: Figures) -> float:
    """Share of questions whose passage comes first."""
    return float(np.mean(rank_N <= 1))


def recall_at_10(rank_N: Figures) -> float:
    """Share of questions whose passage is among the first ten."""
    return float(np.mean(rank_N <= 10))


def mean_reciprocal_rank(rank_N: Figures) -> float:
    """Mean of 1 / rank over questions."""
    return float(np.mean(1 / rank_N))


def chrf(counts_NK: Figures) -> float:
    """ChrF of a corpus in [0, 1], from counts in the order of CHRF_COLUMNS.

    Precision and recall are averaged over the lengths that occur in both, as sacrebleu does;
    its own scale is a hundred times this one.

    Source: Popović 2015, W15-3049.
    """
    counts = counts_NK.sum(0).reshape(CHRF_ORDER, 3)
    answered, expected, match = counts[(counts[:, 0] > 0) & (counts[:, 1] > 0)].T
    if not match.sum():
        return 0.0
    precision, recall = float(np.mean(match / answered)), float(np.mean(match / expected))
    factor = _CHRF_BETA**2
    return (1 + factor) * precision * recall / (factor * precision + recall)
