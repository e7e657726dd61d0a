"""Learned maps from a student's width to its teacher's, trained beside the student.

Shapes: D student width, W teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class FeatureMaps(nn.Module):
    """The maps that the losses of one run need; none where the widths are equal.

    They start as what the student was cut from: dimension j of the student goes to the teacher's
    dimension that it started as, so that nothing has to be found again. TinyBERT's start at random
    and have a bias.

    Args:
        student_width: D.
        teacher_width: W.
        hidden_ids: the teacher's dimension of each of the student's.
        hidden: make the one map of all hidden states.
        sentence: make the map of sentence vectors.
        num_projections: projections of single layers, for feature mapping.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        hidden_ids: Sequence[int] | None = None,
        hidden: bool = False,
        sentence: bool = False,
        num_projections: int = 0,
    ) -> None:
        super().__init__()
        ids = list(range(student_width)) if hidden_ids is None else list(hidden_ids)
        start_WD = torch.zeros(teacher_width, student_width)
        start_WD[ids, torch.arange(student_width)] = 1.0
        differ = student_width != teacher_width
        self.hidden = nn.Parameter(start_WD.clone()) if hidden and differ else None
        self.sentence = nn.Parameter(start_WD.clone()) if sentence and differ else None
        self.projections = nn.ParameterList(
            [nn.Parameter(start_WD.clone()) for _ in range(num_projections)]
        )

    def map_hidden(self, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Carry hidden states to the teacher's width, (B, S, W); unchanged where it is theirs."""
        if self.hidden is None:
            return hidden_BSD
        return _mapped(without_padding(hidden_BSD, mask_BS), self.hidden)

    def map_sentence(self, vectors_BD: Tensor) -> Tensor:
        """Carry sentence vectors to the teacher's width; unchanged where it is theirs."""
        return vectors_BD if self.sentence is None else _mapped(vectors_BD, self.sentence)


def without_padding(hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Set padding to 0, so that it reaches no gradient of a map, whatever it holds."""
    if mask_BS is None:
        return hidden_BSD
    return hidden_BSD.masked_fill(~mask_BS.bool().unsqueeze(-1), 0.0)


def _mapped(features: Tensor, weight_WD: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return functional.linear(features.float(), weight_WD.float())
