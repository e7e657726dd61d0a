"""Gates that say how experts are merged: for a task, a sequence, or a segment of one.

All read what the FFN reads, also those of its later linear layers, so that a decision for all of
them costs one mean.

Shapes: B batch, S sequence, T tokens, G groups, D model, E experts, K active experts, N tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.errors import MissingInputError
from moe_dist.moe.gates import sentence_mask
from moe_dist.moe.merge import Merges
from moe_dist.moe.noisy_top_k import NoisyTopK
from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import Routing, RoutingContext
from moe_dist.moe.segments import cut_into_segments
from moe_dist.moe.task_routers import read_task_ids

REDUCTION = 64
_GATES_APART = 1 << 40


class MergeGate(nn.Module):
    """What all merge gates share: a `NoisyTopK` for each linear layer, or one for all.

    Args:
        d_model: D.
        num_experts: E.
        linears: names of the FFN's linear layers (`moe_dist.moe.merge.linear_names`).
        top_k: experts in a merge, K.
        one_gate: choose alike for all linear layers.
        seed: of noise and starts; give each layer its own.

    Raises:
        ValueError: if top_k does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        linears: Sequence[str],
        top_k: int = 1,
        one_gate: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.linears = tuple(linears)
        self.seed = seed
        self.name = ""
        """Of its layer, which sets it; by this the cache knows what the gate has seen."""
        names = ("ffn",) if one_gate else self.linears
        self.gates = nn.ModuleDict(
            {
                name: NoisyTopK(d_model, num_experts, top_k=top_k, seed=seed + index * _GATES_APART)
                for index, name in enumerate(names)
            }
        )

    @property
    def has_one_gate(self) -> bool:
        """Whether all linear layers are merged alike."""
        return "ffn" in self.gates

    def prepare(self, hidden_TD: Tensor) -> Tensor:
        """Change each token before the experts see it; here not at all."""
        return hidden_TD

    def choose(self, input_GD: Tensor, context: RoutingContext | None) -> dict[str, Routing]:
        """Choose for each linear layer and group."""
        chosen = {name: gate(input_GD, context) for name, gate in self.gates.items()}
        return {name: chosen["ffn" if self.has_one_gate else name] for name in self.linears}


