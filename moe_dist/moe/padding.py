"""Which tokens of a forward call are real, read from whatever attention mask the stack is given.

Shapes: B batch, S sequence (of this call), Q query rows of the mask, C key columns of it, the
tokens in a key-value cache first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HIDDEN = -1e3
"""An added mask hides a key with the smallest number of its dtype, or with -10000; what is above
this is a bias."""


def real_tokens(
    mask: object, inputs: object, *, num_past: int, causal: bool
) -> tuple[Tensor | None, str]:
    """Tell real tokens from padding.

    Args:
        mask: None, or a tensor: (B, past + S), or (B, heads, Q, C) with True or 0 where a query
            may read a key. Of masks by kind of layer that of "full_attention" is read.
        inputs: the call's ids or embeddings, (B, S, ...).
        num_past: tokens in the key-value cache.
        causal: no token may see a later one.

    Returns:
        (B, S) bool, None where all are real or nothing is known; and why nothing is known.
    """
    if isinstance(mask, Mapping):
        if "full_attention" not in mask:
            return None, f"the masks of {', '.join(map(str, mask)) or 'no kind of layer'}"
        mask = mask["full_attention"]
    if mask is None:
        return None, ""
    if not isinstance(mask, Tensor):
        return None, f"an attention mask of the kind {type(mask).__name__}"
    size = inputs.shape[:2] if isinstance(inputs, Tensor) and inputs.dim() >= 2 else None
    if mask.dim() == 2:
        # With a key-value cache the mask also covers the past; the input is its last part.
        return (mask if size is None else mask[:, -size[1] :]).bool(), ""
    found = None
    if mask.dim() in (3, 4):
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        found = _by_queries(mask, size or (len(mask), mask.shape[2]), num_past, causal)
    if found is None:
        kind = "causal" if causal else "padding"
        return None, f"an attention mask of the shape {tuple(mask.shape)} that is no {kind} mask"
    return found, ""


def _by_queries(mask: Tensor, size: tuple[int, ...], num_past: int, causal: bool) -> Tensor | None:
    """Read a mask of queries by keys; None where it says something else beside padding.

    A token is real that reads itself. It is checked that real tokens read all real ones of this
    call, in a decoder those before them, be it within a window. What it says of tokens in the cache
    is not looked at: they may be padding.
    """
    batch, length = size
    num_columns = mask.shape[3]
    fits = len(mask) in (1, batch) and mask.shape[2] in (1, length)
    if not fits or num_columns < num_past + length or not batch * length:
        return None
    visible = mask > HIDDEN if mask.is_floating_point() else mask.bool()
    one_BQC = visible[:, 0]
    if mask.shape[1] > 1 and not bool((visible == one_BQC.unsqueeze(1)).all()):
        return None
    sees_BSC = one_BQC.expand(batch, length, num_columns)
    own_BSS = sees_BSC[:, :, num_past : num_past + length]
    columns_C = torch.arange(num_columns, device=mask.device)
    later_SC = columns_C > columns_C[num_past : num_past + length].unsqueeze(1)
    real_BS = own_BSS.diagonal(dim1=1, dim2=2)
    expected_BSS = real_BS.unsqueeze(1)
    if causal:
        # Rows of padding that would read nothing are sometimes opened to everything.
        real_BS = real_BS & ~(sees_BSC & later_SC).any(dim=2)
        distance_SS = columns_C[:length].unsqueeze(1) - columns_C[:length]
        seen_SS = distance_SS * (own_BSS & real_BS.unsqueeze(2))
        expected_BSS = real_BS.unsqueeze(1) & (distance_SS >= 0) & (distance_SS <= seen_SS.max())
    is_wrong_BSS = (own_BSS != expected_BSS) & real_BS.unsqueeze(2)
    says_nothing_B = sees_BSC.flatten(1).any(dim=1) & ~real_BS.any(dim=1)
    if bool(is_wrong_BSS.any() | says_nothing_B.any()):
        return None
    return real_BS
