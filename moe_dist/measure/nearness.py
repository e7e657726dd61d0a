"""Running a teacher and its students over the same samples, to see how near they are to it.

Shapes: N samples, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.hidden_states import StackStates, hidden_stacks, stack_depths
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.losses.imitation import hidden_errors
from moe_dist.training.step import model_inputs
from moe_dist.training.transfer import ahead


@torch.no_grad()
def measure_hidden_errors(
    teacher: nn.Module,
    students: Mapping[str, nn.Module],
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """Compare students' hidden states with their teacher's, in this process alone.

    Each batch goes through the teacher once, then through every student. All models are in
    evaluation mode and on one device; students of another depth or width are left out. Results, by
    name: (N,) float32 from `hidden_errors`, after every layer, embeddings left out.
    """
    shape = _shape(teacher)
    chosen = {name: model for name, model in students.items() if _shape(model) == shape}
    found = {name: torch.zeros(len(encoded)) for name in chosen}
    device = next(teacher.parameters()).device
    batches = eval_batches(encoded, batch_size=batch_size, pad_token_id=pad_token_id)
    for batch in ahead(batches, device):
        inputs = model_inputs(batch)
        expected = _states(teacher, inputs) if chosen else ()
        for name, model in chosen.items():
            errors_B = _errors(_states(model, inputs), expected)
            found[name][batch["index"].cpu()] = errors_B.cpu()
        advance()
    return found


def _states(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[StackStates, ...]:
    return hidden_stacks(model(**inputs, output_hidden_states=True), inputs)


def _errors(student: Sequence[StackStates], teacher: Sequence[StackStates]) -> Tensor:
    """The mean over all layers of all stacks."""
    layers = [
        hidden_errors([state], [match], own.mask_BS)
        for own, other in zip(student, teacher, strict=True)
        for state, match in zip(own.states[1:], other.states[1:], strict=True)
    ]
    return torch.stack(layers).mean(dim=0)


def _shape(model: Any) -> tuple[tuple[int, ...], int]:
    return stack_depths(model), model.config.hidden_size