class TaskMergeGate(MergeGate):
    """Merges for each task: a gate on the task's embedding; without training it is constant.

    Args:
        num_tasks: N.
        d_model: D, also of the embeddings, which start at random.
        num_experts: E.
        linears: see `MergeGate`.
        top_k: K.
        one_gate: see `MergeGate`.
        seed: see `MergeGate`. Noise is drawn once a task and step: its tokens share a merge.

    Source: MEO's task level, 2023.emnlp-main.907.
    """

    def __init__(
        self,
        num_tasks: int,
        d_model: int,
        num_experts: int,
        *,
        linears: Sequence[str],
        top_k: int = 1,
        one_gate: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            d_model, num_experts, linears=linears, top_k=top_k, one_gate=one_gate, seed=seed
        )
        self.num_tasks = num_tasks
        self.task_embeddings = nn.Parameter(torch.empty(num_tasks, d_model))
        if not self.task_embeddings.is_meta:
            _draw(self.task_embeddings, seed)

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Merges:
        """Merge for each task that the context names.

        Tasks that are missing or unknown are a MissingInputError.
        """
        tasks_B = self.tasks_of(hidden_TD, context)
        return self.for_tasks(torch.unique(tasks_B), tasks_B, hidden_TD, context)

    def tasks_of(self, hidden_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """Read the task of each sample, (B,), or the one of all, where the context has them."""
        return read_task_ids(hidden_TD, context, self.num_tasks, router="merged_task")

    def for_tasks(
        self,
        tasks_G: Tensor,
        tasks_B: Tensor,
        hidden_TD: Tensor,
        context: RoutingContext | None,
    ) -> Merges:
        """Merge for tasks in ascending order, among them those of the samples."""
        tasks_G, tasks_B = (bring(tasks, hidden_TD.device) for tasks in (tasks_G, tasks_B))
        drawn = RoutingContext(
            sample_ids=tasks_G, noise_seed=None if context is None else context.noise_seed
        )
        chosen = self.choose(self.task_embeddings[tasks_G], drawn)
        group_B = torch.searchsorted(tasks_G, tasks_B.contiguous())
        length = hidden_TD.shape[0] // max(1, tasks_B.numel())
        real_G = torch.zeros_like(tasks_G, dtype=torch.bool).index_fill(0, group_B, True)
        return Merges(chosen, group_B.repeat_interleave(length), real_G)


class SequenceMergeGate(MergeGate):
    """Merges for each sequence: a gate on the mean of its hidden states, padding left out.

    In a decoder it merges for each segment and reads the mean of all segments before it; for the
    first one a learned vector stands in, which is drawn at random, since from zero nothing would
    learn where W_g is zero.

    Args:
        d_model: D.
        num_experts: E.
        linears: see `MergeGate`.
        top_k: K.
        one_gate: see `MergeGate`.
        segment_length: real tokens of a segment, in a decoder.
        seed: see `MergeGate`. Each sequence, or segment, draws its own noise.

    Raises:
        ValueError: if a value does not fit.

    Source: MEO's sequence level, 2023.emnlp-main.907; segments as in Lory, arXiv:2405.03133.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        linears: Sequence[str],
        top_k: int = 1,
        one_gate: bool = False,
        segment_length: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(
            d_model, num_experts, linears=linears, top_k=top_k, one_gate=one_gate, seed=seed
        )
        if segment_length < 1:
            raise ValueError(f"segment_length={segment_length} must be at least 1")
        self.segment_length = segment_length
        self.first_segment = nn.Parameter(torch.empty(d_model))
        if not self.first_segment.is_meta:
            _draw(self.first_segment, seed)

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Merges:
        """Merge for each sequence, or in a decoder for each segment of one.

        It is a MissingInputError if the context does not tell where sequences end, or the
        key-value cache does not carry what the gate has seen of its tokens.
        """
        mask_BS = sentence_mask(hidden_TD, context, router="merged_sequence")
        if context is not None and context.causal:
            return self._by_segment(hidden_TD, mask_BS, context)
        num_sequences, length = mask_BS.shape
        hidden_BSD = hidden_TD.view(num_sequences, length, -1).float() * mask_BS.unsqueeze(-1)
        mean_BD = hidden_BSD.sum(dim=1) / mask_BS.sum(dim=1, keepdim=True).clamp(min=1)
        groups_B = torch.arange(num_sequences, device=hidden_TD.device)
        return Merges(
            self.choose(mean_BD, context),
            groups_B.repeat_interleave(length),
            mask_BS.any(dim=1),
        )

    def _by_segment(self, hidden_TD: Tensor, mask_BS: Tensor, context: RoutingContext) -> Merges:
        batch, length = mask_BS.shape
        past = context.past_segments.get(self.name)
        if context.has_past and (past is None or len(past.counts_B) != batch):
            found = "nothing" if past is None else f"{len(past.counts_B)} sequences"
            raise MissingInputError(
                f"the gate of {self.name} reads the segments before, and the key-value cache "
                f"carries {found} of it for {batch} sequences",
                remedy="pass the cache that this model gave back, or use_cache=False",
            )
        cut = cut_into_segments(
            hidden_TD.view(batch, length, -1), mask_BS, self.segment_length, past
        )
        if context.seen_segments is not None:
            context.seen_segments[self.name] = cut.state
        num_segments = cut.means_BJD.shape[1]
        input_BJD = torch.where(
            cut.is_first_BJ.unsqueeze(-1), self.first_segment.float(), cut.means_BJD
        )
        samples_B = context.sample_ids
        if samples_B is None:
            samples_B = torch.arange(batch, device="cpu")
        drawn = RoutingContext(sample_ids=samples_B, noise_seed=context.noise_seed)
        starts_B = torch.arange(batch, device=hidden_TD.device) * num_segments
        return Merges(
            self.choose(input_BJD.flatten(0, 1), drawn),
            (starts_B.unsqueeze(1) + cut.segment_BS).reshape(-1),
            cut.real_BJ.reshape(-1),
        )


class TokenMergeGate(SequenceMergeGate):
    """Merges for each sequence, and adds a small network of each token to what the experts read.

    ``x + up(relu(down(x)))``, of a width of D / 64; `up` starts at zero. That it comes before the
    experts is ours.

    Args:
        d_model: D.
        num_experts: E.
        linears: see `MergeGate`.
        top_k: K.
        one_gate: see `MergeGate`.
        segment_length: see `SequenceMergeGate`.
        seed: see `MergeGate`.

    Source: MEO's token level, 2023.emnlp-main.907.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        linears: Sequence[str],
        top_k: int = 1,
        one_gate: bool = False,
        segment_length: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            linears=linears,
            top_k=top_k,
            one_gate=one_gate,
            segment_length=segment_length,
            seed=seed,
        )
        width = max(1, d_model // REDUCTION)
        self.down = nn.Linear(d_model, width)
        self.up = nn.Linear(width, d_model)
        if not self.down.weight.is_meta:
            _draw(self.down.weight, seed, std=d_model**-0.5)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def prepare(self, hidden_TD: Tensor) -> Tensor:
        """Add each token's own part."""
        return cast(Tensor, hidden_TD + self.up(F.relu(self.down(hidden_TD))))


def _draw(parameter: Tensor, seed: int, std: float = 1.0) -> None:
    """Fill with normal numbers that the seed alone decides."""
    start = torch.empty(parameter.shape, device="cpu")
    start.normal_(std=std, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parameter.copy_(start)


__all__ = ["MergeGate", "NoisyTopK", "SequenceMergeGate", "TaskMergeGate", "TokenMergeGate"]
