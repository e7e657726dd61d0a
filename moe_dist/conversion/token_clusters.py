"""Kinds of tokens: gates that start out telling them apart, and the neurons that each kind needs.

Shapes: B batch, S sequence, T tokens, D model, F FFN, E experts (each with a cluster of tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.conversion.activity import real_rows
from moe_dist.conversion.families import FFNSlot, find_slots
from moe_dist.conversion.gate_fit import fit_gate
from moe_dist.conversion.importance import (
    Capture,
    accepted_inputs,
    evened,
    frozen_in_eval_mode,
    on_device,
    run_model,
    sum_over_batches,
)
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.routing import use_task

MAX_TOKENS = 16_384
"""Tokens of each FFN that clusters and gates are fitted on."""
SPARE_TOKENS = 1.5
"""From so many times as many tokens they are drawn at least, where there are as many."""
WHOLE_SHARE = 0.01
"""How much of a neuron's score for a cluster is its score for all tokens: it decides alone where a
cluster's tokens have no gradient, as all but the first have in the last layer of a classifier."""


@dataclass(frozen=True, eq=False)
class TokenClusters:
    """What experts for kinds of tokens start from.

    Args:
        gates: for each FFN (E, D) float32, the weights of a bias-free gate that sends each token
            to its cluster's expert.
        scores: for each FFN (E, F) float32, the neurons' importance for the tokens that the gate
            sends to each expert.
    """

    gates: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


def token_clusters(
    model: nn.Module,
    batches: Sequence[Iterable[Mapping[str, Any]]],
    num_experts: int,
    *,
    seed: int,
    max_tokens: int = MAX_TOKENS,
) -> TokenClusters:
    """Find kinds of tokens in each FFN's input, gates that tell them apart, and their neurons.

    The inputs of about `max_tokens` tokens, drawn from `SPARE_TOKENS` times as many or more, are
    put into E clusters by k-means; multinomial logistic regression without a bias gives the gate
    (`fit_gate`). From there on the gate decides, also where
    it disagrees with the clusters: a neuron's score for an expert is the sum of
    ``|w1·∂L/∂w1 + w2·∂L/∂w2|`` over the single tokens that the gate sends there. In
    the scores tasks count alike.

    Args:
        model: the fine-tuned dense model; evaluated, and left as it was.
        batches: for each task, batches as `score_importance` takes them; all are scored, and those
            that are drawn from are read once more.
        num_experts: E, at least 2.
        seed: of the tokens drawn and of k-means.
        max_tokens: to fit on, in each FFN.

    Returns:
        Gates and scores.

    Raises:
        ConversionError: if the model computes FFNs in chunks, or something is not finite.
        MissingInputError: if an FFN sees fewer tokens than experts.

    Source: the importance of a neuron is MoEBERT's, 2022.naacl-main.116, taken for each token in
        place of each sample; clusters, gates and their neurons fitted to each other are ours.
    """
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise ConversionError(
            "tokens cannot be told apart where FFNs are computed in chunks of a sentence",
            remedy="set chunk_size_feed_forward=0 in the model's configuration",
        )
    kept = [list(own) for own in batches]
    inputs = _inputs(model, kept, max_tokens, seed)
    gates = tuple(_fit_gate(input_TD, num_experts, seed) for input_TD in inputs)
    by_task = []
    for task, own in enumerate(kept):
        with use_task(task):
            by_task.append(evened(_scores(model, own, gates)))
    scores = [torch.stack(of_layer).sum(dim=0) for of_layer in zip(*by_task, strict=True)]
    if not all(bool(torch.isfinite(score_EF).all()) for score_EF in scores):
        raise _not_finite()
    return TokenClusters(gates, tuple(map(_with_whole, scores)))


def _with_whole(score_EF: Tensor) -> Tensor:
    """Each expert's scores of sum 1, and a little of the scores for all tokens."""
    own_EF = torch.stack(evened(list(score_EF)))
    whole_F = score_EF.sum(dim=0)
    return own_EF + WHOLE_SHARE * whole_F / whole_F.sum().clamp(min=1e-30)


