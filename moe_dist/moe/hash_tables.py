"""Token -> expert tables for routing without a learned gate.

Shapes: V vocabulary, E experts, K active experts.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moe_dist.errors import MissingInputError


def random_table(vocab_size: int, num_experts: int, *, seed: int, top_k: int = 1) -> Tensor:
    """Give every token id fixed random experts: (V,) int64 for top_k 1, else (V, K) distinct.

    The same seed gives the same table on every machine. A ValueError if top_k is not 1 to E.

    Source: Hash Layers, arXiv:2106.04426.
    """
    _check_top_k(top_k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    if top_k == 1:
        return torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")
    keys = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
    return keys.argsort(dim=1)[:, :top_k].contiguous()


def balanced_table(token_counts: Tensor, num_experts: int, *, seed: int, top_k: int = 1) -> Tensor:
    """Spread token ids so that each expert sees about as many training tokens as the others.

    Heaviest ids go first, each into the lightest experts; ids that never occur go to random
    experts.

    Args:
        token_counts: (V,) how often each id occurs in the training split.
        num_experts: experts to choose from, E.
        seed: decides the experts of unseen ids and the order of equal counts.
        top_k: different experts for each token id, K.

    Returns:
        (V,) int64 for top_k 1, else (V, K) with distinct experts in each row.

    Raises:
        MissingInputError: if the counts are not one non-negative number for each id.
        ValueError: if top_k is not between 1 and num_experts.

    Source: Hash Layers, arXiv:2106.04426 (balanced assignment).
    """
    counts = torch.as_tensor(token_counts).cpu()
    if counts.dim() != 1 or counts.numel() == 0 or bool((counts < 0).any()):
        raise MissingInputError(
            f"hash_balanced needs one non-negative count for each token id, got a tensor of shape "
            f"{tuple(counts.shape)}",
            remedy="pass token_counts=torch.bincount(all training ids, minlength=vocab_size)",
        )
    vocab_size = counts.numel()
    table = random_table(vocab_size, num_experts, seed=seed, top_k=top_k).view(vocab_size, top_k)
    # Equal counts in random order, else each expert would get a run of neighbouring ids.
    shuffled = torch.randperm(
        vocab_size, generator=torch.Generator().manual_seed(seed), device="cpu"
    )
    heaviest_first = shuffled[counts[shuffled].argsort(descending=True, stable=True)]
    loads = [(0.0, expert) for expert in range(num_experts)]
    rows: list[list[int]] = []
    num_seen = int((counts > 0).sum())
    for count in counts[heaviest_first[:num_seen]].tolist():
        lightest = [heapq.heappop(loads) for _ in range(top_k)]
        for load, expert in lightest:
            heapq.heappush(loads, (load + count, expert))
        rows.append([expert for _, expert in lightest])
    if rows:
        table[heaviest_first[:num_seen]] = torch.tensor(rows)
    return table.view(-1) if top_k == 1 else table


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
