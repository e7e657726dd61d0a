"""Losses on what a router decided.

Shapes: T tokens, G groups of tokens that share a merge, E experts, K active experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-10


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


def squared_variation(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation: the values' variance over their squared mean.

    0 where all are equal, E where one has everything; the variance is that of a sample, and of one
    value 0.
    """
    if values_E.numel() < 2:
        return values_E.float().sum() * 0.0
    values_E = values_E.float()
    return values_E.var() / values_E.mean().square().clamp(min=_TINY)


def variation_of_part(part_E: Tensor, total_E: Tensor) -> Tensor:
    """One part's share of `squared_variation` of a total, so that the parts of a step add up to it.

    Args:
        part_E: what some groups give, with its graph.
        total_E: what all groups of the step give, this part among them.

    Returns:
        Scalar; its gradient in `part_E` is that of the whole.
    """
    total_E = total_E.detach().float()
    part_E = part_E.float()
    whole = squared_variation(total_E + (part_E - part_E.detach()))
    share = part_E.detach().sum() / total_E.sum().clamp(min=_TINY)
    return whole - whole.detach() * (1 - share)


def noisy_load(clean_GE: Tensor, noisy_GE: Tensor, std_GE: Tensor, top_k: int) -> Tensor:
    """Tell how likely each expert is chosen if its own noise is drawn again, the others' not.

    Args:
        clean_GE: scores without noise, for each of G groups.
        noisy_GE: the scores that chose.
        std_GE: of the noise between them.
        top_k: experts of each group, K.

    Returns:
        (G, E) float32 probabilities: counts of choices, made smooth.

    Source: arXiv:1701.06538, appendix A.
    """
    num_experts = clean_GE.shape[-1]
    if top_k >= num_experts:
        return torch.ones_like(clean_GE, dtype=torch.float32)
    clean_GE, noisy_GE, std_GE = clean_GE.float(), noisy_GE.float(), std_GE.float()
    best_GK = noisy_GE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best_GK[:, top_k - 1 : top_k], best_GK[:, top_k:]
    # A chosen expert stays if it beats the first that is not; another must beat the last that is.
    threshold_GE = torch.where(noisy_GE > first_out, first_out, last_in)
    return torch.special.ndtr((clean_GE - threshold_GE) / std_GE)


def router_z_loss(logits_TE: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Mean over tokens, at least one, of ``logsumexp²``: keeps the softmax stable.

    `weights_T` are `token_weights`; None if no token is padding. Source: ST-MoE, arXiv:2202.08906.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the z-loss needs at least one token that is not padding")
    return _mean(torch.logsumexp(logits_TE.float(), dim=-1).square(), weights_T)


def router_entropy(logits_TE: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """Mean over tokens, at least one, of the routing's entropy, 0 to log(E) nats.

    It makes choices sharp and says nothing of the load: it goes with `load_balancing_loss`.
    `weights_T` are `token_weights`; None if no token is padding.
    """
    if logits_TE.shape[0] == 0:
        raise ValueError("the entropy needs at least one token that is not padding")
    return _mean(token_entropy(logits_TE), weights_T)


def without_padding(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Set padding to 0, so that whatever it holds reaches no sum and no gradient.

    Taking the real rows out would keep the host waiting for their number.
    """
    return logits_TE if mask_T is None else logits_TE.masked_fill(~mask_T.bool()[:, None], 0.0)


def token_weights(mask_T: Tensor) -> Tensor:
    """Weigh tokens for a mean over the real ones: (T,) float32, padding 0."""
    real_T = mask_T.float()
    return real_T / real_T.sum().clamp(min=1)


def _mean(values_T: Tensor, weights_T: Tensor | None) -> Tensor:
    return values_T.mean() if weights_T is None else (values_T * weights_T).sum()


def token_entropy(logits_TE: Tensor) -> Tensor:
    """Compute (T,) float32 entropies, in nats, of each token's expert probabilities."""
    log_TE = torch.log_softmax(logits_TE.float(), dim=-1)
    return -(log_TE.exp() * log_TE).sum(dim=-1)
