"""The gate of one linear layer of merged experts: noisy scores, of which the largest are taken.

Shapes: G groups, D model, E experts, K active experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.noise import normal_rows
from moe_dist.moe.routing import Routing, RoutingContext

LEAST_NOISE = 1e-2


class NoisyTopK(nn.Module):
    """One linear layer's gate: scores ``x·W_g``, in training with noise of a size that is learned.

    W_g and W_n start at zero: all experts are as good at first, and noise alone tries them.
    Of equal scores the first experts' are taken, on every device. The K weights sum to 1.

    Args:
        d_model: D.
        num_experts: E.
        top_k: K.
        seed: of the noise; give each gate its own.

    Source: arXiv:1701.06538, as MEO (2023.emnlp-main.907) uses it.
    """

    def __init__(self, d_model: int, num_experts: int, *, top_k: int, seed: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.seed = seed
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.noise = nn.Linear(d_model, num_experts, bias=False)
        if not self.gate.weight.is_meta:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.noise.weight)

    def forward(self, input_GD: Tensor, context: RoutingContext | None) -> Routing:
        """Choose for each group; the context numbers the groups' samples, for the noise.

        The weights are float32, since in half precision they would no longer sum to 1.
        """
        with torch.autocast(input_GD.device.type, enabled=False):
            input_GD = input_GD.to(self.gate.weight.dtype)
            clean_GE = F.linear(input_GD, self.gate.weight).float()
            scores_GE, noise_std_GE = clean_GE, None
            if self.training:
                noise_std_GE = F.softplus(F.linear(input_GD, self.noise.weight).float())
                noise_std_GE = noise_std_GE + LEAST_NOISE
                drawn_GE = normal_rows(
                    clean_GE.shape, context, salt=2 * self.seed, device=clean_GE.device
                )
                scores_GE = clean_GE + drawn_GE.to(clean_GE.dtype) * noise_std_GE
            sorted_GE, ids_GE = scores_GE.sort(dim=-1, descending=True, stable=True)
            weights_GK = sorted_GE[:, : self.top_k].softmax(dim=-1)
            return Routing(
                ids_GE[:, : self.top_k],
                weights_GK,
                scores_GE,
                clean_logits=clean_GE,
                noise_std=noise_std_GE,
            )
