"""Score each expert's neurons on training rows: of the task, or the kind of tokens, it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_dist.config.moe_section import MoeConfig
from moe_dist.conversion import PARTITIONS
from moe_dist.conversion.activity import task_importance
from moe_dist.conversion.token_clusters import token_clusters
from moe_dist.distributed.position import enter_phase
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.fit_outputs import DrawnBatches, draw_rows
from moe_dist.jobs.job import Job
from moe_dist.jobs.precision import computing_in, own_precision
from moe_dist.jobs.results import load_tensors, save_tensors
from moe_dist.training.collectives import own_rank, wait_for_ranks
from moe_dist.training.hardware import pick_device

EXPERT_SCORES = "expert_scores.safetensors"


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """What a partition by experts starts from.

    Args:
        scores: for each FFN (E, F) float32, the neurons' importance for each expert.
        gates: for each FFN (E, D) float32, what tells the experts' tokens apart; None where that is
            not by tokens.
    """

    scores: tuple[Tensor, ...]
    gates: tuple[Tensor, ...] | None = None

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        named = {f"scores.{index:04d}": one for index, one in enumerate(self.scores)}
        named |= {f"gates.{index:04d}": one for index, one in enumerate(self.gates or ())}
        save_tensors(named, path)

    @classmethod
    def load(cls, path: Path) -> ExpertScores:
        """Read what `save` wrote; a missing or damaged file is a CheckpointError."""
        named = load_tensors(path, what="the experts' scores", stage="adapt")
        kinds = {
            kind: tuple(named[name] for name in sorted(named) if name.startswith(f"{kind}."))
            for kind in ("scores", "gates")
        }
        return cls(kinds["scores"], kinds["gates"] or None)


@dataclass(frozen=True, kw_only=True)
class ExpertScoresJob(Job):
    """Score neurons for each expert (`score_experts`); rank 0 does it all.

    Args:
        model: the directory of the model that is to be split.
        moe: the recipe's section.
        precision: `train.precision` of the recipe.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    moe: MoeConfig
    precision: str = "auto"

    def run(self) -> dict[str, Any]:
        """Score, and write ``expert_scores``, the file."""
        path = Path(self.stage_dir) / EXPERT_SCORES
        if own_rank() == 0:
            model = load_model(Path(self.model), pick_device(self.parallel.use_gpu))
            tokenizer = load_tokenizer(Path(self.model))
            batches = draw_rows(self, tokenizer, self.moe.importance_samples)
            enter_phase("scoring of experts")
            scored = score_experts(self.moe, model, batches, self.precision, seed=self.seed)
            scored.save(path)
        wait_for_ranks()
        return {"expert_scores": str(path)}


def score_experts(
    moe: MoeConfig, model: Any, batches: Sequence[DrawnBatches], precision: str, *, seed: int
) -> ExpertScores:
    """Score a model's neurons for each expert of a partition that needs it, on the model's device.

    Args:
        moe: says the partition and how many experts there are.
        model: a dense one; it is left as it was.
        batches: of each task.
        precision: `train.precision` of the recipe.
        seed: of what is drawn.

    Returns:
        The scores, and gates where experts are for kinds of tokens.
    """
    device = next(model.parameters()).device
    with computing_in(own_precision(precision, device, model), device, model):
        if PARTITIONS[moe.partition].reads == "tasks":
            scores = task_importance(model, batches, moe.num_experts, top_k=moe.top_k)
            return ExpertScores(tuple(one.to(torch.float32) for one in scores))
        clusters = token_clusters(model, batches, moe.num_experts, seed=seed)
    return ExpertScores(clusters.scores, clusters.gates)
