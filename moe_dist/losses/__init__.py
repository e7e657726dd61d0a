"""Losses: pure functions on tensors, unweighted, in float32, with padding excluded."""

from moe_dist.losses.alignment import POOLINGS, alignment_mse, mapping_mse
from moe_dist.losses.attention import attention_mse, attention_scores
from moe_dist.losses.distillation import hidden_mse, prediction_kl, soft_targets
from moe_dist.losses.router import load_balancing_loss, router_entropy, router_z_loss
from moe_dist.losses.total import LossTerm, LossWeight, weighted_total

__all__ = [
    "POOLINGS",
    "LossTerm",
    "LossWeight",
    "alignment_mse",
    "attention_mse",
    "attention_scores",
    "hidden_mse",
    "load_balancing_loss",
    "mapping_mse",
    "prediction_kl",
    "router_entropy",
    "router_z_loss",
    "soft_targets",
    "weighted_total",
]
