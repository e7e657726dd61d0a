"""Planning the split of a whole model.

Shapes: F FFN, E experts, s shared neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.activity import cluster_importance, coactivation
from moe_dist.conversion.families import find_slots
from moe_dist.conversion.partition_methods import PARTITIONS, PartitionMethod, PartitionRequest
from moe_dist.conversion.partition_plan import LayerPartition, PartitionPlan
from moe_dist.errors import ConversionError, MissingInputError

__all__ = ["PARTITIONS", "LayerPartition", "PartitionPlan", "plan_partition"]


_HOMES_OF_EXPERT_SCORES = {"task_importance": "activity", "token_clusters": "token_clusters"}


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
    expert_scores: Sequence[Tensor] | None = None,
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
        model: the dense model; its FFNs are checked against the scores. Needed by kmeans,
            coactivation and clustered_importance.
        batches: training batches as `score_importance` takes them; needed by the last two.
        expert_scores: one (E, F) tensor for each FFN of the model, the importance for the data of
            each expert; needed by task_importance (from the function of that name) and
            token_clusters (likewise).

    Returns:
        The plan.

    Raises:
        ConversionError: if the sizes cannot be met, or the scores do not fit.
        MissingInputError: if the method needs the model or batches, and they were not given.
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
    row = PARTITIONS[method]
    if num_experts == 1 and row.reads != "scores":
        # One expert has nobody to be told from: it takes what matters most.
        row = PARTITIONS["importance"]
    for index in chosen:
        sizes = (checked[index].numel(), num_experts, expert_size, num_shared_neurons)
        _check_sizes(index, *sizes, row.distinct)
    requests = [
        PartitionRequest(
            layer=index,
            scores_F=checked[index],
            num_experts=num_experts,
            expert_size=expert_size,
            num_shared_neurons=num_shared_neurons,
            # Of its own for each FFN: its draw does not depend on which others are converted.
            generator=torch.Generator().manual_seed(seed * 1_000_003 + index),
        )
        for index in chosen
    ]
    if row.needs_expert_scores:
        requests = _with_expert_scores(requests, method, checked, expert_scores)
    requests = _with_evidence(requests, method, row, model, batches, seed)
    return PartitionPlan(
        num_experts=num_experts,
        expert_size=expert_size,
        num_shared_neurons=num_shared_neurons,
        method=method,
        tie_shared=tie_shared,
        seed=seed,
        num_layers=len(checked),
        partitions=tuple(row.split(request) for request in requests),
    )


def _with_evidence(
    requests: list[PartitionRequest],
    method: str,
    row: PartitionMethod,
    model: nn.Module | None,
    batches: Iterable[Mapping[str, Any]] | None,
    seed: int,
) -> list[PartitionRequest]:
    """Add what the method reads beside the scores, gathered for all FFNs at once."""
    if not row.needs_model:
        return requests
    if model is None:
        raise MissingInputError(
            f"partition method {method!r} reads the {row.reads} of the model, and there is none",
            remedy="pass model=, the dense model that was scored",
        )
    if row.reads == "weights":
        slots = find_slots(model)
        return [replace(one, weights=slots[one.layer].weights()) for one in requests]
    if batches is None:
        raise MissingInputError(
            f"partition method {method!r} reads the {row.reads} of training data, and there is "
            "none",
            remedy="pass batches=, some of those that importance was scored on",
        )
    if row.reads == "activations":
        together = coactivation(model, batches, {one.layer: one.dealt_ids for one in requests})
        return [replace(one, coactivation_NN=together[one.layer]) for one in requests]
    by_layer = cluster_importance(model, batches, requests[0].num_experts, seed=seed)
    return [replace(one, expert_scores_EF=by_layer[one.layer]) for one in requests]


def _with_expert_scores(
    requests: list[PartitionRequest],
    method: str,
    scores: Sequence[Tensor],
    given: Sequence[Tensor] | None,
) -> list[PartitionRequest]:
    """Add the importance for each expert's data, which must be of the right shape."""
    home = _HOMES_OF_EXPERT_SCORES[method]
    if given is None:
        raise MissingInputError(
            f"partition method {method!r} reads the importance for each expert's data, and there "
            "is none",
            remedy=f"pass expert_scores=, from moe_dist.conversion.{home}.{method}",
        )
    wanted = [(requests[0].num_experts, one.numel()) for one in scores]
    shapes = [tuple(one.shape) for one in given]
    if shapes != wanted:
        raise ConversionError(
            f"expert_scores are of the shapes {shapes}, but {wanted} are needed",
            remedy=f"score this model with {method}, for as many experts",
        )
    return [replace(one, expert_scores_EF=given[one.layer]) for one in requests]


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
