"""The MoE layer whose experts become one before they multiply.

Shapes: D model, E experts.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor

from moe_dist.errors import ConversionError
from moe_dist.moe.kept_merges import merge_and_keep
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merge import Merges, merge_experts, merged_parameters
from moe_dist.moe.merge_gates import MergeGate, TaskMergeGate
from moe_dist.moe.routing import RoutingContext, append_merge, current_context


class MergedLayer(MoELayer):
    """A feed-forward network that is a mixture of its experts' weights, and not of their outputs.

    Its router is a `MergeGate`, and `shared` is computed beside the merge, as in `MoELayer`, whose
    arguments it takes. There is no dispatcher, and no capacity, since no token travels.
    """

    merges: ClassVar[bool] = True

    def forward(self, hidden: Tensor) -> Tensor:
        """Merge the experts of each group of tokens and apply them.

        Args:
            hidden: (B, S, D) or (T, D).

        Returns:
            The same shape. Padding is computed like any token.
        """
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        merges = self.decide(hidden_TD)
        self._record(merges)
        rows_TD = self.gate.prepare(hidden_TD)
        out_TD = self.merge(rows_TD, merges)
        if self.shared is not None:
            out_TD = out_TD + self.shared(rows_TD)
        return out_TD.view(hidden.shape)

    def decide(self, hidden_TD: Tensor) -> Merges:
        """Ask the gate how the experts of each group come together."""
        merges: Merges = self.gate(hidden_TD, current_context())
        return merges

    def merge(self, rows_TD: Tensor, merges: Merges) -> Tensor:
        """Apply to each token the merge of its group."""
        context = current_context()
        if context is not None and context.has_past and not torch.is_grad_enabled():
            found = merge_and_keep(self.experts, rows_TD, merges, context.kept_merges, self.name)
            if found is not None:
                return found
        return merge_experts(self.experts, rows_TD, merges)

    @torch.no_grad()
    def merged_weights(self, task: int) -> dict[str, Tensor]:
        """Merge the experts for one task: parameters by the names of `Experts`, without the E axis.

        A gate that reads more than the task is a ConversionError.
        """
        router = self.gate
        if not isinstance(router, TaskMergeGate):
            raise ConversionError(
                f"{self.name} merges its experts anew for each sequence, so no dense network does "
                "the same",
                remedy="use a student with moe.router=merged_task, or the average of all experts",
            )
        was_training = router.training
        router.eval()
        try:
            where = router.task_embeddings.device
            context = RoutingContext(task_ids=torch.tensor([task], device=where))
            merges = router(torch.zeros(1, self.experts.d_model, device=where), context)
        finally:
            router.train(was_training)
        weights_E = {}
        for name, routing in merges.by_linear.items():
            zeros_E = torch.zeros(self.num_experts, device=where)
            own_K = routing.expert_weights[0].float()
            weights_E[name] = zeros_E.scatter(0, routing.expert_ids[0], own_K)
        return merged_parameters(self.experts, weights_E)

    @property
    def gate(self) -> MergeGate:
        """The router, which is one that merges."""
        return cast(MergeGate, self.router)

    def _record(self, merges: Merges) -> None:
        """Record each gate's decisions, one row a group, as `<layer>.<linear layer>`."""
        names = ("ffn",) if self.gate.has_one_gate else self.gate.linears
        for name in names:
            routing = merges.by_linear[self.gate.linears[0] if name == "ffn" else name]
            append_merge(f"{self.name}.{name}", self.num_experts, routing, merges.real_G)
