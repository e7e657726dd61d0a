"""Score a model's feed-forward neurons on training samples, summed over workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_dist.conversion import score_importance
from moe_dist.conversion.expert_importance import score_expert_importance
from moe_dist.conversion.importance import evened
from moe_dist.data.loaders import Encoded, bounded_batch, eval_batches
from moe_dist.data.mixture import even_share
from moe_dist.distributed.position import advancing, enter_phase
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.fit_outputs import BATCH_SIZE, BATCH_TOKENS
from moe_dist.jobs.job import Job
from moe_dist.jobs.precision import computing_in, model_precision
from moe_dist.jobs.results import SCORES, save_scores
from moe_dist.moe.routing import use_task
from moe_dist.training.collectives import num_ranks, own_rank, sum_over_ranks, wait_for_ranks
from moe_dist.training.hardware import pick_device


@dataclass(frozen=True, kw_only=True)
class ImportanceJob(Job):
    """Score neurons; of a converted model those of its experts (`score_expert_importance`).

    Tasks count alike: of several, each layer's scores are divided by their sum before they are
    added, whatever the losses and the number of rows.

    Args:
        model: the directory of a fine-tuned teacher, or of a student.
        num_samples: training rows, drawn by the seed; None takes all.
        batch_size: samples in a batch.
        precision: `train.precision` of the recipe.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    num_samples: int | None = None
    batch_size: int = BATCH_SIZE
    precision: str = "auto"

    def run(self) -> dict[str, Any]:
        """Score, and write ``scores``, the file; ``num_samples`` says how many rows were read."""
        rows = self.rows()
        device = pick_device(self.parallel.use_gpu)
        model = load_model(Path(self.model), device)
        data = self.tokenised(rows, load_tokenizer(Path(self.model)))
        enter_phase("scoring of importance")
        precision = model_precision(self.precision, device, model)
        scores: list[Tensor] = []
        num_samples = 0
        for number, (name, part) in enumerate(data.parts.items()):
            limit = self.num_samples
            share = None if limit is None else even_share(limit, len(data.parts))
            encoded = part.train.draw(share, seed=self.seed)
            num_samples += len(encoded)
            task = use_task(number if name else None)
            with task, computing_in(precision, device, model):
                own = _score(model, encoded, part.pad_token_id, device, self.batch_size)
            if name:
                own = evened(own)
            scores = [a + b for a, b in zip(scores, own, strict=True)] if scores else own
        path = Path(self.stage_dir) / SCORES
        if own_rank() == 0:
            save_scores(scores, path)
        wait_for_ranks()
        return {"scores": str(path), "num_samples": num_samples}


def _score(
    model: nn.Module, encoded: Encoded, pad_token_id: int, device: torch.device, batch_size: int
) -> list[Tensor]:
    """Score the neurons on one task's samples, each rank on its share."""
    # Fewer samples than workers: every worker scores all of them instead of some scoring none.
    shared = len(encoded) >= num_ranks() > 1
    mine = encoded.subset(range(own_rank(), len(encoded), num_ranks())) if shared else encoded
    bounded = bounded_batch(batch_size, mine.lengths.max(), BATCH_TOKENS)
    batches = eval_batches(mine, batch_size=bounded, pad_token_id=pad_token_id)
    score = score_expert_importance if hasattr(model.config, "moe") else score_importance
    scores = score(model, advancing(batches))
    if shared:
        scores = [sum_over_ranks(score_F.to(device)).cpu() for score_F in scores]
    return scores
