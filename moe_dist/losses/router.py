"""Losses on what a router decided.

Shapes: T tokens, E experts, K active experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(probability_E: Tensor, choices_E: Tensor, top_k: int = 1) -> Tensor:
    """Penalise routing that gives some experts more than their share.

    ``E · Σ_i P_i · f_i``, with P_i the mean probability of expert i and f_i the share of
    (token, expert) choices that fell on it; 1 when both are even. Given the choices of a whole
    step it is linear in the probabilities, so the parts of micro-batches and ranks add up to it.

    Args:
        probability_E: router probabilities, summed over some tokens.
        choices_E: how many choices fell on each expert, counted over all tokens of the step.
        top_k: choices of each token, K.

    Returns:
        Scalar, unweighted: these tokens' part. Its gradient flows through P only.

    Source: Switch Transformer, arXiv:2101.03961.
    """
    num_choices = choices_E.sum().clamp(min=1)
    mean_E = probability_E * (top_k / num_choices)
    return choices_E.numel() * (mean_E * (choices_E / num_choices)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens (padding removed, at least one) of ``logsumexp²``: keeps the softmax stable.

    Source: ST-MoE, arXiv:2202.08906.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the z-loss needs at least one token that is not padding")
    return torch.logsumexp(logits_TE.float(), dim=-1).square().mean()


def router_entropy(logits_TE: Tensor) -> Tensor:
    """Mean over tokens (padding removed, at least one) of the routing's entropy, 0 to log(E) nats.

    It makes choices sharp and says nothing of the load: it goes with `load_balancing_loss`.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the entropy needs at least one token that is not padding")
    return token_entropy(logits_TE).mean()


def token_entropy(logits_TE: Tensor) -> Tensor:
    """Compute (T,) float32 entropies, in nats, of each token's expert probabilities."""
    log_TE = torch.log_softmax(logits_TE.float(), dim=-1)
    return -(log_TE.exp() * log_TE).sum(dim=-1)
