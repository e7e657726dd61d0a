"""The ways to split one FFN: a method is one function and one row of `PARTITIONS`.

Shapes: F FFN, E experts, s shared neurons, N neurons that are dealt out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.conversion.clustering import balanced_assignment, balanced_clusters
from moe_dist.conversion.families import FFNWeights
from moe_dist.conversion.partition_plan import LayerPartition
from moe_dist.errors import ConversionError

Source = Literal["scores", "weights", "activations", "clusters", "tasks", "tokens"]


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
        weights: the FFN's weights, for methods that read them.
        coactivation_NN: how much the neurons of `dealt_ids`, in this order, fire together
            (cosine of their activations), for methods that read activations.
        expert_scores_EF: importance for the data of each expert (a cluster of the training rows,
            its tasks, or a kind of token), for methods that read it.
    """

    layer: int
    scores_F: Tensor
    num_experts: int
    expert_size: int
    num_shared_neurons: int
    generator: torch.Generator
    weights: FFNWeights | None = None
    coactivation_NN: Tensor | None = None
    expert_scores_EF: Tensor | None = None

    @property
    def num_private(self) -> int:
        """Neurons that an expert has for itself."""
        return self.expert_size - self.num_shared_neurons

    @property
    def ranked_ids(self) -> Tensor:
        """All neurons, the most important first."""
        return torch.argsort(self.scores_F, descending=True, stable=True)

    @property
    def dealt_ids(self) -> Tensor:
        """(N,) the most important neurons that are not shared, as many as experts have places."""
        first = self.num_shared_neurons
        return self.ranked_ids[first : first + self.num_experts * self.num_private]


@dataclass(frozen=True)
class PartitionMethod:
    """One row of `PARTITIONS`.

    Args:
        split: from a request to the FFN's split.
        reads: what it needs beside the scores: "weights" needs the model; "activations" and
            "clusters" need training batches too; "tasks" and "tokens" need the importance for each
            expert.
        distinct: no neuron is in two experts, shared ones excepted.
    """

    split: Callable[[PartitionRequest], LayerPartition]
    reads: Source = "scores"
    distinct: bool = True

    @property
    def needs_model(self) -> bool:
        """Whether `plan_partition` must be given the dense model."""
        return self.reads in ("weights", "activations", "clusters")

    @property
    def needs_batches(self) -> bool:
        """Whether `plan_partition` must be given training batches."""
        return self.reads in ("activations", "clusters")

    @property
    def needs_expert_scores(self) -> bool:
        """Whether `plan_partition` must be given the importance for each expert."""
        return self.reads in ("tasks", "tokens")

    @property
    def reads_rows(self) -> bool:
        """Whether training rows decide the split, beside those that the scores come from."""
        return self.needs_batches or self.needs_expert_scores


def by_importance(request: PartitionRequest) -> LayerPartition:
    """Share the most important neurons, deal out the next (MoEBERT, 2022.naacl-main.116)."""
    return _deal(request, request.ranked_ids)


def by_inverse_importance(request: PartitionRequest) -> LayerPartition:
    """Keep the least important neurons: the ablation that shows what the scores are worth."""
    return _deal(request, torch.argsort(request.scores_F, stable=True))


def at_random(request: PartitionRequest) -> LayerPartition:
    """Keep and share neurons drawn at random."""
    num_neurons = request.scores_F.numel()
    return _deal(request, torch.randperm(num_neurons, generator=request.generator))


def full_copy(request: PartitionRequest) -> LayerPartition:
    """Give every expert all neurons (upcycling); another expert_size than F is a ConversionError.

    Copies become different experts because routers never treat them alike: hash tables and gates
    start at random, so that each copy sees other tokens from the first step on.
    """
    num_neurons = request.scores_F.numel()
    if request.expert_size != num_neurons:
        raise ConversionError(
            f"partition method 'full_copy' copies all {num_neurons} neurons of FFN "
            f"{request.layer}, but expert_size is {request.expert_size}",
            remedy=f"set expert_size to {num_neurons}, or take another partition method",
        )
    order = request.ranked_ids
    return LayerPartition(
        layer=request.layer,
        num_neurons=num_neurons,
        shared_ids=order[: request.num_shared_neurons],
        expert_ids=order.repeat(request.num_experts, 1),
    )


def by_weights(request: PartitionRequest) -> LayerPartition:
    """Share the most important neurons, and group the next ones by their input weights.

    The same neurons survive as in `by_importance`. Balanced k-means groups the rows of w_in and
    w_gate: neurons that look for like inputs go together. Source: MoEfication, arXiv:2110.01786
    (parameter clustering); keeping only the most important neurons is ours.
    """
    assert request.weights is not None
    dealt = request.dealt_ids
    rows_ND = request.weights.w_in.detach()[dealt].double().cpu()
    if request.weights.w_gate is not None:
        gate_ND = request.weights.w_gate.detach()[dealt].double().cpu()
        rows_ND = torch.cat([rows_ND, gate_ND], dim=1)
    return _grouped(request, rows_ND @ rows_ND.T)


