"""The losses that join student and teacher, as rows of one table.

A new loss is a pure function in `moe_dist.losses`, a row in `OBJECTIVES`, and its weight in the
recipe's `distill` section; jobs, schedules and logs follow the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from moe_dist.conversion.attention import AttentionInputs
from moe_dist.conversion.hidden_states import StackStates
from moe_dist.losses.adversarial import discriminator_features
from moe_dist.losses.alignment import POOLINGS, alignment_mse, mapping_mse
from moe_dist.losses.attention import attention_mse, attention_scores
from moe_dist.losses.distillation import (
    hidden_mse,
)
from moe_dist.losses.total import CountKind, LossTerm, LossWeight
from moe_dist.tasks import TASK_KINDS, TaskKind
from moe_dist.training.companion import Companion
from moe_dist.training.feature_maps import without_padding

if TYPE_CHECKING:
    from moe_dist.config.objectives import ObjectivesConfig

# Positions in the hidden states of student and teacher, stack after stack; a stack's first are
# its embeddings.
StatePairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ModelOutputs:
    """What one forward pass shows.

    Args:
        predictions: what `TaskKind.predictions` took out of the output.
        stacks: hidden states of each stack; empty where no loss reads them.
        attention: queries and keys of each layer; empty where no loss reads them.
    """

    predictions: Any
    stacks: Sequence[StackStates] = ()
    attention: Sequence[AttentionInputs] = ()

    @property
    def hidden(self) -> list[Tensor]:
        """(B, S, D) of every stack, one after the other."""
        return [state for stack in self.stacks for state in stack.states]

    @property
    def masks(self) -> list[Tensor | None]:
        """The mask of each hidden state."""
        return [stack.mask_BS for stack in self.stacks for _ in stack.states]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the losses of a run share.

    Args:
        temperature: softens predictions.
        pairs: which hidden states meet; None compares all of them one to one.
        pooling: a name in `POOLINGS`.
    """

    temperature: float = 1.0
    pairs: StatePairs | None = None
    pooling: str = "cls"


