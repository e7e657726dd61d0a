"""What the kinds of tasks share whose models answer a text with one forward call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.tasks.kind import TaskKind
from moe_dist.tasks.tokens import pad, tokenise


class ForwardKind(TaskKind):
    """A served answer is what `TaskKind.answer` gives, put into columns."""

    def serve(
        self,
        model: Any,
        tokenizer: Any,
        columns: Sequence[Sequence[str]],
        *,
        max_length: int,
        label_names: Sequence[str] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
        calibration: float | None = None,
    ) -> list[dict[str, Any]]:
        """Answer each text, cut at `max_length`; see `TaskKind.serve`.

        One without tokens, as an empty one is to a tokenizer that adds none, is a DataError.
        """
        tokens = tokenise(tokenizer, *columns, max_length=max_length)
        if not all(tokens["input_ids"]):
            raise DataError(
                "a text has no tokens, and the model's answer would be about nothing",
                remedy="leave empty texts out",
            )
        encoded = pad(tokenizer, tokens).to(model.device)
        with torch.no_grad():
            answers_BC = self.answer(model, encoded, options).float().cpu()
        return self.served(answers_BC, label_names)

    @abstractmethod
    def served(self, answers: Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """What answers (B, C) say of each text, by column.

        `label_names` are the classes, none where there are none.
        """
