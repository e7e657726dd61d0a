"""Which neurons of each FFN go to which expert.

Shapes: F FFN, E experts, s shared neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError


@dataclass(frozen=True, eq=False)
class LayerPartition:
    """One FFN's split.

    Args:
        layer: the FFN's index in the model.
        num_neurons: F.
        shared_ids: (s,) int64, neurons that every expert holds.
        expert_ids: (E, expert_size) int64, each expert's neurons, the shared ones first.
    """

    layer: int
    num_neurons: int
    shared_ids: Tensor
    expert_ids: Tensor

    @property
    def kept_ids(self) -> Tensor:
        """Distinct neurons that survive, ascending."""
        return torch.unique(self.expert_ids)


@dataclass(frozen=True, eq=False)
class PartitionPlan:
    """How a whole model is split.

    Args:
        num_experts: E; 1 is the plain pruned dense student.
        expert_size: neurons that one expert computes for a token, shared ones included.
        num_shared_neurons: s.
        method: the name in `PARTITIONS`.
        tie_shared: the shared neurons stay one set of weights, computed once for each token.
        seed: what random methods drew from.
        num_layers: FFNs of the model, converted or not.
        partitions: one for each converted FFN, by ascending index.
    """

    num_experts: int
    expert_size: int
    num_shared_neurons: int
    method: str
    tie_shared: bool
    seed: int
    num_layers: int
    partitions: tuple[LayerPartition, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the FFNs that become mixtures."""
        return tuple(part.layer for part in self.partitions)

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as plain values.

        Returns:
            What JSON can hold.
        """
        return {
            "num_experts": self.num_experts,
            "expert_size": self.expert_size,
            "num_shared_neurons": self.num_shared_neurons,
            "method": self.method,
            "tie_shared": self.tie_shared,
            "seed": self.seed,
            "num_layers": self.num_layers,
            "partitions": [
                {
                    "layer": part.layer,
                    "num_neurons": part.num_neurons,
                    "shared_ids": part.shared_ids.tolist(),
                    "expert_ids": part.expert_ids.tolist(),
                }
                for part in self.partitions
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PartitionPlan:
        """Build a plan from `to_dict`'s values.

        Args:
            values: as `to_dict` gives them.

        Returns:
            The plan.

        Raises:
            ConversionError: if something is missing.
        """
        try:
            parts = tuple(
                LayerPartition(
                    layer=int(part["layer"]),
                    num_neurons=int(part["num_neurons"]),
                    shared_ids=torch.tensor(part["shared_ids"], dtype=torch.int64),
                    expert_ids=torch.tensor(part["expert_ids"], dtype=torch.int64),
                )
                for part in values["partitions"]
            )
            return cls(
                num_experts=int(values["num_experts"]),
                expert_size=int(values["expert_size"]),
                num_shared_neurons=int(values["num_shared_neurons"]),
                method=str(values["method"]),
                tie_shared=bool(values["tie_shared"]),
                seed=int(values["seed"]),
                num_layers=int(values["num_layers"]),
                partitions=parts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(
                f"not a partition plan: {error!r}",
                remedy="make the plan again with plan_partition",
            ) from error

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON.

        Args:
            path: the file.
        """
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> PartitionPlan:
        """Read a plan that `save` wrote.

        Args:
            path: the file.

        Returns:
            The plan.

        Raises:
            ConversionError: if the file does not hold one.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{path} holds no partition plan: {error}",
                remedy="make the plan again with plan_partition",
            ) from error
        return cls.from_dict(values)


@dataclass(frozen=True, eq=False)
class PartitionRequest:
    """What a partition method is given for one FFN.

    Args:
        layer: the FFN's index.
        scores_F: importance of its neurons.
        num_experts: E.
        expert_size: neurons for each expert, shared ones included.
        num_shared_neurons: s.
        generator: where random methods draw from.
        model: the dense model, if the caller gave it.
        batches: training batches, if the caller gave them.
    """

    layer: int
    scores_F: Tensor
    num_experts: int
    expert_size: int
    num_shared_neurons: int
    generator: torch.Generator
    model: nn.Module | None = None
    batches: Iterable[Mapping[str, Any]] | None = None


def by_importance(request: PartitionRequest) -> LayerPartition:
    """Share the most important neurons and deal out the next ones.

    Args:
        request: the FFN.

    Returns:
        Its split.

    Source: MoEBERT, 2022.naacl-main.116.
    """
    return _deal(request, torch.argsort(request.scores_F, descending=True, stable=True))


def by_inverse_importance(request: PartitionRequest) -> LayerPartition:
    """Keep the least important neurons: the ablation that shows what the scores are worth.

    Args:
        request: the FFN.

    Returns:
        Its split.
    """
    return _deal(request, torch.argsort(request.scores_F, stable=True))


def at_random(request: PartitionRequest) -> LayerPartition:
    """Keep and share neurons drawn at random.

    Args:
        request: the FFN.

    Returns:
        Its split.
    """
    num_neurons = request.scores_F.numel()
    return _deal(request, torch.randperm(num_neurons, generator=request.generator))


def full_copy(request: PartitionRequest) -> LayerPartition:
    """Give every expert all neurons (upcycling).

    Args:
        request: the FFN; its expert_size is F.

    Returns:
        Its split.

    Raises:
        ConversionError: if expert_size is not F.
    """
    num_neurons = request.scores_F.numel()
    if request.expert_size != num_neurons:
        raise ConversionError(
            f"partition method 'full_copy' copies all {num_neurons} neurons of FFN "
            f"{request.layer}, but expert_size is {request.expert_size}",
            remedy=f"set expert_size to {num_neurons}, or take another partition method",
        )
    order = torch.argsort(request.scores_F, descending=True, stable=True)
    return LayerPartition(
        layer=request.layer,
        num_neurons=num_neurons,
        shared_ids=order[: request.num_shared_neurons],
        expert_ids=order.repeat(request.num_experts, 1),
    )


PARTITIONS: dict[str, Callable[[PartitionRequest], LayerPartition]] = {
    "importance": by_importance,
    "random": at_random,
    "inverse": by_inverse_importance,
    "full_copy": full_copy,
}


def plan_partition(
    scores: Sequence[Tensor],
    *,
    num_experts: int,
    expert_size: int,
    num_shared_neurons: int,
    method: str = "importance",
    tie_shared: bool = False,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> PartitionPlan:
    """Plan the split of every FFN that shall become a mixture of experts.

    With one expert there is nobody to share with: the plan is then the plain pruned dense
    student of the `expert_size` best neurons, untied, whatever the sharing arguments say.

    Args:
        scores: one (F,) tensor for each FFN of the model, from `score_importance`.
        num_experts: E.
        expert_size: neurons that one expert computes for a token, shared ones included.
        num_shared_neurons: how many of them all experts hold.
        method: a name in `PARTITIONS`.
        tie_shared: keep the shared neurons as one set of weights.
        layers: indices of the FFNs to convert; None converts all.
        seed: of random methods.
        model: the dense model; its FFNs are checked against the scores.
        batches: training batches, for methods that look at activations.

    Returns:
        The plan.

    Raises:
        ConversionError: if the sizes cannot be met, or the scores do not fit.
    """
    if method not in PARTITIONS:
        raise ConversionError(
            f"there is no partition method {method!r}",
            remedy=f"use one of {', '.join(PARTITIONS)}",
        )
    checked = [_checked_scores(index, one) for index, one in enumerate(scores)]
    _check_model(checked, model)
    chosen = _checked_layers(layers, len(checked))
    if num_experts == 1:
        num_shared_neurons, tie_shared = 0, False
    distinct = method != "full_copy"
    for index in chosen:
        _check_sizes(
            index, checked[index].numel(), num_experts, expert_size, num_shared_neurons, distinct
        )
    partitions = []
    for index in chosen:
        # A generator for each FFN: its draw does not depend on which others are converted.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        partitions.append(
            PARTITIONS[method](
                PartitionRequest(
                    layer=index,
                    scores_F=checked[index],
                    num_experts=num_experts,
                    expert_size=expert_size,
                    num_shared_neurons=num_shared_neurons,
                    generator=generator,
                    model=model,
                    batches=batches,
                )
            )
        )
    return PartitionPlan(
        num_experts=num_experts,
        expert_size=expert_size,
        num_shared_neurons=num_shared_neurons,
        method=method,
        tie_shared=tie_shared,
        seed=seed,
        num_layers=len(checked),
        partitions=tuple(partitions),
    )


def _deal(request: PartitionRequest, order: Tensor) -> LayerPartition:
    """The first s neurons to all; every E-th of the rest to each expert, until it is full."""
    shared = order[: request.num_shared_neurons]
    rest = order[request.num_shared_neurons :]
    num_private = request.expert_size - request.num_shared_neurons
    experts = [
        torch.cat([shared, rest[expert :: request.num_experts][:num_private]])
        for expert in range(request.num_experts)
    ]
    return LayerPartition(
        layer=request.layer,
        num_neurons=order.numel(),
        shared_ids=shared,
        expert_ids=torch.stack(experts),
    )


def _checked_scores(index: int, scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.dim() != 1 or scores.numel() == 0:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConversionError(
            f"scores of FFN {index} must be one number for each neuron, not {shape}",
            remedy="pass the list that score_importance returned",
        )
    scores = scores.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(scores).all()):
        raise ConversionError(
            f"scores of FFN {index} are not all finite",
            remedy="check the teacher and its training data for NaN and infinity",
        )
    return scores


def _checked_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if num_layers == 0:
        raise ConversionError(
            "there are no scores", remedy="pass the list that score_importance returned"
        )
    if layers is None:
        return tuple(range(num_layers))
    chosen = sorted(set(layers))
    wrong = [index for index in chosen if not 0 <= index < num_layers]
    if wrong or not chosen:
        raise ConversionError(
            f"layers names FFNs that the model does not have: {wrong}"
            if wrong
            else "layers is empty, so there is nothing to convert",
            remedy=f"choose from 0 to {num_layers - 1}, or leave layers out to convert all",
        )
    return tuple(chosen)


def _check_model(scores: Sequence[Tensor], model: nn.Module | None) -> None:
    if model is None:
        return
    from moe_dist.conversion.families import find_slots

    sizes = [slot.num_neurons for slot in find_slots(model)]
    given = [one.numel() for one in scores]
    if sizes != given:
        raise ConversionError(
            f"scores are for FFNs of {given} neurons, but the model has {sizes}",
            remedy="score this model with score_importance",
        )


def _check_sizes(
    layer: int,
    num_neurons: int,
    num_experts: int,
    expert_size: int,
    num_shared: int,
    distinct: bool,
) -> None:
    if num_experts < 1 or expert_size < 1 or num_shared < 0:
        raise ConversionError(
            f"num_experts={num_experts}, expert_size={expert_size} and num_shared_neurons="
            f"{num_shared} leave nothing to compute",
            remedy="take at least one expert and one neuron, and no negative share",
        )
    if expert_size > num_neurons:
        raise ConversionError(
            f"expert_size={expert_size} is larger than FFN {layer}, which has {num_neurons} "
            "neurons",
            remedy=f"set expert_size to {num_neurons} or less",
        )
    if num_shared > expert_size:
        raise ConversionError(
            f"num_shared_neurons={num_shared} is larger than expert_size={expert_size}",
            remedy="shared neurons count as part of each expert; share fewer",
        )
    needed = num_shared + num_experts * (expert_size - num_shared)
    if distinct and needed > num_neurons:
        largest = num_shared + (num_neurons - num_shared) // num_experts
        raise ConversionError(
            f"{num_experts} experts of {expert_size} neurons with {num_shared} shared need "
            f"{needed} different neurons, but FFN {layer} has {num_neurons}",
            remedy=f"set expert_size to {largest} or less, share more, or use 'full_copy'",
        )
