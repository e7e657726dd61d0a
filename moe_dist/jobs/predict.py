"""Run a saved model over a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moe_dist.data.loaders import Encoded
from moe_dist.data.tasks import Split
from moe_dist.distributed.position import enter_phase
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.jobs.job import Job
from moe_dist.jobs.job_data import measure, save_answers
from moe_dist.measure.evaluation import Predictions, expert_load, predict
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
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    split: Split = "dev"
    batch_size: int = 64
    output_name: str = "predictions"

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

        def answer(encoded: Encoded, options: Mapping[str, Any]) -> Predictions:
            return predict(
                model,
                encoded,
                batch_size=self.batch_size,
                pad_token_id=data.pad_token_id,
                device=device,
                options=options,
            )

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
