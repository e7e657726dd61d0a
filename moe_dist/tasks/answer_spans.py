"""The best answer among all parts of a context, from scores of first and last tokens.

Shapes: B or N windows, S positions, M questions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_dist.tasks.kind import Answered

MASKED = -1e9
"""A score that is no probability in 32-bit floats, and is finite after a temperature."""
_START, _END, _SCORE, _NONE = range(4)
"""What `best_spans` gives."""


def best_spans(scores_BS2: Tensor, is_context_BS: Tensor, max_length: int) -> Tensor:
    """Find the best answer of each window among all that the context allows.

    Published code looks at the 20 best first and the 20 best last tokens alone.

    Args:
        scores_BS2: of each token as first and as last one.
        is_context_BS: where an answer may be.
        max_length: tokens of the longest answer.

    Returns:
        (B, 4): position of the first and last token, the sum of their scores, and that of the
        first token of all, which stands for no answer.
    """
    masked_BS2 = scores_BS2.masked_fill(~is_context_BS.unsqueeze(-1), MASKED)
    start_BS, end_BS = masked_BS2.unbind(-1)
    ends_BSL = functional.pad(end_BS, (0, max_length - 1), value=MASKED).unfold(1, max_length, 1)
    sums_BSL = start_BS.unsqueeze(-1) + ends_BSL
    best_B, index_B = sums_BSL.flatten(1).max(dim=1)
    first_B = index_B // max_length
    last_B = first_B + index_B % max_length
    return torch.stack((first_B, last_B, best_B, scores_BS2[:, 0].sum(dim=-1)), dim=1)


@dataclass(frozen=True)
class BestAnswers:
    """The best answer to each question, over its windows.

    Args:
        texts: (M,) of text.
        gaps: (M,) how much higher no answer scores than that.
        right: (M,) the right answers; none where there is none.
    """

    texts: list[str]
    gaps: NDArray[np.float64]
    right: list[list[str]]

    @classmethod
    def of(cls, answered: Answered) -> BestAnswers:
        """Choose among what `best_spans` found in each window, in the order of the rows."""
        raw, ids = answered.raw.astype(np.float64), np.asarray(answered.rows["sample_id"])
        by_id = np.argsort(ids)
        questions = by_id[np.searchsorted(ids, answered.sample_ids, sorter=by_id)]
        # Of each question the last in this order is its best window, the first one of equals.
        order = np.lexsort((-np.arange(len(raw)), raw[:, _SCORE], questions))
        best = order[np.flatnonzero(np.diff(questions[order], append=-1))]
        none = np.full(len(ids), np.inf)
        np.minimum.at(none, questions, raw[:, _NONE])
        places = answered.offsets[best]
        starts = answered.columns["char_start"][places + raw[best, _START].astype(np.int64)]
        ends = answered.columns["char_end"][places + raw[best, _END].astype(np.int64)]
        return cls(
            texts=[
                context[start:end]
                for context, start, end in zip(answered.rows["text_b"], starts, ends, strict=True)
            ],
            gaps=none - raw[best, _SCORE],
            right=[[one["text"] for one in json.loads(label)] for label in answered.rows["label"]],
        )

    def given(self, limit: float | None) -> list[str]:
        """Leave out what scores lower than no answer by more than a limit; None leaves none out."""
        known = np.inf if limit is None else limit
        return [
            "" if gap > known else text for text, gap in zip(self.texts, self.gaps, strict=True)
        ]
