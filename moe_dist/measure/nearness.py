"""Running a teacher and its students over the same samples, to see how near they are to it.

Shapes: N samples, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import answered_kind
from moe_dist.conversion.hidden_states import StackStates, hidden_stacks, stack_depths
from moe_dist.data.loaders import Encoded, eval_batches
from moe_dist.losses.imitation import hidden_errors
from moe_dist.measure.evaluation import AnswerSums, Predictions
from moe_dist.moe.routing import record_routing
from moe_dist.tasks.kind import TaskKind, num_targets
from moe_dist.training.transfer import ahead


@dataclass(frozen=True)
class Compared:
    """How near students are to their teacher, and what all of them answered on the way.

    Attributes:
        hidden: by name (N,) float32, from `hidden_errors`, of the states after every layer,
            embeddings left out; without students of another depth or width.
        predicted: by name (N,) float32, from `TaskKind.prediction_errors`, the mean over a
            sample's targets.
        teacher: what `predict` gives for the teacher in this process alone, in float32; None where
            answers are more than predictions (`answers_by_predictions`).
        students: the same by name.
    """

    hidden: dict[str, Tensor]
    predicted: dict[str, Tensor]
    teacher: Predictions | None = None
    students: dict[str, Predictions] = field(default_factory=dict)


@torch.no_grad()
def measure_errors(
    teacher: nn.Module,
    students: Mapping[str, nn.Module],
    encoded: Encoded,
    *,
    batch_size: int,
    pad_token_id: int,
    advance: Callable[[], None],
) -> Compared:
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
        The errors, and what the models answered.
    """
    shape, kind = _shape(teacher), answered_kind(teacher)
    hidden = {
        name: torch.zeros(len(encoded))
        for name, model in students.items()
        if _shape(model) == shape
    }
    predicted = {name: torch.zeros(len(encoded)) for name in students}
    answers = [AnswerSums(len(encoded)) for _ in ("the teacher", *students)]
    own_answers = dict(zip(students, answers[1:], strict=True))
    device = next(teacher.parameters()).device
    batches = eval_batches(encoded, batch_size=batch_size, pad_token_id=pad_token_id)
    for batch in ahead(batches, device):
        positions = batch["index"].cpu()
        counts_B = num_targets(batch).to(device).clamp(min=1)
        expected, target = _run(teacher, kind, batch, answers[0])
        for name, model in students.items():
            states, own = _run(model, kind, batch, own_answers[name])
            errors_B = kind.prediction_errors(own, target, batch) / counts_B
            predicted[name][positions] = errors_B.float().cpu()
            if name in hidden:
                hidden[name][positions] = _errors(states, expected).cpu()
        advance()
    if not answers_by_predictions(kind):
        return Compared(hidden, predicted)
    said = {name: one.predictions() for name, one in own_answers.items()}
    return Compared(hidden, predicted, answers[0].predictions(), said)


def answers_by_predictions(kind: TaskKind) -> bool:
    """Whether a kind's answers are its predictions, so that one pass gives both."""
    return type(kind).answer is TaskKind.answer and not kind.writes


def _run(
    model: nn.Module, kind: TaskKind, batch: Mapping[str, Tensor], answers: AnswerSums
) -> tuple[tuple[StackStates, ...], Any]:
    inputs = kind.inputs(model, batch)
    with record_routing() as record:
        output = kind.run(model, batch, output_hidden_states=True)
    predictions = kind.predictions(model, output, batch)
    if answers_by_predictions(kind):
        answers.add(batch, predictions.float(), record)
    return hidden_stacks(output, inputs), predictions


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
