"""Multinomial logistic regression without a bias, for gates that tell kinds of tokens apart.

Shapes: T tokens, D model, E kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MAX_STEPS = 70
HISTORY = 20
"""Steps that L-BFGS looks back on: with twice the usual ten it needs a third fewer."""


def fit_gate(rows_TD: Tensor, kind_T: Tensor, num_kinds: int) -> Tensor:
    """Learn weights whose largest product tells a token's kind.

    What is minimised is scikit-learn's ``LogisticRegression(C=1, fit_intercept=False)``: mean
    cross entropy plus ``|w|² / 2T``. `MAX_STEPS` bring it as far down as a hundred of
    scikit-learn's, in a third of the time: it reads the rows in few products of whole matrices.
    Whatever was learned by then decides; the optimum need not be reached.

    Args:
        rows_TD: float32, of mean square about 1.
        kind_T: (T,) int64 below `num_kinds`.
        num_kinds: E.

    Returns:
        (E, D) float32.
    """
    num_rows, width = rows_TD.shape
    wanted_TE = functional.one_hot(kind_T, num_kinds).to(rows_TD.dtype)
    weight_ED = torch.zeros(num_kinds, width, requires_grad=True)

    @torch.no_grad()
    def loss() -> Tensor:
        log_TE = (rows_TD @ weight_ED.T).log_softmax(dim=-1)
        missed = (weight_ED.square().sum() / 2 - (log_TE * wanted_TE).sum()) / num_rows
        error_TE = log_TE.exp_().sub_(wanted_TE)
        weight_ED.grad = (error_TE.T @ rows_TD + weight_ED) / num_rows
        return missed

    descent = torch.optim.LBFGS(
        [weight_ED],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        history_size=HISTORY,
        tolerance_grad=1e-5,
        line_search_fn="strong_wolfe",
    )
    descent.step(loss)
    return weight_ED.detach()