@dataclass(frozen=True)
class PairedOutputs:
    """A micro-batch as student and teacher saw it.

    Args:
        student: with its graph.
        teacher: without one.
        batch: what both were given.
        kind: of the task.
        settings: what the losses share.
        companion: feature maps and discriminator.
    """

    student: ModelOutputs
    teacher: ModelOutputs
    batch: Mapping[str, Tensor]
    kind: TaskKind
    settings: ObjectiveSettings
    companion: Companion

    @property
    def pairs(self) -> StatePairs:
        """Which hidden states meet."""
        if self.settings.pairs is not None:
            return self.settings.pairs
        depths = (len(self.student.hidden), len(self.teacher.hidden))
        if depths[0] != depths[1]:
            raise ValueError(
                f"the student has {depths[0]} hidden states and the teacher {depths[1]}; "
                "say which of them meet"
            )
        return tuple((index, index) for index in range(depths[0]))

    def states(self, *, written: bool | None = None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Give the hidden states that meet: the student's, the teacher's, their mask.

        Only those of the tokens that are written, or of all others, if `written` says so.
        """
        own, masks, other = self.student.hidden, self.student.masks, self.teacher.hidden
        num_read = len(own)
        if self.kind.writes:
            num_read -= len(self.student.stacks[-1].states)
        return [
            (own[index], other[match], masks[index])
            for index, match in self.pairs
            if written is None or written == (index >= num_read)
        ]

    def sentences(self) -> tuple[Tensor, Tensor]:
        """Give both models' sentence vectors of the last layer, at the teacher's width."""
        pool = POOLINGS[self.settings.pooling]
        own, other = self.student.stacks[-1], self.teacher.stacks[-1]
        return (
            self.companion.maps.map_sentence(pool(own.states[-1], own.mask_BS)),
            pool(other.states[-1], other.mask_BS),
        )


@dataclass(frozen=True)
class Objective:
    """One loss between student and teacher.

    Args:
        weight_key: its weight in the recipe's ``distill`` section.
        compute: the loss of a micro-batch, summed.
        count_kind: what the sum is divided by; None for what the kind of task says.
        reads: what it needs beside the predictions.
        is_named_by_kind: its name is the kind of task's own, `TaskKind.prediction_term`.
        compute_written: of the tokens that a kind of task writes, the part of the loss that is
            left out of `compute`, to be divided by their number.
        schedule: ``warmup`` rises with the others; ``delayed`` waits for the discriminator.
    """

    weight_key: str
    compute: Callable[[PairedOutputs], Tensor]
    count_kind: CountKind | None
    reads: frozenset[str] = frozenset()
    is_named_by_kind: bool = False
    compute_written: Callable[[PairedOutputs], Tensor] | None = None
    schedule: Literal["warmup", "delayed"] = "warmup"


def _prediction_kl(paired: PairedOutputs) -> Tensor:
    outputs = paired.student.predictions, paired.teacher.predictions
    return paired.kind.prediction_loss(*outputs, paired.batch, paired.settings.temperature)


def _soft_targets(paired: PairedOutputs) -> Tensor:
    outputs = paired.student.predictions, paired.teacher.predictions
    return paired.kind.soft_target_loss(*outputs, paired.batch, paired.settings.temperature)


def _hidden_mse(paired: PairedOutputs, *, written: bool = False) -> Tensor:
    maps = paired.companion.maps
    parts = [
        hidden_mse([maps.map_hidden(own, mask_BS)], [other], mask_BS)
        for own, other, mask_BS in paired.states(written=written)
    ]
    return torch.stack(parts).sum()


def _attention_mse(paired: PairedOutputs) -> Tensor:
    # Hidden state 0 is what the embeddings give; layer n makes hidden state n + 1.
    pairs = [(own - 1, other - 1) for own, other in paired.pairs if own > 0]
    student, teacher = paired.student.attention, paired.teacher.attention
    return attention_mse(
        [_scores(student[own]) for own, _ in pairs],
        [_scores(teacher[other]) for _, other in pairs],
        paired.batch.get("attention_mask"),
    )


def _scores(inputs: AttentionInputs) -> Tensor:
    return attention_scores(inputs.query_BSD, inputs.key_BSD, inputs.num_heads)


def _alignment_mse(paired: PairedOutputs) -> Tensor:
    return alignment_mse(*paired.sentences())


def _mapping_mse(paired: PairedOutputs) -> Tensor:
    parts = [
        mapping_mse([without_padding(own, mask_BS)], [other], [projection], mask_BS)
        for (own, other, mask_BS), projection in zip(
            paired.states(), paired.companion.maps.projections, strict=True
        )
    ]
    return torch.stack(parts).sum()


def _adversarial(paired: PairedOutputs) -> Tensor:
    adversary = paired.companion.adversary
    assert adversary is not None, "the job builds a discriminator where its weight is above 0"
    own, other = paired.sentences()
    student, teacher = (
        discriminator_features(_bounded(paired.kind, outputs.predictions), vectors)
        for outputs, vectors in ((paired.student, own), (paired.teacher, other))
    )
    return adversary.student_loss(student, teacher)


def _bounded(kind: TaskKind, predictions: Any) -> Tensor:
    bounded = kind.bounded(predictions)
    assert bounded is not None, "refused when the recipe is read"
    return bounded


_HIDDEN = frozenset({"hidden"})
OBJECTIVES: dict[str, Objective] = {
    "prediction_kl": Objective("kl_weight", _prediction_kl, None, is_named_by_kind=True),
    "soft_targets": Objective("soft_weight", _soft_targets, None),
    "hidden_mse": Objective(
        "hidden_weight",
        _hidden_mse,
        "tokens",
        _HIDDEN,
        compute_written=partial(_hidden_mse, written=True),
    ),
    "attention_mse": Objective(
        "attention_weight", _attention_mse, "samples", reads=_HIDDEN | {"attention"}
    ),
    "alignment_mse": Objective("alignment_weight", _alignment_mse, "samples", reads=_HIDDEN),
    "mapping_mse": Objective("mapping_weight", _mapping_mse, "tokens", reads=_HIDDEN),
    "adversarial": Objective(
        "adversarial_weight", _adversarial, "samples", reads=_HIDDEN, schedule="delayed"
    ),
}


def chosen_objectives(section: ObjectivesConfig) -> tuple[str, ...]:
    """Name the objectives that a recipe gives a weight: keys of `OBJECTIVES`."""
    return tuple(name for name, row in OBJECTIVES.items() if getattr(section, row.weight_key) > 0)


def objective_weights(section: ObjectivesConfig, num_steps: int) -> dict[str, LossWeight]:
    """Turn a recipe's weights into a schedule for each objective's term, over so many steps."""
    lengths = {
        "warmup": round(section.warmup_fraction * num_steps),
        "delayed": round(section.adversarial_warmup_fraction * num_steps),
    }
    weights: dict[str, LossWeight] = {}
    for name, row in OBJECTIVES.items():
        weight = LossWeight(getattr(section, row.weight_key), row.schedule, lengths[row.schedule])
        weights |= dict.fromkeys(_names(name), weight)
    return weights


def _names(objective: str) -> tuple[str, ...]:
    """What an objective's term is called, whatever the kind of task."""
    if not OBJECTIVES[objective].is_named_by_kind:
        return (objective,)
    return tuple(dict.fromkeys(kind.prediction_term for kind in TASK_KINDS.values()))


def reads(names: Collection[str], what: str) -> bool:
    """Tell whether an objective needs the ``hidden`` or ``attention`` of a forward pass."""
    return any(what in OBJECTIVES[name].reads for name in names)


def objective_terms(names: Collection[str], paired: PairedOutputs) -> dict[str, LossTerm]:
    """Compute a micro-batch's losses by name (keys of `OBJECTIVES`), undivided and unweighted."""
    terms = {}
    for name in names:
        row = OBJECTIVES[name]
        shown = paired.kind.prediction_term if row.is_named_by_kind else name
        more: tuple[LossTerm, ...] = ()
        if row.compute_written is not None and paired.kind.writes:
            more = (LossTerm(row.compute_written(paired), "targets"),)
        count_kind = row.count_kind or paired.kind.count_kind
        terms[shown] = LossTerm(row.compute(paired), count_kind, more)
    return terms


def pair_stacks(depths: Sequence[int], which: str | int = "all") -> StatePairs:
    """Say which hidden states meet, in each stack as in `pair_states`; the student's first."""
    pairs: list[tuple[int, int]] = []
    first = 0
    for depth in depths:
        own = pair_states(range(depth), which)
        pairs += [(first + index, first + match) for index, match in own]
        first += depth + 1
    return tuple(pairs)


def pair_states(layers: Sequence[int], which: str | int = "all") -> StatePairs:
    """Pair positions of hidden states; `layers` has the teacher's of each student's, from 0.

    `which`: ``all`` with the embeddings, the ``last``, or every so many counted back from it.
    """
    pairs = ((0, 0), *((own + 1, other + 1) for own, other in enumerate(layers)))
    step = {"all": 1, "last": len(pairs)}.get(which) if isinstance(which, str) else which
    assert step is not None, f"hidden_layers={which!r} is checked with the recipe"
    return tuple(sorted(pairs[::-1][::step]))
