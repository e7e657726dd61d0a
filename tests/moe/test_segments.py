"""A decoder's gates read the segments before, whether tokens come at once or one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_dist.errors import MissingInputError
from moe_dist.moe import RoutingContext, use_context
from moe_dist.moe.segments import SegmentState, cut_into_segments
from tests.moe.merged import D_MODEL, MERGED, batch, merged_layer

LENGTH = 3


def padded(left: bool, lengths: tuple[int, ...] = (11, 7, 2)) -> tuple[Tensor, Tensor]:
    hidden, context = batch(lengths, left=left)
    assert context.mask is not None
    return hidden, context.mask


def means_of_tokens(hidden: Tensor, mask: Tensor, parts: list[int]) -> tuple[Tensor, SegmentState]:
    """Give for each token what its gate reads, with the sequences cut into calls of such sizes."""
    state, found, start = None, [], 0
    for size in parts:
        columns = slice(start, start + size)
        cut = cut_into_segments(hidden[:, columns], mask[:, columns], LENGTH, state)
        index = cut.segment_BS.unsqueeze(-1).expand(-1, -1, D_MODEL)
        first = cut.is_first_BJ.gather(1, cut.segment_BS)
        means = cut.means_BJD.gather(1, index)
        found.append(torch.where(first.unsqueeze(-1), -7.0, means))
        state = cut.state
        start += size
    assert state is not None
    return torch.cat(found, dim=1), state


def expected_means(hidden: Tensor, mask: Tensor) -> Tensor:
    """The same token by token, from the definition."""
    found = torch.full_like(hidden, -7.0)
    for row, (states, real) in enumerate(zip(hidden, mask, strict=True)):
        seen: list[Tensor] = []
        for column, state in enumerate(states):
            if not real[column]:
                continue
            num_before = len(seen) // LENGTH * LENGTH
            if num_before:
                found[row, column] = torch.stack(seen[:num_before]).mean(dim=0)
            seen.append(state)
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("parts", [[11], [1] * 11, [5, 6], [3, 3, 3, 2], [2, 1, 7, 1]])
def test_a_segment_reads_what_is_before_it(left: bool, parts: list[int]) -> None:
    hidden, mask = padded(left)
    found, state = means_of_tokens(hidden, mask, parts)
    expected = expected_means(hidden, mask)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert state.counts_B.tolist() == [11, 7, 2]
    assert state.num_columns == 11


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("num_cropped", [0, 1, 2, 3])
def test_a_cropped_state_goes_on_as_if_the_rest_had_never_been(
    left: bool, num_cropped: int
) -> None:
    hidden, mask = padded(left)
    _, state = means_of_tokens(hidden, mask, [4, 7])
    cropped = state.cropped(num_cropped)
    _, shorter = means_of_tokens(
        hidden[:, : 11 - num_cropped], mask[:, : 11 - num_cropped], [1] * (11 - num_cropped)
    )
    assert cropped.counts_B.tolist() == shorter.counts_B.tolist()
    assert cropped.num_columns == shorter.num_columns
    num = shorter.sums_BND.shape[1]
    torch.testing.assert_close(cropped.sums_BND[:, :num], shorter.sums_BND, rtol=1e-5, atol=1e-5)
    assert not cropped.sums_BND[:, num:].any()
    more, more_mask = padded(left, (4, 4, 4))
    later = [cut_into_segments(more, more_mask, LENGTH, one) for one in (cropped, shorter)]
    torch.testing.assert_close(later[0].means_BJD, later[1].means_BJD, rtol=1e-5, atol=1e-5)


def test_more_than_a_segment_cannot_be_cropped() -> None:
    _, state = means_of_tokens(*padded(False), [11])
    with pytest.raises(MissingInputError, match=r"cannot forget 4 tokens.*last 3"):
        state.cropped(4)
    with pytest.raises(MissingInputError, match="of which 1 are left"):
        state.cropped(2).cropped(2)


@pytest.mark.parametrize("router", [name for name in MERGED if name != "merged_task"])
def test_no_token_of_a_decoder_sees_a_later_one(router: str) -> None:
    layer = merged_layer(router, segment_length=LENGTH)
    hidden, mask = padded(True)
    changed = hidden.clone()
    changed[:, 7:] = -changed[:, 7:]
    outputs = []
    for value in (hidden, changed):
        with torch.no_grad(), use_context(RoutingContext(mask=mask, causal=True)):
            outputs.append(layer(value))
    torch.testing.assert_close(outputs[0][:, :7], outputs[1][:, :7])
    with torch.no_grad(), use_context(RoutingContext(mask=mask)):
        leaks = layer(hidden)[:, :7] - layer(changed)[:, :7]
    assert float(leaks.abs().max()) > 0.1, "without causal segments it would"


def test_a_segment_depends_neither_on_padding_nor_on_other_sequences() -> None:
    layer = merged_layer(segment_length=LENGTH).train()
    outputs = []
    for left in (False, True):
        hidden, mask = padded(False)
        places = padded(left)[1]
        moved = torch.zeros_like(hidden)
        moved[places] = hidden[mask]
        context = RoutingContext(
            mask=places, causal=True, sample_ids=torch.tensor([4, 1, 9]), noise_seed=2
        )
        with torch.no_grad(), use_context(context):
            outputs.append(layer(moved)[places])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    alone = RoutingContext(
        mask=torch.ones(1, 7, dtype=torch.bool),
        causal=True,
        sample_ids=torch.tensor([1]),
        noise_seed=2,
    )
    with torch.no_grad(), use_context(alone):
        found = layer(padded(False)[0][1:2, :7])[0]
    torch.testing.assert_close(found, outputs[0][11:18], rtol=1e-5, atol=1e-5)


def test_the_first_segment_learns_from_the_start() -> None:
    layer = merged_layer(drawn=False, segment_length=64).train()
    hidden, mask = padded(False)
    with use_context(RoutingContext(mask=mask, causal=True, noise_seed=1)):
        layer(hidden).square().sum().backward()
    assert layer.router is not None
    for gate in layer.router.gates.values():
        assert gate.gate.weight.grad is not None
        assert float(gate.gate.weight.grad.abs().sum()) > 0
