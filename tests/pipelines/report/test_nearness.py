"""Errors of what was made of one row are averaged, before an interval resamples rows."""

from __future__ import annotations

import numpy as np

from moe_dist.data.loaders import Encoded
from pipelines.report.nearness import _by_row


def encoded(sample_ids: list[int], num_targets: list[int] | None) -> Encoded:
    return Encoded(
        input_ids=np.zeros(len(sample_ids), np.int32),
        token_type_ids=None,
        offsets=np.arange(len(sample_ids) + 1),
        labels=np.zeros(len(sample_ids), np.int64),
        sample_ids=np.array(sample_ids),
        num_targets=None if num_targets is None else np.array(num_targets),
    )


def test_windows_of_a_document_count_by_their_targets() -> None:
    errors_N = np.array([1.0, 3.0, 5.0, 7.0], np.float32)
    found = _by_row(errors_N, encoded([9, 4, 4, 9], [1, 1, 3, 3]))
    assert found.tolist() == [(1 + 3 * 7) / 4, (3 + 3 * 5) / 4]
    assert found.dtype == np.float32
    assert _by_row(errors_N, encoded([9, 4, 4, 9], None)).tolist() == [4, 4]


def test_samples_of_rows_of_their_own_stay_as_they_are() -> None:
    errors_N = np.array([1.0, 3.0], np.float32)
    assert _by_row(errors_N, encoded([9, 4], [5, 1])) is errors_N