class _InputSample:
    """Draws some tokens' inputs of one FFN while batches pass through it."""

    def __init__(self, slot: FFNSlot, num_batches: int, max_tokens: int, seed: int) -> None:
        self.slot = slot
        self.batch: Mapping[str, Any] = {}
        self.rows: list[Tensor] = []
        self._share = -(-max_tokens // num_batches)
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + slot.index)

    def take(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep a share of the rows; a hook before the FFN's first linear layer."""
        rows_TD = real_rows(args[0], self.batch, self.slot)
        drawn = torch.randperm(len(rows_TD), generator=self._generator)[: self._share]
        self.rows.append(rows_TD[drawn.to(rows_TD.device)].float().cpu())


def _inputs(
    model: nn.Module, batches: list[list[Mapping[str, Any]]], max_tokens: int, seed: int
) -> list[Tensor]:
    """(T, D) inputs of each FFN."""
    batches = _enough(model, batches, max_tokens)
    num_batches = max(1, sum(map(len, batches)))
    samples = [_InputSample(slot, num_batches, max_tokens, seed) for slot in find_slots(model)]
    with frozen_in_eval_mode(model), torch.no_grad():
        handles = [
            sample.slot.linear_in.register_forward_pre_hook(sample.take) for sample in samples
        ]
        try:
            for task, own in enumerate(batches):
                with use_task(task):
                    for batch in own:
                        moved = on_device(model, batch)
                        inputs = accepted_inputs(model, moved)
                        for sample in samples:
                            sample.batch = inputs
                        run_model(model, moved)
        finally:
            for handle in handles:
                handle.remove()
    return [torch.cat(sample.rows) if sample.rows else torch.zeros(0, 1) for sample in samples]


def _enough(
    model: Any, batches: list[list[Mapping[str, Any]]], max_tokens: int
) -> list[list[Mapping[str, Any]]]:
    """Leave out batches, evenly over their lengths, whose tokens are not needed to draw from.

    A decoder's tokens are others, and not counted here: an encoder-decoder reads all batches.
    """
    masks = [batch.get("attention_mask") for own in batches for batch in own]
    if model.config.is_encoder_decoder or not all(isinstance(one, Tensor) for one in masks):
        return batches
    num_tokens = sum(int(one.sum()) for one in masks if one is not None)
    every = max(1, int(num_tokens / (SPARE_TOKENS * max_tokens)))
    return [own[::every] for own in batches]


def _fit_gate(input_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """(E, D) weights of a gate that tells the clusters of its inputs apart."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(input_TD) < num_experts:
        raise MissingInputError(
            f"{len(input_TD)} tokens do not make {num_experts} clusters of training data",
            remedy="pass a few thousand training samples",
        )
    if not bool(torch.isfinite(input_TD).all()):
        raise _not_finite()
    scale = float(input_TD.square().mean().sqrt().clamp(min=1e-12))
    rows_TD = input_TD / scale
    with warnings.catch_warnings():
        # Where tokens are alike there may be fewer clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters = KMeans(num_experts, n_init=2, random_state=seed % 2**32).fit_predict(
            rows_TD.numpy()
        )
    names, kind_T = torch.from_numpy(clusters).unique(return_inverse=True)
    gate_ED = torch.zeros(num_experts, input_TD.shape[1])
    if len(names) > 1:
        gate_ED[names.long()] = fit_gate(rows_TD, kind_T, len(names)) / scale
    return gate_ED


class _TokenCapture(Capture):
    """Reads one FFN's products for each token in place of each sample."""

    input_BSD: Tensor

    def _after_linear(self, linear: nn.Module, args: tuple[Any, ...], z_BSF: Tensor) -> Tensor:
        self.input_BSD = args[0].detach()
        return super()._after_linear(linear, args, z_BSF)

    def _add(self, value_BSF: Tensor, bias: Any, grad_BSF: Tensor) -> None:
        value_BSF = value_BSF.float() if bias is None else value_BSF.float() - bias.detach().float()
        self._keep(value_BSF * grad_BSF.float())

    def scores_EF(self, gate_ED: Tensor) -> Tensor:
        """Sum the sizes of the products over the tokens that a gate sends to each expert."""
        num_experts = len(gate_ED)
        if not self.products:
            return torch.zeros(num_experts, self.slot.num_neurons, dtype=torch.float64)
        size_TF = torch.stack(self.products).sum(dim=0).abs_().flatten(0, -2)
        # In the last block the products may be of the first position alone.
        scores_TE = self.input_BSD.float().flatten(0, -2) @ gate_ED.T.to(size_TF.device)
        chosen_TE = functional.one_hot(scores_TE.argmax(dim=-1), num_experts)
        return (chosen_TE.T.to(size_TF.dtype) @ size_TF).double().cpu()


def _scores(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], gates: Sequence[Tensor]
) -> list[Tensor]:
    def read(captures: Sequence[_TokenCapture]) -> list[Tensor]:
        pairs = zip(captures, gates, strict=True)
        return [capture.scores_EF(gate_ED) for capture, gate_ED in pairs]

    totals = sum_over_batches(model, batches, read, capture=_TokenCapture)
    return [total.float() for total in totals]


def _not_finite() -> ConversionError:
    return ConversionError(
        "what the FFNs read, or their gradients, are not all finite",
        remedy="check the teacher and its training data for NaN and infinity",
    )
