"""Running a teacher and its students over the same samples, to see how near they are to it.

Shapes: N samples, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import answered_kind
from moe_dist.conversion.hidden_states import StackStates, hidden_stacks, stack_depths
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.losses.imitation import hidden_errors
from moe_dist.tasks.kind import TaskKind, num_targets
from moe_dist.training.transfer import ahead


@torch.no_grad()
def measure_errors(
    teacher: nn.Module,
    students: Mapping[str, nn.Module],
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[], None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare students' hidden states and predictions with their teacher's, in this process alone.

    Each batch goes through the teacher once, then through every student. All models are in
    evaluation mode and on one device.

    Args:
        teacher: what students are compared with.
        students: by name.
        encoded: the samples.
        batch_size: samples for one forward.
        pad_token_id: fills up shorter samples.
        advance: called after each batch.

    Returns:
        By name (N,) float32 of hidden states, from `hidden_errors`, after every layer, embeddings
        left out, without students of another depth or width; and the same of predictions, from
        `TaskKind.prediction_errors`, the mean over a sample's targets.
    """
    shape, kind = _shape(teacher), answered_kind(teacher)
    hidden = {
        name: torch.zeros(len(encoded))
        for name, model in students.items()
        if _shape(model) == shape
    }
    predicted = {name: torch.zeros(len(encoded)) for name in students}
    device = next(teacher.parameters()).device
    batches = eval_batches(encoded, batch_size=batch_size, pad_token_id=pad_token_id)
    for batch in ahead(batches, device):
        positions = batch["index"].cpu()
        counts_B = num_targets(batch).to(device).clamp(min=1)
        expected, target = _run(teacher, kind, batch)
        for name, model in students.items():
            states, own = _run(model, kind, batch)
            errors_B = kind.prediction_errors(own, target, batch) / counts_B
            predicted[name][positions] = errors_B.float().cpu()
            if name in hidden:
                hidden[name][positions] = _errors(states, expected).cpu()
        advance()
    return hidden, predicted


def _run(
    model: nn.Module, kind: TaskKind, batch: Mapping[str, Tensor]
) -> tuple[tuple[StackStates, ...], Any]:
    inputs = kind.inputs(model, batch)
    output = kind.run(model, batch, output_hidden_states=True)
    return hidden_stacks(output, inputs), kind.predictions(model, output, batch)


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
