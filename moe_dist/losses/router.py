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
    """Penalise large router logits, so that the softmax stays stable.

    Args:
        logits_TE: router scores before softmax, padding removed.

    Returns:
        Scalar, unweighted: the mean over tokens of ``logsumexp²``.

    Raises:
        ValueError: if there are no tokens.

    Source: ST-MoE, arXiv:2202.08906.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the z-loss needs at least one token that is not padding")
    return torch.logsumexp(logits_TE.float(), dim=-1).square().mean()


def router_entropy(logits_TE: Tensor) -> Tensor:
    """Penalise undecided routing.

    Args:
        logits_TE: router scores before softmax, padding removed.

    Returns:
        Scalar, unweighted: the mean over tokens of the entropy of their expert probabilities, in
        nats; between 0 and log(E). It makes each token's choice sharp and says nothing of the
        load, so that it goes with `load_balancing_loss`.

    Raises:
        ValueError: if there are no tokens.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the entropy needs at least one token that is not padding")
    return token_entropy(logits_TE).mean()


def token_entropy(logits_TE: Tensor) -> Tensor:
    """Compute how undecided a router is about each token.

    Args:
        logits_TE: router scores before softmax.

    Returns:
        (T,) float32 entropies in nats.
    """
    log_TE = torch.log_softmax(logits_TE.float(), dim=-1)
    return -(log_TE.exp() * log_TE).sum(dim=-1)
