"""Learned routers: a gate scores the experts for a token or a sentence.

Shapes: B batch, S sequence, T tokens, D model, E experts, K active experts.
"""

from __future__ import annotations

import typing
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.errors import MissingInputError
from moe_dist.moe.experts import compute_dtype
from moe_dist.moe.noise import normal_rows, uniform_rows
from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import Routing, RoutingContext, check_padding_is_known
from moe_dist.router_spec import GateScale

GATE_SCALES = typing.get_args(GateScale)
GATE_STD = 0.02


class Gate(nn.Module):
    """From scores to experts: what all learned routers share.

    For K>1 the weights of the chosen experts are renormalised to sum 1. For K=1 the weight is
    p/stop_gradient(p), whose value 1 keeps the function of a converted model while the gate still
    learns, or the plain probability.

    Args:
        num_experts: experts to choose from, E.
        top_k: experts for each token, K.
        gate_scale: "straight_through" or "probability", for K=1.
        noise: standard deviation of noise on the scores, in training only. Each sample draws its
            own (`moe_dist.moe.noise`), whatever else is in the batch; recomputation repeats it.
        seed: of noise and jitter; give each layer its own.

    Raises:
        ValueError: if a value does not fit.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        top_k: int = 1,
        gate_scale: str = "straight_through",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        if gate_scale not in GATE_SCALES:
            raise ValueError(f"gate_scale={gate_scale!r} must be one of {', '.join(GATE_SCALES)}")
        if noise < 0:
            raise ValueError(f"gate_noise={noise} must not be negative")
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate_scale = gate_scale
        self.noise = noise
        self.seed = seed

    def choose(
        self, logits_TE: Tensor, dtype: torch.dtype, context: RoutingContext | None
    ) -> Routing:
        """Choose the experts with the largest scores; the routing's logits include the noise."""
        if self.noise and self.training:
            salt = 2 * self.seed
            noise_TE = normal_rows(logits_TE.shape, context, salt=salt, device=logits_TE.device)
            logits_TE = logits_TE + self.noise * noise_TE.to(logits_TE.dtype)
        if self.top_k > 1:
            chosen_TK, expert_ids = logits_TE.topk(self.top_k, dim=-1)
            # Renormalised probabilities are the softmax of the chosen logits alone.
            weights = chosen_TK.softmax(dim=-1)
            unit_weights = False
        else:
            expert_ids, weights = self._choose_one(logits_TE)
            unit_weights = self.gate_scale == "straight_through" and not weights.requires_grad
        return Routing(expert_ids, weights.to(dtype), logits_TE, unit_weights)

    def _choose_one(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate_scale == "straight_through" and not logits_TE.requires_grad:
            return logits_TE.argmax(dim=-1, keepdim=True), torch.ones_like(logits_TE[:, :1])
        probability, expert_ids = logits_TE.softmax(dim=-1).max(dim=-1, keepdim=True)
        if self.gate_scale == "straight_through":
            return expert_ids, probability / probability.detach()
        return expert_ids, probability


class TokenGate(Gate):
    """Scores by a bias-free linear layer of each token's hidden state.

    Args:
        d_model: width of the hidden states, D.
        num_experts: experts to choose from, E.
        top_k: experts for each token, K.
        gate_scale: see `Gate`.
        noise: see `Gate`.
        jitter: in training the gate's input is multiplied by random numbers from 1-jitter to
            1+jitter.
        seed: of the gate's start; give each layer its own.

    Raises:
        ValueError: if a value does not fit.

    Source: Switch Transformer, arXiv:2101.03961; the straight-through weight is ours.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        gate_scale: str = "straight_through",
        noise: float = 0.0,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_experts, top_k=top_k, gate_scale=gate_scale, noise=noise, seed=seed)
        if not 0 <= jitter < 1:
            raise ValueError(f"gate_jitter={jitter} must be at least 0 and below 1")
        self.jitter = jitter
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        if not self.gate.weight.is_meta:
            # Random rows also tell experts apart that start as copies of each other.
            with torch.no_grad():
                self.gate.weight.copy_(random_start(num_experts, d_model, seed))

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Choose each token's experts; the context numbers the samples, for noise and jitter."""
        return self.choose(self._scores(hidden_TD, context), compute_dtype(hidden_TD), context)

    def _scores(self, input_TD: Tensor, context: RoutingContext | None) -> Tensor:
        weight_ED = self.gate.weight
        with torch.autocast(input_TD.device.type, enabled=False):
            input_TD = input_TD.to(weight_ED.dtype)
            if self.jitter and self.training:
                salt = 2 * self.seed + 1
                drawn_TD = uniform_rows(input_TD.shape, context, salt=salt, device=input_TD.device)
                spread_TD = 1 + self.jitter * (2 * drawn_TD - 1)
                input_TD = input_TD * spread_TD.to(input_TD.dtype)
            return F.linear(input_TD, weight_ED).float()


class SentenceGate(TokenGate):
    """Sends a whole sentence to the experts that its mean hidden state scores highest.

    Padding does not count, so the choice depends neither on the other sentences of a batch nor on
    how far they are padded. In a decoder each token reads the mean of the tokens up to itself.

    Args:
        d_model: width of the hidden states, D.
        num_experts: experts to choose from, E.
        top_k: experts for each sentence, K.
        gate_scale: see `Gate`.
        noise: see `Gate`; drawn once for a sentence.
        jitter: see `TokenGate`; on the mean.
        seed: of the gate's start; give each layer its own.

    Source: MoEBERT's sentence gate, 2022.naacl-main.116, without its dependence on the batch.
    """

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Choose the experts of each sentence.

        Args:
            hidden_TD: hidden states of whole sentences, end to end.
            context: tells where sentences end, which tokens are padding, and if it is a decoder.

        Returns:
            The routing, alike for all tokens of a sentence, with logits.

        Raises:
            MissingInputError: if the context does not tell, or a decoder's cache hides tokens.
        """
        mask_BS = sentence_mask(hidden_TD, context)
        num_sentences, length = mask_BS.shape
        hidden_BSD = hidden_TD.view(num_sentences, length, hidden_TD.shape[1]).float()
        hidden_BSD = hidden_BSD * mask_BS.unsqueeze(-1)
        if context is not None and context.causal:
            if context.has_past:
                raise MissingInputError(
                    "sentence_gate in a decoder reads all tokens so far, and a key-value cache "
                    "hides them",
                    remedy="pass use_cache=False to generate, or convert with token_gate",
                )
            counts_BS = mask_BS.cumsum(1).clamp(min=1)
            mean_TD = (hidden_BSD.cumsum(1) / counts_BS.unsqueeze(-1)).flatten(0, 1)
            scores_TE = self._scores(mean_TD, context)
            return self.choose(scores_TE, compute_dtype(hidden_TD), context)
        mean_BD = hidden_BSD.sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
        scores_BE = self._scores(mean_BD, context)
        return repeated(self.choose(scores_BE, compute_dtype(hidden_TD), context), length)


def random_start(rows: int, columns: int, seed: int) -> Tensor:
    """Draw a gate's first scores: float32 on the CPU; the seed alone decides them."""
    start = torch.empty(rows, columns, device="cpu")
    return start.normal_(std=GATE_STD, generator=torch.Generator().manual_seed(seed))


def repeated(routing: Routing, times: int) -> Routing:
    """From one decision for a sample to one for each of its tokens."""
    assert routing.logits is not None
    return replace(
        routing,
        expert_ids=repeat_rows(routing.expert_ids, times),
        expert_weights=repeat_rows(routing.expert_weights, times),
        logits=repeat_rows(routing.logits, times),
    )


def repeat_rows(rows_BK: Tensor, times: int) -> Tensor:
    """Give each row so many times: (B * times, K).

    `repeat_interleave` by a length that is not known yet comes out wrong of torch's ONNX exporter.
    """
    return rows_BK.unsqueeze(1).expand(-1, times, -1).flatten(0, 1)


def sentence_mask(
    hidden_TD: Tensor, context: RoutingContext | None, *, router: str = "sentence_gate"
) -> Tensor:
    """Tell real tokens from padding, (B, S) bool; a context that cannot is a MissingInputError."""
    check_padding_is_known(context, router)
    mask = None if context is None else context.mask
    token_ids = None if context is None else context.token_ids
    known = token_ids if mask is None else mask
    if known is None or known.dim() != 2 or known.numel() != hidden_TD.shape[0]:
        found = "nothing" if known is None else f"a shape of {tuple(known.shape)}"
        raise MissingInputError(
            f"{router} must know where sentences end, and has {found} for "
            f"{hidden_TD.shape[0]} tokens",
            remedy="call the model with input_ids or a two-dimensional attention_mask, and with "
            "chunk_size_feed_forward=0; with gradient checkpointing pass use_reentrant=False and "
            "context_fn=checkpoint_context_fn",
        )
    mask_BS = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
    return bring(mask_BS, hidden_TD.device)
