"""Segments of sequences in a decoder: what a gate may read of a segment is what came before it.

Tokens are counted from a sequence's first real one, padding left out, and every `length` of them
are a segment. Its tokens share a merge, and no token sees a later one.

Shapes: B batch, S sequence, J segments of one forward call, N segments so far, W columns kept,
D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.errors import MissingInputError


@dataclass(frozen=True)
class SegmentState:
    """What one layer's gate has seen of B sequences; travels in the key-value cache.

    Args:
        sums_BND: float32 sum of the hidden states of each segment's real tokens.
        counts_B: real tokens so far.
        last_BWD: hidden states of the last columns, so that a cache can be cropped.
        last_mask_BW: which of them are real tokens.
        num_columns: of the cache, padding included.
        length: tokens of a segment.
    """

    sums_BND: Tensor
    counts_B: Tensor
    last_BWD: Tensor
    last_mask_BW: Tensor
    num_columns: int
    length: int

    def on_batch(self, change: Callable[[Tensor], Tensor]) -> SegmentState:
        """Apply a function of the first dimension to all tensors: sequences reordered or taken."""
        return replace(
            self,
            sums_BND=change(self.sums_BND),
            counts_B=change(self.counts_B),
            last_BWD=change(self.last_BWD),
            last_mask_BW=change(self.last_mask_BW),
        )

    def cropped(self, num_columns: int) -> SegmentState:
        """Forget the last columns; more than are kept are a MissingInputError."""
        if num_columns == 0:
            return self
        kept = self.last_mask_BW.shape[1]
        if num_columns > kept:
            raise MissingInputError(
                f"the cache cannot forget {num_columns} tokens: gates that merge experts by "
                f"segments keep the hidden states of the last {self.length}, of which {kept} are "
                "left",
                remedy="crop fewer tokens, or start with a new cache",
            )
        mask_BC = self.last_mask_BW[:, kept - num_columns :]
        gone_BCD = self.last_BWD[:, kept - num_columns :].float() * mask_BC.unsqueeze(-1)
        counts_B = self.counts_B - mask_BC.sum(dim=1)
        places_BC = counts_B.unsqueeze(1) + mask_BC.cumsum(dim=1) - 1
        segments_BC = places_BC.clamp(min=0) // self.length
        index_BCD = segments_BC.unsqueeze(-1).expand_as(gone_BCD)
        sums_BND = self.sums_BND.scatter_add(1, index_BCD, -gone_BCD)
        # What is left of a segment without tokens is rounding.
        starts_N = torch.arange(sums_BND.shape[1], device=sums_BND.device) * self.length
        is_empty_BN = starts_N >= counts_B.unsqueeze(1)
        return replace(
            self,
            sums_BND=sums_BND.masked_fill(is_empty_BN.unsqueeze(-1), 0.0),
            counts_B=counts_B,
            last_BWD=self.last_BWD[:, : kept - num_columns],
            last_mask_BW=self.last_mask_BW[:, : kept - num_columns],
            num_columns=self.num_columns - num_columns,
        )


@dataclass(frozen=True)
class Segments:
    """The segments that the tokens of one forward call are in.

    Args:
        means_BJD: float32 mean of the hidden states of all real tokens before the segment.
        is_first_BJ: whether nothing is before it.
        segment_BS: which of the J each token is in; padding is with its neighbours.
        real_BJ: whether a real token of this call is in it.
        state: what the next call must know.
    """

    means_BJD: Tensor
    is_first_BJ: Tensor
    segment_BS: Tensor
    real_BJ: Tensor
    state: SegmentState


def cut_into_segments(
    hidden_BSD: Tensor, mask_BS: Tensor, length: int, past: SegmentState | None
) -> Segments:
    """Cut sequences into segments, and read what is before each.

    Args:
        hidden_BSD: the call's hidden states.
        mask_BS: True for real tokens.
        length: tokens of a segment.
        past: of the tokens before these; None where they are the first.

    Returns:
        The segments, and the state for the next call.
    """
    # Sums over many tokens stay in float32, which autocast would multiply in half precision.
    with torch.autocast(hidden_BSD.device.type, enabled=False):
        return _cut(hidden_BSD, mask_BS, length, past)


def _cut(hidden_BSD: Tensor, mask_BS: Tensor, length: int, past: SegmentState | None) -> Segments:
    batch, num_columns, width = hidden_BSD.shape
    real_BSD = hidden_BSD.float() * mask_BS.unsqueeze(-1)
    if past is None:
        past = SegmentState(
            sums_BND=real_BSD.new_zeros(batch, 0, width),
            counts_B=mask_BS.new_zeros(batch, dtype=torch.int64),
            last_BWD=hidden_BSD[:, :0].detach(),
            last_mask_BW=mask_BS[:, :0],
            num_columns=0,
            length=length,
        )
    first_B = past.counts_B // length
    places_BS = past.counts_B.unsqueeze(1) + mask_BS.cumsum(dim=1) - 1
    segment_BS = (places_BS // length - first_B.unsqueeze(1)).clamp(min=0)
    num_segments = int(segment_BS.max()) + 1 if segment_BS.numel() else 1
    numbers_J = torch.arange(num_segments, device=hidden_BSD.device)
    is_in_BJS = (segment_BS.unsqueeze(1) == numbers_J.view(1, -1, 1)) & mask_BS.unsqueeze(1)
    own_BJD = is_in_BJS.float() @ real_BSD
    before_BD, begun_BD = _past_sums(past, first_B)
    own_BJD = torch.cat([own_BJD[:, :1] + begun_BD.unsqueeze(1), own_BJD[:, 1:]], dim=1)
    so_far_BJD = before_BD.unsqueeze(1) + own_BJD.cumsum(dim=1)
    prefix_BJD = torch.cat([before_BD.unsqueeze(1), so_far_BJD[:, :-1]], dim=1)
    number_BJ = first_B.unsqueeze(1) + numbers_J
    counts_BJ = (number_BJ * length).clamp(min=1)
    return Segments(
        means_BJD=prefix_BJD / counts_BJ.unsqueeze(-1),
        is_first_BJ=number_BJ == 0,
        segment_BS=segment_BS,
        real_BJ=is_in_BJS.any(dim=2),
        state=SegmentState(
            sums_BND=_with(past.sums_BND, own_BJD.detach(), number_BJ),
            counts_B=past.counts_B + mask_BS.sum(dim=1),
            last_BWD=_last(past.last_BWD, hidden_BSD.detach(), length),
            last_mask_BW=_last(past.last_mask_BW, mask_BS, length),
            num_columns=past.num_columns + num_columns,
            length=length,
        ),
    )


def _last(past: Tensor, own: Tensor, length: int) -> Tensor:
    """Join columns and keep the last; copied, so that the rest of neither is held in memory."""
    return torch.cat([past, own[:, -length:]], dim=1)[:, -length:]


def _past_sums(past: SegmentState, first_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the finished segments, and give the begun one's sum: (B, D) each."""
    numbers_N = torch.arange(past.sums_BND.shape[1], device=first_B.device)
    finished_BN = (numbers_N < first_B.unsqueeze(1)).float()
    begun_BN = (numbers_N == first_B.unsqueeze(1)).float()
    before_BD, begun_BD = (
        (which_BN.unsqueeze(1) @ past.sums_BND).squeeze(1) for which_BN in (finished_BN, begun_BN)
    )
    return before_BD, begun_BD


def _with(sums_BND: Tensor, own_BJD: Tensor, number_BJ: Tensor) -> Tensor:
    """Write this call's sums into the places of their segments."""
    batch, num_past, width = sums_BND.shape
    num_segments = max(num_past, int(number_BJ.max()) + 1) if number_BJ.numel() else num_past
    grown_BND = sums_BND.new_zeros(batch, num_segments, width)
    grown_BND[:, :num_past] = sums_BND
    return grown_BND.scatter(1, number_BJ.unsqueeze(-1).expand_as(own_BJD), own_BJD)
