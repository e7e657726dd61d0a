"""Losses: pure functions on tensors, unweighted, in float32, with padding excluded."""

from moe_dist.losses.distillation import hidden_mse, prediction_kl
from moe_dist.losses.router import load_balancing_loss, router_entropy, router_z_loss
from moe_dist.losses.task import classification_loss, regression_loss
from moe_dist.losses.total import LossTerm, LossWeight, weighted_total

__all__ = [
    "LossTerm",
    "LossWeight",
    "classification_loss",
    "hidden_mse",
    "load_balancing_loss",
    "prediction_kl",
    "regression_loss",
    "router_entropy",
    "router_z_loss",
    "weighted_total",
]
