"""Routing by token id: a fixed table, no gate.

Shapes: T tokens, D model, K active experts, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.experts import compute_dtype
from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import Routing, RoutingContext


class TableRouter(nn.Module, ABC):
    """Gives each token the experts of a row; the table is saved with the model.

    Args:
        table: (N,) or (N, K) int64 expert ids.
        num_experts: experts to choose from, E.

    Raises:
        ConversionError: if the table holds no rows or ids that are not experts.
    """

    table: Tensor

    def __init__(self, table: Tensor, num_experts: int) -> None:
        super().__init__()
        _check_table(table, num_experts)
        self.num_experts = num_experts
        self.top_k = 1 if table.dim() == 1 else table.shape[1]
        self.register_buffer("table", table.to(torch.int64))

    @abstractmethod
    def rows(self, hidden_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """Say which row of the table is each token's: (T,) int64; the context must tell."""

    def forward(self, hidden_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Give each token the experts of its row, equally weighted and without logits.

        Args:
            hidden_TD: hidden states; only their number, dtype and device matter.
            context: carries what the rows are chosen by.

        Returns:
            The routing.

        Raises:
            MissingInputError: see `rows`.
        """
        rows_T = self.rows(hidden_TD, context)
        num_tokens = hidden_TD.shape[0]
        weight = torch.full(
            (1, 1), 1.0 / self.top_k, dtype=compute_dtype(hidden_TD), device=hidden_TD.device
        )
        return Routing(
            self.table.index_select(0, rows_T).view(num_tokens, self.top_k),
            weight.expand(num_tokens, self.top_k),
            None,
            unit_weights=self.top_k == 1,
        )


class HashRouter(TableRouter):
    """Sends each token id to fixed experts; the table is saved with the model.

    The K experts of a token share its output equally. An id beyond the table, of a token that was
    added after the conversion, takes the row of ``id mod V``: the same one everywhere.

    Args:
        table: (V,) or (V, K) int64 expert ids.
        num_experts: experts to choose from, E.

    Raises:
        ConversionError: if the table holds no rows or ids that are not experts.
    """

    def rows(self, hidden_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """Take each token's id, of those beyond the table the remainder.

        Args:
            hidden_TD: hidden states; only their number matters.
            context: carries the token ids.

        Returns:
            (T,) int64.

        Raises:
            MissingInputError: if the token ids are missing, are not one for each token, or are
                negative (checked on the CPU only).
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
        ids_T = bring(token_ids.reshape(-1), self.table.device)
        # An export knows no values.
        is_known = ids_T.device.type == "cpu" and not torch.compiler.is_exporting()
        if is_known and num_tokens and int(ids_T.min()) < 0:
            raise MissingInputError(
                f"token id {int(ids_T.min())} is not in the hash table",
                remedy="pass the ids that the embedding reads; labels mark padding with -100",
            )
        return ids_T.remainder(self.table.shape[0])


def _check_table(table: Tensor, num_experts: int) -> None:
    """Refuse a table that is empty or names other experts."""
    # A model built on the meta device to be filled from a checkpoint has no values to check.
    if table.numel() == 0 or (
        not table.is_meta and not 0 <= int(table.min()) <= int(table.max()) < num_experts
    ):
        raise ConversionError(
            f"a hash table of shape {tuple(table.shape)} does not name experts 0 to "
            f"{num_experts - 1} for each token id",
            remedy="build the table with the model's own num_experts and vocab_size",
        )
