"""A frozen teacher's answers by sample, in place of a forward for each step.

Shapes: N samples, B of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.moe.routing import current_context


@dataclass(frozen=True, eq=False)
class TeacherAnswers:
    """What a teacher says of each training sample.

    Args:
        sample_ids_N: numbers of the samples, in ascending order, each once.
        values: (N, ...) its predictions, on the host.
        device: of the losses.
    """

    sample_ids_N: Tensor
    values: Tensor
    device: torch.device

    def of_batch(self) -> Tensor:
        """Give those to the samples that `use_samples` names, on the device: (B, ...)."""
        context = current_context()
        assert context is not None and context.sample_ids is not None, "the loop numbers samples"
        rows_B = torch.searchsorted(self.sample_ids_N, context.sample_ids.cpu())
        return self.values[rows_B].to(self.device)
