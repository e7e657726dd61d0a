"""Gates for kinds of tokens: as far down as scikit-learn comes, and the same kinds."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from moe_dist.conversion.gate_fit import fit_gate

NUM_KINDS = 4


def test_it_minimises_what_scikit_learn_does() -> None:
    rows_TD, kind_T = _tokens(2000)
    own_ED = fit_gate(rows_TD, kind_T, NUM_KINDS)
    learned = LogisticRegression(fit_intercept=False, max_iter=100)
    slow_ED = torch.from_numpy(learned.fit(rows_TD.numpy(), kind_T.numpy()).coef_).float()
    assert _loss(own_ED, rows_TD, kind_T) <= 1.02 * _loss(slow_ED, rows_TD, kind_T)
    others_TD, _ = _tokens(1000, seed=1)
    own_T, slow_T = ((others_TD @ gate_ED.T).argmax(dim=-1) for gate_ED in (own_ED, slow_ED))
    assert float((own_T == slow_T).float().mean()) >= 0.98


def _tokens(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw kinds that overlap, with a few large dimensions as an FFN's inputs have them."""
    generator = torch.Generator().manual_seed(seed)
    centres_ED = torch.randn(NUM_KINDS, 32, generator=torch.Generator().manual_seed(9))
    kind_T = torch.arange(num_tokens) % NUM_KINDS
    rows_TD = centres_ED[kind_T] + torch.randn(num_tokens, 32, generator=generator)
    rows_TD[:, :2] *= 5
    return rows_TD / rows_TD.square().mean().sqrt(), kind_T


def _loss(gate_ED: Tensor, rows_TD: Tensor, kind_T: Tensor) -> float:
    error = functional.cross_entropy(rows_TD @ gate_ED.T, kind_T)
    return float(error + gate_ED.square().sum() / (2 * len(rows_TD)))
