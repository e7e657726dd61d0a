"""What a sample draws is its own: at any place in a batch, at any width, in any layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.moe import RoutingContext
from moe_dist.moe.noise import normal_rows, uniform_rows

CPU = torch.device("cpu")
LENGTHS = torch.tensor([5, 1, 3])
IDS = torch.tensor([40, 7, 1 << 40])


def context(width: int, *, left: bool = False) -> RoutingContext:
    columns = torch.arange(width)
    mask = columns < LENGTHS.unsqueeze(1)
    return RoutingContext(mask=mask.flip(1) if left else mask, sample_ids=IDS, noise_seed=3)


def drawn(of: RoutingContext, *, salt: int = 1) -> list[Tensor]:
    """What the real tokens of each sample draw."""
    assert of.mask is not None
    rows = uniform_rows((of.mask.numel(), 4), of, salt=salt, device=CPU)
    return [row[real] for row, real in zip(rows.view(*of.mask.shape, 4), of.mask, strict=True)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("width", [5, 9])
def test_neither_padding_nor_neighbours_matter(width: int, left: bool) -> None:
    together = drawn(context(width, left=left))
    for row, length in enumerate(LENGTHS.tolist()):
        alone = RoutingContext(
            mask=torch.ones(1, length, dtype=torch.bool),
            sample_ids=IDS[row : row + 1],
            noise_seed=3,
        )
        (found,) = drawn(alone)
        assert torch.equal(found, together[row])
        (no_mask,) = uniform_rows((length, 4), replace(alone, mask=None), salt=1, device=CPU).split(
            length
        )
        assert torch.equal(no_mask, found)


def test_samples_places_columns_steps_and_layers_draw_differently() -> None:
    first = context(5)
    numbers = torch.cat(drawn(first))
    assert len(numbers.unique()) == numbers.numel()
    for other in (drawn(replace(first, noise_seed=4)), drawn(first, salt=2)):
        assert not bool(torch.isin(torch.cat(other), numbers).any())


def test_one_row_for_a_sample_does_not_depend_on_the_batch() -> None:
    found = normal_rows((3, 4), context(5), salt=1, device=CPU)
    alone = RoutingContext(sample_ids=IDS[2:], noise_seed=3)
    assert torch.equal(normal_rows((1, 4), alone, salt=1, device=CPU), found[2:])


def test_without_numbers_torch_seeds_and_rows_differ() -> None:
    torch.manual_seed(1)
    first = uniform_rows((6, 4), None, salt=1, device=CPU)
    second = uniform_rows((6, 4), None, salt=1, device=CPU)
    torch.manual_seed(1)
    assert torch.equal(uniform_rows((6, 4), None, salt=1, device=CPU), first)
    assert len(torch.cat([first, second]).unique()) == 48


def test_the_distributions_are_what_they_are_called() -> None:
    """Moments, evenness and independence of neighbours, at four standard errors."""
    many = RoutingContext(sample_ids=torch.arange(20_000), noise_seed=5)
    even = uniform_rows((20_000, 8), many, salt=3, device=CPU)
    assert 0.0 < float(even.min()) < float(even.max()) < 1.0
    counts = torch.histc(even, bins=16, min=0, max=1)
    assert float((counts - 10_000).abs().max()) < 4 * 10_000**0.5
    normal = normal_rows((20_000, 8), many, salt=3, device=CPU)
    error = 160_000**-0.5
    assert abs(float(normal.mean())) < 4 * error
    assert abs(float(normal.square().mean()) - 1) < 4 * error * 2**0.5
    for shifted in (normal.roll(1, 0), normal.roll(1, 1)):
        assert abs(float((normal * shifted).mean())) < 4 * error
