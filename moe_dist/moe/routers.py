"""Routers: each reads hidden states or a `RoutingContext` and chooses experts for every token.

A new router is one class and one row of `ROUTERS`.
Shapes: B batch, S sequence, T tokens, D model, E experts, K active experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.experts import compute_dtype
from moe_dist.moe.hash_tables import balanced_table, random_table
from moe_dist.moe.routing import Routing, RoutingContext

GATE_SCALES = ("straight_through", "probability")
GATE_STD = 0.02


@dataclass(frozen=True)
class RouterOptions:
    """Everything that a row of `ROUTERS` may read; see `build_router`."""

    d_model: int
    num_experts: int
    top_k: int
    vocab_size: int | None
    seed: int
    token_counts: Tensor | None
    num_tasks: int | None
    gate_scale: str
    table: Tensor | None


class HashRouter(nn.Module):
    """Sends each token id to fixed experts; the table is saved with the model.

    The K experts of a token share its output equally.

    Args:
        table: (V,) or (V, K) int64 expert ids.
        num_experts: experts to choose from, E.

    Raises:
        ConversionError: if the table holds no rows or ids that are not experts.
    """

    table: Tensor

    def __init__(self, table: Tensor, num_experts: int) -> None:
        super().__init__()
        # A model built on the meta device to be filled from a checkpoint has no values to check.
        if table.numel() == 0 or (
            not table.is_meta and not 0 <= int(table.min()) <= int(table.max()) < num_experts
        ):
            raise ConversionError(
                f"a hash table of shape {tuple(table.shape)} does not name experts 0 to "
                f"{num_experts - 1} for each token id",
                remedy="build the table with the model's own num_experts and vocab_size",
            )
        self.num_experts = num_experts
        self.top_k = 1 if table.dim() == 1 else table.shape[1]
        self.register_buffer("table", table.to(torch.int64))

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None) -> Routing:
        """Look the experts of each token id up.

        Args:
            hidden_TD: hidden states; only their number, dtype and device matter.
            context: carries the token ids.

        Returns:
            The routing, with equal weights and no logits.

        Raises:
            MissingInputError: if the token ids are missing, are not one for each token, or are
                not in the table (checked on CPU; accelerators report it as an index error).
        """
        token_ids = None if context is None else context.token_ids
        if token_ids is None:
            raise MissingInputError(
                "hash routing needs the token ids of this forward call, and there are none",
                remedy="call the model with input_ids (not inputs_embeds), or run the layer inside "
                "use_context(RoutingContext(token_ids=...)); with gradient checkpointing pass "
                "use_reentrant=False and context_fn=checkpoint_context_fn",
            )
        num_tokens = hidden_TD.shape[0]
        if token_ids.numel() != num_tokens:
            raise MissingInputError(
                f"hash routing has {token_ids.numel()} token ids for {num_tokens} tokens",
                remedy="set chunk_size_feed_forward=0 and pass input_ids for every token",
            )
        ids_T = token_ids.reshape(-1).to(self.table.device)
        if ids_T.device.type == "cpu" and num_tokens:
            self._check_vocabulary(ids_T)
        expert_ids = self.table.index_select(0, ids_T).view(num_tokens, self.top_k)
        weights = torch.full(
            (1, 1),
            1.0 / self.top_k,
            dtype=compute_dtype(hidden_TD),
            device=hidden_TD.device,
        ).expand(num_tokens, self.top_k)
        return Routing(expert_ids, weights, None, unit_weights=self.top_k == 1)

    def _check_vocabulary(self, ids_T: Tensor) -> None:
        vocab_size = self.table.shape[0]
        smallest, largest = (int(bound) for bound in ids_T.aminmax())
        if smallest < 0 or largest >= vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise MissingInputError(
                f"token id {wrong} is not in the hash table of {vocab_size} ids",
                remedy="use the tokenizer that the model was converted with, and resize token "
                "embeddings before conversion, not after",
            )


class TokenGate(nn.Module):
    """Softmax over a bias-free linear layer of each token's hidden state.

    For K>1 the weights of the chosen experts are renormalised to sum 1. For K=1 the weight is
    p/stop_gradient(p), whose value 1 keeps the function of a converted model while the gate still
    learns, or the plain probability.

    Args:
        d_model: width of the hidden states, D.
        num_experts: experts to choose from, E.
        top_k: experts for each token, K.
        gate_scale: "straight_through" or "probability", for K=1.
        seed: of the gate's start; give each layer its own.

    Raises:
        ValueError: if top_k or gate_scale is unknown.

    Source: Switch Transformer, arXiv:2101.03961; the straight-through weight is ours.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 1,
        gate_scale: str = "straight_through",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
        if gate_scale not in GATE_SCALES:
            raise ValueError(f"gate_scale={gate_scale!r} must be one of {', '.join(GATE_SCALES)}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate_scale = gate_scale
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        if not self.gate.weight.is_meta:
            # On the CPU and with its own generator, so that a seed means the same everywhere.
            start = torch.empty(num_experts, d_model, device="cpu")
            start.normal_(std=GATE_STD, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                self.gate.weight.copy_(start)

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Choose the experts with the largest logits.

        Args:
            hidden_TD: hidden states.
            context: not read.

        Returns:
            The routing, with logits.
        """
        weight_ED = self.gate.weight
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits_TE = F.linear(hidden_TD.to(weight_ED.dtype), weight_ED).float()
        if self.top_k > 1:
            chosen_TK, expert_ids = logits_TE.topk(self.top_k, dim=-1)
            # Renormalised probabilities are the softmax of the chosen logits alone.
            weights = chosen_TK.softmax(dim=-1)
            unit_weights = False
        else:
            expert_ids, weights = self._choose_one(logits_TE)
            unit_weights = self.gate_scale == "straight_through" and not weights.requires_grad
        return Routing(expert_ids, weights.to(compute_dtype(hidden_TD)), logits_TE, unit_weights)

    def _choose_one(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate_scale == "straight_through" and not logits_TE.requires_grad:
            return logits_TE.argmax(dim=-1, keepdim=True), torch.ones_like(logits_TE[:, :1])
        probability, expert_ids = logits_TE.softmax(dim=-1).max(dim=-1, keepdim=True)
        if self.gate_scale == "straight_through":
            return expert_ids, probability / probability.detach()
        return expert_ids, probability


def build_router(
    name: str,
    *,
    d_model: int,
    num_experts: int,
    top_k: int = 1,
    vocab_size: int | None = None,
    seed: int = 0,
    token_counts: Tensor | None = None,
    num_tasks: int | None = None,
    gate_scale: str = "straight_through",
    table: Tensor | None = None,
) -> nn.Module:
    """Build a router by its name in `ROUTERS`.

    Args:
        name: a key of `ROUTERS`.
        d_model: width of the hidden states.
        num_experts: experts to choose from.
        top_k: experts for each token.
        vocab_size: rows of a hash table; needed by hash_random without `table`.
        seed: of the hash table; give each layer its own.
        token_counts: (V,) counts on the training split; needed by hash_balanced without `table`.
        num_tasks: read by routers over tasks.
        gate_scale: see `TokenGate`.
        table: a ready hash table, instead of a fresh one.

    Returns:
        The router, a module that follows the `Router` protocol.

    Raises:
        ConversionError: if there is no router of that name, or top_k does not fit.
        MissingInputError: if the router needs something that was not given.
    """
    if name not in ROUTERS:
        raise ConversionError(
            f"there is no router named {name!r}",
            remedy=f"use one of: {', '.join(ROUTERS)}",
        )
    if not 1 <= top_k <= num_experts:
        raise ConversionError(
            f"top_k={top_k} does not fit num_experts={num_experts}",
            remedy=f"choose top_k between 1 and {num_experts}",
        )
    return ROUTERS[name](
        RouterOptions(
            d_model=d_model,
            num_experts=num_experts,
            top_k=top_k,
            vocab_size=vocab_size,
            seed=seed,
            token_counts=token_counts,
            num_tasks=num_tasks,
            gate_scale=gate_scale,
            table=table,
        )
    )


def _hash_random(options: RouterOptions) -> nn.Module:
    table = options.table
    if table is None:
        if options.vocab_size is None:
            raise MissingInputError(
                "hash_random needs the size of the vocabulary",
                remedy="pass vocab_size, the rows of the model's token embedding",
            )
        table = random_table(
            options.vocab_size,
            options.num_experts,
            seed=options.seed,
            top_k=options.top_k,
        )
    return HashRouter(table, options.num_experts)


def _hash_balanced(options: RouterOptions) -> nn.Module:
    table = options.table
    if table is None:
        if options.token_counts is None:
            raise MissingInputError(
                "hash_balanced needs the token counts of the training split",
                remedy="pass token_counts=torch.bincount(all training ids, minlength=vocab_size), "
                "or use hash_random",
            )
        if options.vocab_size not in (None, len(options.token_counts)):
            raise MissingInputError(
                f"hash_balanced was given {len(options.token_counts)} token counts for a "
                f"vocabulary of {options.vocab_size}",
                remedy="count with minlength=vocab_size, the rows of the token embedding",
            )
        table = balanced_table(
            options.token_counts,
            options.num_experts,
            seed=options.seed,
            top_k=options.top_k,
        )
    return HashRouter(table, options.num_experts)


def _token_gate(options: RouterOptions) -> nn.Module:
    return TokenGate(
        options.d_model,
        options.num_experts,
        top_k=options.top_k,
        gate_scale=options.gate_scale,
        seed=options.seed,
    )


ROUTERS: dict[str, Callable[[RouterOptions], nn.Module]] = {
    "hash_random": _hash_random,
    "hash_balanced": _hash_balanced,
    "token_gate": _token_gate,
}
