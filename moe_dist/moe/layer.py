"""The MoE layer: a router, experts, and a dispatcher between them.

Shapes: B batch, S sequence, T tokens, D model.
"""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from moe_dist.errors import ConversionError
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.dispatch import Dispatcher, LocalDispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.merge_gates import MergeGate
from moe_dist.moe.routing import Routing, append_routing, current_context, padding_mask


class MoELayer(nn.Module):
    """A feed-forward network of which each token uses a part.

    With one expert there is no router and no dispatch: the pruned dense network. `shared` holds
    neurons that every token uses; they are computed once and added unscaled.

    Args:
        experts: the routed experts.
        router: chooses among them; None if and only if there is one expert.
        shared: one more expert (without output bias) for every token, or None.
        dispatcher: how tokens reach their experts; in this process unless given.
        name: the layer's name in routing records.
        capacity: in training, turns away the tokens that an expert has no place for; None keeps
            all. Without training nothing is dropped, since an answer would depend on what else
            is in the batch.

    Raises:
        ValueError: if router, experts and shared do not fit together.
    """

    merges: ClassVar[bool] = False
    """Whether the experts come together before they multiply; the class says what combines."""

    def __init__(
        self,
        experts: Experts,
        router: nn.Module | None,
        *,
        shared: Experts | None = None,
        dispatcher: Dispatcher | None = None,
        name: str = "",
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        if (router is None) != (experts.num_experts == 1):
            raise ValueError(
                f"{experts.num_experts} experts with router {router!r}: give a router for two or "
                "more experts, and none for one"
            )
        if router is not None and router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router knows {router.num_experts} experts, but there are "
                f"{experts.num_experts}; build both with the same num_experts"
            )
        if shared is not None and (shared.num_experts != 1 or shared.b_out is not None):
            raise ValueError("shared must be one expert without b_out, which the experts carry")
        if router is not None and isinstance(router, MergeGate) != self.merges:
            raise ValueError(
                f"{type(self).__name__} does not go with {type(router).__name__}: a merge gate "
                "needs a MergedLayer, and all other routers a MoELayer"
            )
        self.experts = experts
        self.router = router
        self.shared = shared
        self.dispatcher: Dispatcher = LocalDispatcher() if dispatcher is None else dispatcher
        self.name = name
        if isinstance(router, MergeGate):
            router.name = name
        self.capacity = capacity

    @property
    def num_experts(self) -> int:
        """Experts of the whole layer, over all processes."""
        return 1 if self.router is None else cast(int, self.router.num_experts)

    @property
    def top_k(self) -> int:
        """Experts that each token uses."""
        return 1 if self.router is None else cast(int, self.router.top_k)

    @property
    def num_shared_neurons(self) -> int:
        """Tied neurons that every token uses."""
        return 0 if self.shared is None else self.shared.expert_size

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply shared neurons and the chosen experts to every token.

        Args:
            hidden: (B, S, D) or (T, D).

        Returns:
            The same shape. Padding is computed like any token.
        """
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        if self.router is None:
            out_TD = self.experts(hidden_TD)
        else:
            context = current_context()
            routing: Routing = self.router(hidden_TD, context)
            if self.capacity is not None and self.training:
                mask_T = padding_mask(self.name, hidden_TD.shape[0], context)
                routing = self.capacity.apply(routing, self.num_experts, mask_T)
            append_routing(self.name, self.num_experts, routing)
            out_TD = self.dispatcher(hidden_TD, routing, self.experts)
        if self.shared is not None:
            out_TD = out_TD + self.shared(hidden_TD)
        return cast(Tensor, out_TD.view(hidden.shape))

    def extra_repr(self) -> str:
        """Describe the layer for `print(module)`."""
        return f"name={self.name!r}, num_experts={self.num_experts}, top_k={self.top_k}"


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """List the MoE layers of a model, in order; one without any is a ConversionError."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ConversionError(
            f"{type(model).__name__} has no experts", remedy="give the directory of a student"
        )
    return layers
