"""The outputs of a fresh student's experts, fitted on training rows of each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_dist.conversion import fit_outputs
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.data.mixture import even_share
from moe_dist.distributed.position import advancing


@dataclass(frozen=True)
class DrawnBatches:
    """Batches of the rows drawn from one task, as often as they are asked for.

    Args:
        rows: what was drawn.
        batch_size: samples in a batch.
        pad_token_id: fills up shorter samples.
    """

    rows: Encoded
    batch_size: int
    pad_token_id: int

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Give the batches, longest samples first.

        Yields:
            Batches as in `eval_batches`.
        """
        yield from advancing(
            eval_batches(self.rows, batch_size=self.batch_size, pad_token_id=self.pad_token_id)
        )


def draw_tasks(
    tasks: Sequence[Encoded],
    *,
    num_samples: int | None,
    seed: int,
    batch_size: int,
    pad_token_id: int,
) -> list[DrawnBatches]:
    """Draw equally many training rows of each task: those that neurons were scored on.

    Args:
        tasks: the training rows of each.
        num_samples: rows of all tasks together; None for all.
        seed: the recipe's.
        batch_size: samples in a batch.
        pad_token_id: fills up shorter samples.

    Returns:
        Batches for each task.
    """
    share = None if num_samples is None else even_share(num_samples, len(tasks))
    return [
        DrawnBatches(encoded.draw(share, seed=seed), batch_size, pad_token_id) for encoded in tasks
    ]


def fit_start(student: nn.Module, dense: Any, batches: Sequence[DrawnBatches]) -> None:
    """Fit the outputs of a fresh student's experts where the dense model lies; see `fit_outputs`.

    Args:
        student: changed, and left on the device it came from.
        dense: what it was made from.
        batches: for each task.
    """
    home = next(student.parameters()).device
    fit_outputs(student.to(next(dense.parameters()).device), dense, batches)
    student.to(home)
