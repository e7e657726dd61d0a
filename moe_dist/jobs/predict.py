"""Run a saved model over a split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from moe_dist.data.tasks import Split
from moe_dist.distributed.position import enter_phase
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.job import Job
from moe_dist.jobs.job_data import count_use, measure, save_answers
from moe_dist.measure.evaluation import expert_load, predict
from moe_dist.training.collectives import own_rank, wait_for_ranks
from moe_dist.training.hardware import pick_device


@dataclass(frozen=True, kw_only=True)
class PredictJob(Job):
    """Run a model over a split, of each task if there are several.

    Args:
        model: its directory.
        split: which rows.
        batch_size: samples in a batch.
        output_name: of the file with the answers, in the stage's directory.
        measures: bring answers into metrics; without, only the experts' load is found.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    split: Split = "dev"
    batch_size: int = 64
    output_name: str = "predictions"
    measures: bool = True

    def run(self) -> dict[str, Any]:
        """Predict and measure.

        Returns:
            ``predictions`` (the logits, (N, C) float32) by task ("" where there is one),
            ``metrics`` and ``metric_titles`` by name, which way the main one is better
            (``higher_is_better``), and ``expert_load`` by layer.
        """
        rows = self.rows()
        device = pick_device(self.parallel.use_gpu)
        model = load_model(Path(self.model), device)
        data = self.tokenised(rows, load_tokenizer(Path(self.model)))
        enter_phase("prediction")
        answer = partial(
            predict,
            model,
            batch_size=self.batch_size,
            pad_token_id=data.pad_token_id,
            device=device,
        )
        if not self.measures:
            return {"expert_load": expert_load(count_use(data, answer, self.split))}
        measured = measure(data, answer, self.split)
        if own_rank() == 0:
            save_answers(data, measured, Path(self.stage_dir) / f"{self.output_name}.npz")
        wait_for_ranks()
        return {
            "predictions": {name: one.values for name, one in measured.figures.items()},
            "metrics": measured.metrics,
            "metric_titles": rows.metric_titles,
            "higher_is_better": rows.higher_is_better,
            "expert_load": expert_load(measured.tokens_per_expert),
        }
