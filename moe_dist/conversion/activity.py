"""What a dense model does on training data: neurons that fire together, importance by part of it.

Shapes: B batch, S sequence, D model, F FFN, E experts (each with a cluster of the data, or some
tasks), N chosen neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.conversion.clustering import balanced_clusters
from moe_dist.conversion.families import FFNSlot, find_slots
from moe_dist.conversion.importance import (
    accepted_inputs,
    evened,
    frozen_in_eval_mode,
    on_device,
    run_model,
    score_importance,
)
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.routing import use_task
from moe_dist.moe.task_routers import spread_tasks


def coactivation(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], neurons: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Measure how much pairs of neurons fire together.

    Args:
        model: the dense model; evaluated, and left as it was.
        batches: dicts of model inputs; padding is left out where there is an attention mask.
        neurons: (N,) the neurons to measure, by the FFN's index.

    Returns:
        By the FFN's index (N, N) float32 on the CPU: the cosine, over all tokens, of the sizes of
        two neurons' activations. A neuron that never fires has zeros.

    Raises:
        MissingInputError: if there are no batches.
    """
    slots = find_slots(model)
    counters = {index: _PairCounter(slots[index], ids) for index, ids in neurons.items()}
    num_batches = 0
    with frozen_in_eval_mode(model), torch.no_grad():
        handles = [counter.install() for counter in counters.values()]
        try:
            for batch in batches:
                moved = on_device(model, batch)
                inputs = accepted_inputs(model, moved)
                for counter in counters.values():
                    counter.batch = inputs
                run_model(model, moved)
                num_batches += 1
        finally:
            for handle in handles:
                handle.remove()
    if not num_batches:
        raise _no_batches()
    return {index: counter.cosines() for index, counter in counters.items()}


def cluster_importance(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], num_clusters: int, *, seed: int
) -> list[Tensor]:
    """Score each neuron's importance for each cluster of the data.

    Samples are put into clusters of equal size by balanced k-means on the mean, over their
    tokens, of the hidden states in the middle of the model: late ones tell only the labels apart.

    Args:
        model: the fine-tuned dense model; evaluated, and left as it was.
        batches: as `score_importance` takes them; all are held in memory.
        num_clusters: E.
        seed: of the clusters.

    Returns:
        For each FFN (E, F) float32 sums over the samples of each cluster.

    Raises:
        MissingInputError: if there are fewer samples than clusters.
    """
    kept = list(batches)
    with frozen_in_eval_mode(model), torch.no_grad():
        vectors = [_sentence_vectors(model, batch) for batch in kept]
    num_samples = sum(map(len, vectors))
    if num_samples < num_clusters:
        raise MissingInputError(
            f"{num_samples} samples do not make {num_clusters} clusters of training data",
            remedy="pass a few thousand training samples",
        )
    vectors_BD = torch.cat(vectors).double().cpu()
    vectors_BD = vectors_BD - vectors_BD.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    cluster_B = balanced_clusters(vectors_BD @ vectors_BD.T, num_clusters, generator=generator)
    parts = cluster_B.split([len(one) for one in vectors])
    by_cluster = []
    for cluster in range(num_clusters):
        own = [
            _samples(batch, part == cluster)
            for batch, part in zip(kept, parts, strict=True)
            if bool((part == cluster).any())
        ]
        by_cluster.append(score_importance(model, own))
    return [torch.stack(of_layer) for of_layer in zip(*by_cluster, strict=True)]


def task_importance(
    model: nn.Module,
    batches: Sequence[Iterable[Mapping[str, Any]]],
    num_experts: int,
    *,
    top_k: int = 1,
) -> list[Tensor]:
    """Score each neuron's importance for the tasks that `task_gate` sends to each expert at first.

    Tasks count alike: a task's scores are divided by their sum in each FFN before they are added.

    Args:
        model: the fine-tuned dense model, with a head for each task; evaluated, and left as it was.
        batches: for each task, batches as `score_importance` takes them.
        num_experts: E.
        top_k: experts for each task.

    Returns:
        For each FFN (E, F) float32.

    Raises:
        ConversionError: if a task has no batches, or an expert has no task.
    """
    experts_NK = spread_tasks(len(batches), num_experts, top_k)
    if experts_NK.unique().numel() < num_experts:
        raise ConversionError(
            f"{len(batches)} tasks with {top_k} experts each leave some of {num_experts} experts "
            "without a task, whose neurons they could take",
            remedy=f"set num_experts to {len(batches) * top_k} or less",
        )
    by_task = []
    for task, own in enumerate(batches):
        with use_task(task):
            scores = score_importance(model, own)
        by_task.append(evened(scores))
    found = []
    for of_layer in zip(*by_task, strict=True):
        scores_EF = torch.zeros(num_experts, of_layer[0].numel())
        for score_F, experts_K in zip(of_layer, experts_NK, strict=True):
            scores_EF[experts_K] += score_F
        found.append(scores_EF)
    return found


class _PairCounter:
    """Adds up products of activations while batches pass through one FFN."""

    def __init__(self, slot: FFNSlot, neurons: Tensor) -> None:
        self.slot = slot
        self.batch: Mapping[str, Any] = {}
        linear_out = slot.linear_out
        self._neurons = neurons.to(next(linear_out.parameters()).device)
        self._sum_NN = torch.zeros(
            neurons.numel(), neurons.numel(), dtype=torch.float64, device=self._neurons.device
        )

    def install(self) -> Any:
        """Hook the FFN's second linear layer, which reads the activations; gives the handle."""
        return self.slot.linear_out.register_forward_pre_hook(self._count)

    def cosines(self) -> Tensor:
        """Scale the sums: (N, N) float32."""
        norms_N = self._sum_NN.diagonal().sqrt().clamp(min=1e-30)
        return (self._sum_NN / norms_N / norms_N.unsqueeze(1)).float().cpu()

    def _count(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        activation_BSF: Tensor = args[0]
        size_TN = real_rows(activation_BSF, self.batch, self.slot)[:, self._neurons].float().abs()
        self._sum_NN += size_TN.T @ size_TN


def real_rows(value: Tensor, batch: Mapping[str, Any], slot: FFNSlot) -> Tensor:
    """Take what an FFN has, (B, S, ...), of real tokens: (T, ...) where the batch tells padding."""
    rows = value.flatten(0, -2)
    mask = _mask_of(batch, value.shape[:-1], in_decoder=slot.in_decoder)
    return rows if mask is None else rows[mask.reshape(-1)]


def _mask_of(batch: Mapping[str, Any], shape: torch.Size, *, in_decoder: bool) -> Tensor | None:
    mask = batch.get("decoder_attention_mask" if in_decoder else "attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None


def _sentence_vectors(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    moved = on_device(model, batch)
    inputs = accepted_inputs(model, moved)
    outputs = run_model(model, moved, output_hidden_states=True)
    states = getattr(outputs, "encoder_hidden_states", None) or outputs.hidden_states
    middle_BSD = states[len(states) // 2].float()
    mask_BS = _mask_of(inputs, middle_BSD.shape[:-1], in_decoder=False)
    if mask_BS is None:
        return middle_BSD.mean(dim=1)
    total_BD = (middle_BSD * mask_BS.unsqueeze(-1)).sum(dim=1)
    return total_BD / mask_BS.sum(dim=1, keepdim=True).clamp(min=1)


def _samples(batch: Mapping[str, Any], chosen_B: Tensor) -> dict[str, Any]:
    return {
        name: value[chosen_B.to(value.device)] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _no_batches() -> MissingInputError:
    return MissingInputError(
        "there are no batches to measure activations on",
        remedy="pass a few thousand training samples",
    )