def by_coactivation(request: PartitionRequest) -> LayerPartition:
    """Share the most important neurons, and group the next ones by how they fire together.

    The same neurons survive as in `by_importance`. Groups of equal size maximise the sum of the
    cosines of their neurons' activations over training tokens: balanced k-means on these.

    Source: MoEfication, arXiv:2110.01786 (co-activation graph); k-means in place of METIS is ours.
    """
    assert request.coactivation_NN is not None
    return _grouped(request, request.coactivation_NN.double())


def by_clustered_importance(request: PartitionRequest) -> LayerPartition:
    """Give each expert the neurons that matter most for one cluster of the training data.

    Shared are the neurons that matter most in sum. The rest are assigned so that the importance
    of all experts' neurons, each for the expert's own cluster, is as large as possible; who finds
    no place is dropped. Private neurons come by falling importance for the expert's cluster.

    Source: importance as in MoEBERT, 2022.naacl-main.116; the exact assignment is ours.
    """
    scores_EF = _evened_scores(request)
    order = torch.argsort(scores_EF.sum(dim=0), descending=True, stable=True)
    shared, rest = order.split(
        [request.num_shared_neurons, order.numel() - request.num_shared_neurons]
    )
    num_dropped = rest.numel() - request.num_experts * request.num_private
    cost_NC = torch.cat([-scores_EF[:, rest].T, scores_EF.new_zeros(rest.numel(), 1)], dim=1)
    sizes = [request.num_private] * request.num_experts + [num_dropped]
    owner_N = balanced_assignment(cost_NC, sizes)
    experts = []
    for expert in range(request.num_experts):
        own = rest[owner_N == expert]
        by_score = torch.argsort(scores_EF[expert, own], descending=True, stable=True)
        experts.append(torch.cat([shared, own[by_score]]))
    return LayerPartition(
        layer=request.layer,
        num_neurons=order.numel(),
        shared_ids=shared,
        expert_ids=torch.stack(experts),
    )


def by_expert_importance(request: PartitionRequest) -> LayerPartition:
    """Give each expert the neurons that matter most for its own tasks or kind of tokens.

    Shared are the neurons that matter most in sum. Beside them every expert takes what its own
    data need most, by falling importance; a neuron may be in several experts.

    Source: importance as in MoEBERT, 2022.naacl-main.116; by task (task_gate) or by kind of token
    (a gate that starts out with it) is ours.
    """
    scores_EF = _evened_scores(request)
    order = torch.argsort(scores_EF.sum(dim=0), descending=True, stable=True)
    shared, rest = order[: request.num_shared_neurons], order[request.num_shared_neurons :]
    best_EN = torch.argsort(scores_EF[:, rest], dim=1, descending=True, stable=True)
    own_EN = rest[best_EN[:, : request.num_private]]
    return LayerPartition(
        layer=request.layer,
        num_neurons=order.numel(),
        shared_ids=shared,
        expert_ids=torch.cat([shared.expand(request.num_experts, -1), own_EN], dim=1),
    )


PARTITIONS: dict[str, PartitionMethod] = {
    "importance": PartitionMethod(by_importance),
    "random": PartitionMethod(at_random),
    "inverse": PartitionMethod(by_inverse_importance),
    "kmeans": PartitionMethod(by_weights, reads="weights"),
    "coactivation": PartitionMethod(by_coactivation, reads="activations"),
    "clustered_importance": PartitionMethod(by_clustered_importance, reads="clusters"),
    "task_importance": PartitionMethod(by_expert_importance, reads="tasks", distinct=False),
    "token_clusters": PartitionMethod(by_expert_importance, reads="tokens", distinct=False),
    "full_copy": PartitionMethod(full_copy, distinct=False),
}


def _evened_scores(request: PartitionRequest) -> Tensor:
    """Importance for each expert's data, which count alike whatever their losses."""
    assert request.expert_scores_EF is not None
    scores_EF = request.expert_scores_EF.double()
    return scores_EF / scores_EF.sum(dim=1, keepdim=True).clamp(min=1e-30)


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


def _grouped(request: PartitionRequest, gram_NN: Tensor) -> LayerPartition:
    """The first s neurons to all; the next ones in groups of like neurons."""
    shared = request.ranked_ids[: request.num_shared_neurons]
    dealt = request.dealt_ids
    groups_N = balanced_clusters(gram_NN, request.num_experts, generator=request.generator)
    return LayerPartition(
        layer=request.layer,
        num_neurons=request.scores_F.numel(),
        shared_ids=shared,
        expert_ids=torch.stack(
            [torch.cat([shared, dealt[groups_N == e]]) for e in range(request.num_experts)]
        ),
    )
