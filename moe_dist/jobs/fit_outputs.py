"""Fit the outputs of a fresh student's experts to the dense model's, on rows of each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from moe_dist.conversion import fit_outputs
from moe_dist.data.loaders import Encoded, bounded_batch, eval_batches
from moe_dist.data.mixture import even_share
from moe_dist.distributed.position import advancing, enter_phase
from moe_dist.inference.saving import load_model, load_tokenizer, save_model
from moe_dist.jobs.job import Job
from moe_dist.jobs.precision import computing_in, own_precision
from moe_dist.jobs.results import MODEL_DIR
from moe_dist.training.collectives import own_rank, wait_for_ranks
from moe_dist.training.hardware import pick_device

BATCH_SIZE = 64
BATCH_TOKENS = 4096
"""Activations of all layers are held for so many tokens at most."""


@dataclass(frozen=True, kw_only=True)
class FitOutputsJob(Job):
    """Fit output weights; rank 0 does it all, in about the time that scoring the rows takes.

    Args:
        student: a fresh one's directory.
        teacher: what it was made from.
        num_samples: training rows, drawn by the seed; None takes all.
        batch_size: samples in a batch.
        precision: `train.precision` of the recipe.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("student", "teacher")

    student: str
    teacher: str
    num_samples: int | None = None
    batch_size: int = BATCH_SIZE
    precision: str = "auto"

    def run(self) -> dict[str, Any]:
        """Fit the student, and save it as ``model``."""
        path = Path(self.stage_dir) / MODEL_DIR
        if own_rank() == 0:
            dense = load_model(Path(self.teacher), pick_device(self.parallel.use_gpu))
            student = load_model(Path(self.student))
            tokenizer = load_tokenizer(Path(self.student))
            batches = draw_rows(self, tokenizer, self.num_samples, self.batch_size)
            enter_phase("fit of output weights")
            fit_start(student, dense, batches, self.precision)
            save_model(student, path, tokenizer=tokenizer)
        wait_for_ranks()
        return {"model": str(path)}


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
        """Give batches as `eval_batches` does, longest samples first."""
        yield from advancing(
            eval_batches(self.rows, batch_size=self.batch_size, pad_token_id=self.pad_token_id)
        )


def draw_rows(
    job: Job, tokenizer: Any, num_samples: int | None, batch_size: int = BATCH_SIZE
) -> list[DrawnBatches]:
    """Draw of a job's training rows, see `draw_tasks`."""
    parts = list(job.tokenised(job.rows(), tokenizer).parts.values())
    return draw_tasks(
        [part.train for part in parts],
        num_samples=num_samples,
        seed=job.seed,
        batch_size=batch_size,
        pad_token_id=parts[0].pad_token_id,
    )


def draw_tasks(
    tasks: Sequence[Encoded],
    *,
    num_samples: int | None,
    seed: int,
    pad_token_id: int,
    batch_size: int = BATCH_SIZE,
) -> list[DrawnBatches]:
    """Draw the rows that neurons were scored on: as many of each task, `num_samples` in sum."""
    share = None if num_samples is None else even_share(num_samples, len(tasks))
    drawn = [encoded.draw(share, seed=seed) for encoded in tasks]
    return [
        DrawnBatches(own, bounded_batch(batch_size, own.lengths.max(), BATCH_TOKENS), pad_token_id)
        for own in drawn
    ]


def fit_start(
    student: nn.Module, dense: Any, batches: Sequence[DrawnBatches], precision: str
) -> None:
    """Fit a student's outputs (`fit_outputs`) on the dense model's device, and move it back."""
    home = next(student.parameters()).device
    device = next(dense.parameters()).device
    with computing_in(own_precision(precision, device, dense), device, student):
        fit_outputs(student.to(device), dense, batches)
    student.to(home)
