"""A limit on the tokens of each expert, and which of them are turned away.

Shapes: T tokens, E experts, K active experts; a slot is one of the T*K pairs of a token and one of
its experts.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.errors import ConversionError
from moe_dist.moe.on_device import count_ids
from moe_dist.moe.routing import Routing
from moe_dist.router_spec import DropPolicy, RouterSpec

DROP_POLICIES = typing.get_args(DropPolicy)


@dataclass(frozen=True)
class Capacity:
    """How many tokens an expert takes, as a multiple of its even share.

    The share is counted over the real tokens of one process: at another number of processes other
    tokens are dropped. Padding takes no place and is not computed at all.

    Args:
        factor: an expert takes ``ceil(factor · tokens · K / E)`` slots, one at least.
        policy: who comes first. "position": every token's first choice before any second one, in
            the order of the tokens. "probability": slots of high gate probability, "position"
            among equals and where there is no gate.

    Raises:
        ConversionError: if the factor is not positive or the policy unknown.

    Source: Switch Transformer, arXiv:2101.03961; V-MoE, arXiv:2106.05974 (by probability).
    """

    factor: float
    policy: str = "position"

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.factor > 0 or self.policy not in DROP_POLICIES:
            raise ConversionError(
                f"capacity_factor={self.factor} with drop_policy={self.policy!r} is no capacity",
                remedy=f"take a factor above 0 and one of {', '.join(DROP_POLICIES)}",
            )

    @classmethod
    def of(cls, spec: RouterSpec) -> Capacity | None:
        """Read the limit of a router; None where it drops nothing."""
        if spec.capacity_factor is None:
            return None
        return cls(spec.capacity_factor, spec.drop_policy)

    def apply(self, routing: Routing, num_experts: int, mask_T: Tensor | None) -> Routing:
        """Turn away what does not fit.

        Args:
            routing: what the router chose.
            num_experts: E.
            mask_T: False for padding; None if all tokens are real.

        Returns:
            The same choice with `kept`, and weight 0 where a slot is dropped.
        """
        ids_TK = routing.expert_ids
        num_tokens, top_k = ids_TK.shape
        real_T = ids_TK.new_ones(num_tokens, dtype=torch.bool) if mask_T is None else mask_T
        share = real_T.sum().double() * (self.factor * top_k / num_experts)
        # Rounding must not open one more place.
        limit = (share - 1e-6).ceil().clamp(min=1)

        # Slots by priority, first choices first; padding behind the last expert.
        slot_ids = torch.where(real_T.unsqueeze(1), ids_TK, num_experts).t().reshape(-1)
        priority = torch.arange(slot_ids.numel(), device=slot_ids.device)
        if self.policy == "probability" and routing.logits is not None:
            probability_TK = routing.logits.detach().softmax(dim=-1).gather(1, ids_TK)
            priority = probability_TK.t().reshape(-1).argsort(descending=True, stable=True)
        by_expert = slot_ids[priority].argsort(stable=True)
        order = priority[by_expert]
        sorted_ids = slot_ids[order]
        counts = count_ids(slot_ids, num_experts + 1)
        starts = counts.cumsum(0) - counts
        places = torch.arange(order.numel(), device=order.device) - starts[sorted_ids]
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = (places < limit) & (sorted_ids < num_experts)
        kept_TK = kept.view(top_k, num_tokens).t().contiguous()
        return replace(
            routing,
            expert_weights=routing.expert_weights * kept_TK,
            unit_weights=False,
            kept=kept_TK,
        )
