"""Fine-tune a pre-trained model on the task, or on several at once: the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moe_dist.conversion.heads import set_heads
from moe_dist.data.mixture import Mixture
from moe_dist.inference.pretrained import load_pretrained
from moe_dist.jobs.job import TrainJob
from moe_dist.jobs.job_data import label_names, shared_kind, shared_options, task_heads
from moe_dist.jobs.train_job import keep_model, train_model
from moe_dist.losses.total import LossWeight
from moe_dist.timeline import mark
from moe_dist.training.step import finetune_terms

if TYPE_CHECKING:
    from moe_dist.data.tasks import Split


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(TrainJob):
    """Fine-tune a pre-trained model.

    Args:
        model: a directory or hub id.
        revision: a hub commit, tag or branch; the newest when not given.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model",)
    TRAINS_ON: ClassVar[Split] = "finetuned"

    model: str
    revision: str | None = None

    def run(self) -> dict[str, Any]:
        """Train and save the model; see `train_model`. No epochs: `keep_model`."""
        rows = self.rows()
        mark("rows")
        heads = task_heads(rows) if isinstance(rows, Mixture) else ()
        model, tokenizer = load_pretrained(
            self.model,
            num_labels=rows.num_labels,
            label_names=label_names(rows),
            kind=shared_kind(rows),
            options=shared_options(rows),
            revision=self.revision,
            seed=self.seed,
        )
        if heads:
            set_heads(model, heads)
        mark("model")
        data = self.tokenised(rows, tokenizer)
        if self.train.num_epochs == 0:
            return keep_model(model, data, self)
        return train_model(
            model, data, finetune_terms, lambda num_steps: {"task": LossWeight(1.0)}, self
        )
